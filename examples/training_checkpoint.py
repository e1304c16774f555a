"""Checkpoints: a folder for each moment, with what is the same on all ranks and what is each one's own.

`write_folder` and `read_folder` serve train.py and train_lm.py alike; `save` and `resume` are train.py's.
"""

import os
import pickle
import shutil

import torch


class CannotResume(ValueError):
    """There is no checkpoint that this run could go on from; the text says why."""


def write_atomically(path, write):
    """Have `write` fill a file beside `path`, then put it in place in one step."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_folder(engine, root, name, shared, own, shared_file="model.pt"):
    """Write a checkpoint: a folder that counts only once `latest` names it; older ones go.

    Args:
        engine: of train.py; all ranks call this.
        root: the folder of all checkpoints.
        name: this one's, `epoch-003`: a word, a hyphen and a number.
        shared: what is the same on all ranks, with the run's `settings`; rank 0 writes it.
        own: what is this rank's own; each rank writes it.
        shared_file: the name of the file with `shared`.
    """
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"rank-{engine.rank}.pt", lambda file: torch.save(own, file))
    if engine.rank == 0:
        write_atomically(folder / shared_file, lambda file: torch.save(shared, file))
    engine.sum([0.0])  # all have written
    if engine.rank == 0:
        write_atomically(root / "latest", lambda file: file.write(f"{name}\n".encode()))
        for other in root.glob(f"{name.split('-')[0]}-[0-9]*"):
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)


def read_folder(engine, root, settings, shared_file="model.pt"):
    """The (shared, own) of the last checkpoint; CannotResume if there is none, or one of other settings."""
    if not (root / "latest").is_file():
        raise CannotResume(f"--resume: there is no checkpoint in {root} (no file {root / 'latest'})")
    folder = root / (root / "latest").read_text().strip()
    shared = load_file(folder / shared_file)
    for name, now in settings.items():
        then = shared["settings"].get(name)
        if then != now:
            raise CannotResume(f"--resume: {root} was written with {name} {then}, this run has {name} {now}")
    return shared, load_file(folder / f"rank-{engine.rank}.pt")


def save(training, settings):
    """Write this epoch's checkpoint.

    A rank's own are the residuals of its compressors, and the state of its random generator.
    """
    own = {"exchange": training.engine.exchange.state_dict(), "rng": torch.get_rng_state()}
    shared = {
        "settings": settings,
        "epoch": training.epoch,
        "step": training.step,
        "seconds": training.seconds,
        "curve": training.curve,
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "scaler": training.scaler.state_dict(),
    }
    write_folder(training.engine, training.arguments.checkpoint, f"epoch-{training.epoch:03}", shared, own)


def load_file(path):
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CannotResume(f"--resume: {path} is damaged: {str(error).splitlines()[0]}") from error


def resume(training, settings):
    """Bring `training` to where the checkpoint's run was at the end of its last epoch; CannotResume if it cannot."""
    shared, own = read_folder(training.engine, training.arguments.checkpoint, settings)
    training.model.load_state_dict(shared["model"])
    training.optimizer.load_state_dict(shared["optimizer"])
    training.scaler.load_state_dict(shared["scaler"])
    training.engine.exchange.load_state_dict(own["exchange"])
    torch.set_rng_state(own["rng"])
    for name in ("epoch", "step", "seconds", "curve"):
        setattr(training, name, shared[name])
