#!/usr/bin/env python3
r"""Train an image classifier with Horovod, its gradients compressed by gcompress.

Four ranks on this machine and Fashion-MNIST; of each gradient the largest 1 % are sent exactly and the other
entries in 2 bits:

    horovodrun -np 4 python examples/train.py

(`make train` does the same and installs and downloads what is needed first.) One process, no launcher:

    python examples/train.py

Another compressor, or none, with the same initial weights and the same batches, so that accuracies
compare step by step:

    horovodrun -np 4 python examples/train.py --compressor topk:sparsity=0.99
    horovodrun -np 4 python examples/train.py --compressor topk:sparsity=0.999 --momentum-correction \
        --warmup-steps 400
    horovodrun -np 4 python examples/train.py --compressor fp16
    horovodrun -np 4 python examples/train.py --amp fp16
    horovodrun -np 4 python examples/train.py --compressor none --log-file runs/none.jsonl
    horovodrun -np 4 python examples/train.py --plot runs/both.png --compare runs/none.jsonl

Another model (any of torchvision's classifiers) on another data set:

    horovodrun -np 4 python examples/train.py --model resnet18 --dataset cifar100 --data /data/cifar
    horovodrun -np 4 python examples/train.py --model resnet50 --dataset folder --data /data/flowers \
        --image-size 224

Stop at any moment and go on from the last whole epoch, with each rank's error feedback as it was:

    horovodrun -np 4 python examples/train.py --checkpoint runs/a
    horovodrun -np 4 python examples/train.py --checkpoint runs/a --resume

A resumed run ends with the weights of an uninterrupted one to the bit, if the exchange adds in the same order
each time. All-gathers of compressed gradients do. Horovod's ring all-reduce of floats (`none`, `fp16`, and
tensors below --min-numel) does so with two ranks; with more the order depends on which tensors Horovod fused,
unless HOROVOD_FUSION_THRESHOLD=0 is set. On several machines all must see the same checkpoint folder.

To take gcompress into a training script of your own, look for "gcompress" below: it is two imports, the
compressor, one argument of hvd.DistributedOptimizer and, for checkpoints, one state per rank.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import pathlib
import pickle
import shutil
import sys
import time

import torch
from torch.nn import functional

try:
    import gcompress.plugins.horovod as gcompress_hvd
    import horovod.torch as hvd

    import gcompress
except ImportError as error:
    sys.exit(f"train.py: error: {error}; `make setup` installs what is needed into .venv")

import image_data
import image_training
import training_report
from image_training import build_model, learning_rate, rank_batches

DEFAULT_COMPRESSOR = "mask:sparsity=0.99,bits=2"
TEST_BATCH = 500
# A resumed run continues the interrupted one only if these are the same; any other difference is refused.
RESUME_MUST_MATCH = (
    "compressor",
    "min_numel",
    "exchange",
    "error_feedback",
    "momentum_correction",
    "clip",
    "warmup_steps",
    "model",
    "dataset",
    "image_size",
    "epochs",
    "batch_size",
    "lr",
    "momentum",
    "weight_decay",
    "seed",
    "limit_train",
    "amp",
)


class Refusal(Exception):
    """Something the user asked for that cannot be done, in one sentence."""


class Parser(argparse.ArgumentParser):
    """Reports wrong arguments as a Refusal, so that one rank prints them and not each."""

    def error(self, message):
        raise Refusal(message)


def at_least(minimum, kind=int):
    """An argparse type: a finite number of `kind` from `minimum` up."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (minimum <= value < math.inf):
            raise argparse.ArgumentTypeError(f"expected a number from {minimum} up, got {text!r}")
        return value

    return convert


