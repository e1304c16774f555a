"""Checkpoints of train.py: a folder for each epoch, with what is the same on all ranks and what is each one's own."""

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


def save(training, settings):
    """Write this epoch's checkpoint: a folder that counts only once `latest` names it.

    Rank 0 writes what is the same on all ranks. Each rank writes what is its own: the residuals of its
    compressors, and the state of its random generator.
    """
    engine, root = training.engine, training.arguments.checkpoint
    folder = root / f"epoch-{training.epoch:03}"
    folder.mkdir(parents=True, exist_ok=True)
    own = {"exchange": engine.exchange.state_dict(), "rng": torch.get_rng_state()}
    write_atomically(folder / f"rank-{engine.rank}.pt", lambda file: torch.save(own, file))
    if engine.rank == 0:
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
        write_atomically(folder / "model.pt", lambda file: torch.save(shared, file))
    engine.sum([0.0])  # all have written
    if engine.rank == 0:
        write_atomically(root / "latest", lambda file: file.write(f"{folder.name}\n".encode()))
        for other in root.glob("epoch-[0-9]*"):
            if other.name != folder.name:
                shutil.rmtree(other, ignore_errors=True)


def load_file(path):
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CannotResume(f"--resume: {path} is damaged: {str(error).splitlines()[0]}") from error


def resume(training, settings):
    """Bring `training` to where the checkpoint's run was at the end of its last epoch; CannotResume if it cannot."""
    root = training.arguments.checkpoint
    if not (root / "latest").is_file():
        raise CannotResume(f"--resume: there is no checkpoint in {root} (no file {root / 'latest'})")
    folder = root / (root / "latest").read_text().strip()
    shared = load_file(folder / "model.pt")
    for name, now in settings.items():
        then = shared["settings"].get(name)
        if then != now:
            raise CannotResume(f"--resume: {root} was written with {name} {then}, this run has {name} {now}")
    own = load_file(folder / f"rank-{training.engine.rank}.pt")
    training.model.load_state_dict(shared["model"])
    training.optimizer.load_state_dict(shared["optimizer"])
    training.scaler.load_state_dict(shared["scaler"])
    training.engine.exchange.load_state_dict(own["exchange"])
    torch.set_rng_state(own["rng"])
    for name in ("epoch", "step", "seconds", "curve"):
        setattr(training, name, shared[name])