def build_parser():
    parser = Parser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("gradient compression").add_argument
    add("--compressor", metavar="POLICY|none|fp16", default=DEFAULT_COMPRESSOR, help="default: %(default)s")
    add("--min-numel", type=at_least(0), help="smaller tensors go uncompressed (1024)")
    add("--exchange", choices=gcompress.EXCHANGES, help="how ranks come to the mean (auto)")
    add("--no-error-feedback", dest="error_feedback", action="store_false", help="forget what was not sent")
    add("--momentum-correction", action="store_true", help="apply --momentum before compressing, for very sparse ones")
    add("--warmup-steps", type=at_least(0), help="keep more in so many first steps (0)")
    add("--clip", type=at_least(0, float), metavar="NORM", help="clip each tensor's gradient, averaged, to this norm")

    add = parser.add_argument_group("model and data").add_argument
    add("--model", default="cnn", help="cnn, or the name of any torchvision classifier (%(default)s)")
    add("--dataset", choices=image_data.NAMES, default="fashion-mnist", help="default: %(default)s")
    add("--data", metavar="PATH", help="folder of the data set; for `folder`: one with train/ and val/")
    add("--image-size", type=at_least(1), help="resize images to squares of this side in pixels")
    add("--limit-train", type=at_least(1), metavar="N", help="use the first N training images only")
    add("--limit-test", type=at_least(1), metavar="N", help="use the first N test images only")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=at_least(1), default=10, help="default: %(default)s")
    add("--batch-size", type=at_least(1), default=64, help="images per rank and step (%(default)s)")
    add("--lr", type=at_least(0, float), default=0.1, help="peak learning rate (%(default)s)")
    add("--momentum", type=at_least(0, float), default=0.9, help="default: %(default)s")
    add("--weight-decay", type=at_least(0, float), default=1e-4, help="default: %(default)s")
    add("--seed", type=at_least(0), default=1, help="of initial weights and batches (%(default)s)")
    image_training.add_amp(add)
    add("--max-steps", type=at_least(1), metavar="N", help="stop after N steps as if interrupted, for tests")

    add = parser.add_argument_group("results").add_argument
    add("--checkpoint", metavar="DIR", type=pathlib.Path, help="write a checkpoint there after each epoch")
    add("--resume", action="store_true", help="go on from the last checkpoint in --checkpoint DIR")
    add("--log-file", metavar="FILE", help="write a JSON line for each epoch and a final one")
    add("--plot", metavar="FILE", help="draw accuracy against steps and against bytes")
    add("--compare", metavar="FILE", nargs="+", default=[], help="logs of other runs for the same plot")
    add("--progress", choices=("auto", "bar", "lines"), default="auto", help="auto: a bar if on a terminal")
    return parser


def parse_arguments():
    arguments = build_parser().parse_args()
    if arguments.resume and not arguments.checkpoint:
        raise Refusal("--resume needs --checkpoint DIR to resume from")
    if arguments.compare and not arguments.plot:
        raise Refusal("--compare needs --plot FILE to draw into")
    if arguments.plot and not importable("matplotlib"):
        raise Refusal("--plot needs matplotlib: pip install matplotlib")
    arguments.compared = [training_report.read_log(path) for path in arguments.compare]
    arguments.compression = build_compression(arguments)
    if arguments.compressor not in ("none", "fp16"):
        # The spec in its one canonical form, so that logs and checkpoints compare.
        arguments.compressor = str(gcompress.as_policy(arguments.compressor))
    if hvd.rank() == 0:
        for path in filter(None, (arguments.log_file, arguments.plot)):
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    return arguments


def importable(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def refused_together():
    """End all ranks with exit code 2 and one sentence from rank 0 if any rank refuses within the block.

    A rank that ended alone would leave the others waiting in their next operation. Blocks must not contain
    Horovod operations, for the same reason.
    """
    message = ""
    try:
        yield
    except (Refusal, gcompress.ConfigError, ValueError, OSError) as error:
        message = " ".join(str(error).split())
    size = 1000
    row = torch.zeros(1, size, dtype=torch.uint8)
    encoded = message.encode()[:size]
    row[0, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    rows = hvd.allgather(row, name="refusals")
    messages = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    if any(messages):
        if hvd.rank() == 0:
            print(f"train.py: error: {next(filter(None, messages))}", file=sys.stderr, flush=True)
        # The launcher terminates the other ranks once one has failed: none may end before the sentence is
        # out, and then all at once, without the interpreter's slow clean-up.
        hvd.barrier()
        hvd.shutdown()
        os._exit(2)


def build_compression(arguments):
    """What hvd.DistributedOptimizer takes as `compression`."""
    if arguments.compressor in ("none", "fp16"):
        if arguments.momentum_correction or arguments.warmup_steps or arguments.clip:
            raise Refusal("--momentum-correction, --warmup-steps and --clip need a compressor with a memory")
        return getattr(hvd.Compression, arguments.compressor)
    given = {
        "min_numel": arguments.min_numel,
        "exchange": arguments.exchange,
        # Without the option the policy decides: on for biased compressors.
        "error_feedback": None if arguments.error_feedback else False,
        "momentum": arguments.momentum if arguments.momentum_correction else None,
        # Each rank's share of the limit for the mean.
        "clip": arguments.clip / math.sqrt(hvd.size()) if arguments.clip else None,
        "warmup_steps": arguments.warmup_steps,
    }
    policy = gcompress.as_policy(arguments.compressor)
    return dataclasses.replace(policy, **{name: value for name, value in given.items() if value is not None})


class Training:
    """One run: the model, its optimizer and exchange, the data, and how far it has come."""

    def __init__(self, arguments, data, model):
        self.arguments, self.data, self.model = arguments, data, model
        parameters = [{"params": list(model.parameters()), "weight_decay": arguments.weight_decay}]
        if isinstance(arguments.compression, gcompress.Policy) and arguments.compression.momentum:
            named = model.named_parameters()
            parameters = gcompress.parameter_groups(named, arguments.compression, weight_decay=arguments.weight_decay)
        optimizer = torch.optim.SGD(parameters, lr=arguments.lr, momentum=arguments.momentum)
        self.optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters(), compression=arguments.compression
        )
        self.exchange = gcompress_hvd.exchange(self.optimizer)
        self.scaler = image_training.loss_scaler(arguments)
        self.steps_per_epoch = len(data.train_images) // (arguments.batch_size * hvd.size())
        self.total_steps = self.steps_per_epoch * arguments.epochs
        self.last_step = min(self.total_steps, arguments.max_steps or self.total_steps)
        self.epoch, self.step, self.seconds, self.curve = 0, 0, 0.0, []

    def batches(self):
        """This rank's batches of the epoch."""
        seed, size = self.arguments.seed, self.arguments.batch_size
        for images, labels in rank_batches(self.data, seed, self.epoch, size, hvd.rank(), hvd.size()):
            yield self.prepared(images), labels

    def prepared(self, images):
        images = self.data.normalised(images)
        size = self.arguments.image_size
        if size and images.shape[2:] != (size, size):
            images = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return images

    def train_step(self, images, labels):
        """One step; returns the loss and the number of images that were classified correctly."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total_steps, self.arguments.lr)

        def loss_of():
            outputs = self.model(images)
            return functional.cross_entropy(outputs, labels), outputs

        loss, outputs = image_training.step_of(
            self.optimizer, self.scaler, loss_of, self.step, hvd.rank(), self.arguments
        )
        self.step += 1
        return loss.item(), (outputs.argmax(1) == labels).sum().item()

    def train_epoch(self):
        """Train for an epoch, or up to the last step allowed; returns this rank's sums for `measured`."""
        self.model.train()
        started, loss_sum, correct, seen = time.perf_counter(), 0.0, 0, 0
        with progress_bar(self) as bar:
            for images, labels in self.batches():
                if self.step >= self.last_step:
                    break
                loss, right = self.train_step(images, labels)
                seen, correct, loss_sum = seen + len(labels), correct + right, loss_sum + loss * len(labels)
                bar.update()
                if not bar.disable:
                    bar.set_postfix_str(self.progress_text(loss_sum / seen, correct / seen), refresh=False)
        self.seconds += time.perf_counter() - started
        self.epoch += 1
        return loss_sum, correct, seen

    def progress_text(self, loss, accuracy):
        report = self.exchange.report
        sent = training_report.in_bytes(report.sent_bytes)
        ratio = training_report.ratio(report.fp32_bytes, report.sent_bytes)
        return f"loss {loss:.3f}, {100 * accuracy:.1f} %, sent {sent}, {ratio:.0f}x below fp32"

    def test(self):
        """Classify this rank's share of the test set; returns (correct, seen)."""
        # Running statistics of normalisation layers differ between ranks: rank 0's are tested and kept.
        buffers = dict(self.model.named_buffers())
        if buffers:
            hvd.broadcast_parameters(buffers, root_rank=0)
        self.model.eval()
        share = slice(hvd.rank(), None, hvd.size())
        images, labels = self.data.test_images[share], self.data.test_labels[share]
        correct = 0
        with torch.inference_mode():
            for first in range(0, len(images), TEST_BATCH):
                part = slice(first, first + TEST_BATCH)
                correct += (self.model(self.prepared(images[part])).argmax(1) == labels[part]).sum().item()
        return correct, len(images)

    def measured(self, trained):
        """Sum the counts of all ranks and return the epoch's record."""
        # float64 holds counts of images exactly.
        counts = torch.tensor([*trained, *self.test()], dtype=torch.float64)
        counts = hvd.allreduce(counts, op=hvd.Sum, name="counts")
        loss, correct, seen, test_correct, test_seen = counts.tolist()
        report = self.exchange.report.as_dict()
        return {
            "compressor": self.arguments.compressor,
            "world_size": hvd.size(),
            "epoch": self.epoch,
            "step": self.step,
            "gradient_steps": report.pop("steps"),
            "seconds": round(self.seconds, 3),
            "train_loss": loss / max(seen, 1),
            "train_accuracy": correct / max(seen, 1),
            "test_accuracy": test_correct / test_seen,
            "weights": image_training.checksum(self.model),
            **report,
        }


def progress_bar(training):
    """A tqdm bar on rank 0 if it is wanted; else one that shows nothing."""
    from tqdm import tqdm

    choice = training.arguments.progress
    shown = hvd.rank() == 0 and (choice == "bar" or choice == "auto" and sys.stderr.isatty())
    return tqdm(
        total=min(training.steps_per_epoch, training.last_step - training.step),
        desc=f"epoch {training.epoch + 1}/{training.arguments.epochs}",
        unit="step",
        disable=not shown,
        leave=False,
        # horovodrun puts rank and stream before each line, and a line that wraps cannot be redrawn.
        ncols=110,
        mininterval=0.5,
    )


def epoch_line(record, epochs):
    ratio = training_report.ratio(record["fp32_bytes"], record["sent_bytes"])
    sent = f"{training_report.in_bytes(record['sent_bytes'])} ({ratio:.1f}x below fp32)"
    return (
        f"epoch {record['epoch']:>2}/{epochs}  step {record['step']:>5}  loss {record['train_loss']:.4f}  "
        f"train {100 * record['train_accuracy']:.2f} %  test {100 * record['test_accuracy']:.2f} %  "
        f"sent {sent}  {record['seconds']:.1f} s"
    )


def settings(arguments):
    """What a checkpoint records of the arguments, and a resumed run must repeat."""
    return {"world_size": hvd.size(), **{name: getattr(arguments, name) for name in RESUME_MUST_MATCH}}


def write_atomically(path, write):
    """Have `write` fill a file beside `path`, then put it in place in one step."""
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def save(training):
    """Write this epoch's checkpoint: a folder that counts only once `latest` names it.

    Rank 0 writes what is the same on all ranks. Each rank writes what is its own: the error that its
    compressors have still to send, and the state of its random generator.
    """
    root = training.arguments.checkpoint
    folder = root / f"epoch-{training.epoch:03}"
    folder.mkdir(parents=True, exist_ok=True)
    own = {"exchange": training.exchange.state_dict(), "rng": torch.get_rng_state()}
    write_atomically(folder / f"rank-{hvd.rank()}.pt", lambda file: torch.save(own, file))
    if hvd.rank() == 0:
        shared = {
            "settings": settings(training.arguments),
            "epoch": training.epoch,
            "step": training.step,
            "seconds": training.seconds,
            "curve": training.curve,
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "scaler": training.scaler.state_dict(),
        }
        write_atomically(folder / "model.pt", lambda file: torch.save(shared, file))
    hvd.barrier()
    if hvd.rank() == 0:
        write_atomically(root / "latest", lambda file: file.write(f"{folder.name}\n".encode()))
        for other in root.glob("epoch-[0-9]*"):
            if other.name != folder.name:
                shutil.rmtree(other, ignore_errors=True)


def load_file(path):
    try:
        return torch.load(path, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise Refusal(f"--resume: {path} is damaged: {str(error).splitlines()[0]}") from error


def resume(training):
    """Bring `training` to where the checkpoint's run was at the end of its last epoch."""
    root = training.arguments.checkpoint
    if not (root / "latest").is_file():
        raise Refusal(f"--resume: there is no checkpoint in {root} (no file {root / 'latest'})")
    folder = root / (root / "latest").read_text().strip()
    shared = load_file(folder / "model.pt")
    for name, now in settings(training.arguments).items():
        then = shared["settings"].get(name)
        if then != now:
            raise Refusal(f"--resume: {root} was written with {name} {then}, this run has {name} {now}")
    own = load_file(folder / f"rank-{hvd.rank()}.pt")
    training.model.load_state_dict(shared["model"])
    training.optimizer.load_state_dict(shared["optimizer"])
    training.scaler.load_state_dict(shared["scaler"])
    training.exchange.load_state_dict(own["exchange"])
    torch.set_rng_state(own["rng"])
    for name in ("epoch", "step", "seconds", "curve"):
        setattr(training, name, shared[name])


def start(arguments, data):
    """Build the model and the optimizer alike on all ranks, or take them up from the checkpoint."""
    torch.manual_seed(arguments.seed)
    with refused_together():
        model = build_model(arguments.model, data)
        if len(data.train_images) < arguments.batch_size * hvd.size():
            raise Refusal(
                f"{len(data.train_images)} training images are not enough for one step of "
                f"{training_report.in_ranks(hvd.size())} with --batch-size {arguments.batch_size}"
            )
    training = Training(arguments, data, model)
    # From here on each rank draws its own dropout; initial weights are drawn.
    torch.manual_seed(arguments.seed * 1_000_003 + 1 + hvd.rank())
    if arguments.resume:
        with refused_together():
            resume(training)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    # A new optimizer has nothing to broadcast, and Horovod would take a step to give it something.
    if training.optimizer.state_dict()["state"]:
        hvd.broadcast_optimizer_state(training.optimizer, root_rank=0)
    return training


def load_data(arguments):
    with refused_together():
        # One rank of each machine downloads; the others wait for it at the end of this block.
        if hvd.local_rank() == 0:
            image_data.download_if_missing(arguments.dataset, arguments.data)
    with refused_together():
        limits = (arguments.limit_train, arguments.limit_test)
        return image_data.load(arguments.dataset, arguments.data, arguments.image_size, *limits)


def main():
    hvd.init()
    # Ranks that share a machine share its cores; with a thread per core each, they would wait for each other.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // hvd.local_size()))
    with refused_together():
        arguments = parse_arguments()
    data = load_data(arguments)
    training = start(arguments, data)
    first = hvd.rank() == 0
    ranks = training_report.in_ranks(hvd.size())
    title = f"{arguments.model} on {arguments.dataset}, {ranks} of {arguments.batch_size} images"
    log = training_report.Log(arguments.log_file if first else None, training.curve)
    if first:
        numel = sum(parameter.numel() for parameter in training.model.parameters())
        print(f"{title}, {numel} parameters, compressor {arguments.compressor}", flush=True)
        if training.exchange.plan and hvd.size() > 1:
            print(training.exchange.plan, flush=True)
    while training.step < training.last_step:
        record = training.measured(training.train_epoch())
        training.curve.append(record)
        log.write(record)
        if first:
            print(epoch_line(record, arguments.epochs), flush=True)
        if arguments.checkpoint and training.step == training.epoch * training.steps_per_epoch:
            save(training)
    if first and training.curve:
        final = {"final": True, **training.curve[-1], **settings(arguments)}
        log.write(final)
        print(f"\n{training_report.table(final, hvd.size())}", flush=True)
        if arguments.plot:
            training_report.plot(arguments.plot, [training.curve, *arguments.compared], title)
            print(f"plot: {arguments.plot}", flush=True)
    log.close()


if __name__ == "__main__":
    main()
