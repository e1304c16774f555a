"""What the examples train, whatever engine carries their gradients: model, batches, schedule and a plain loop."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import time
import zlib
from collections.abc import Callable

import torch
from torch.nn import functional

import gcompress
import image_data
from small_cnn import SmallConvNet

WARMUP_FRACTION = 0.05
TEST_BATCH = 500


class ThreeChannels(torch.nn.Module):
    """A torchvision classifier, which expects three channels, given grey or coloured images."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        output = self.network(images.expand(-1, 3, -1, -1))
        # Models with auxiliary classifiers return a tuple while they train.
        return output if torch.is_tensor(output) else output.logits


def build_model(name, data):
    if name == "cnn":
        return SmallConvNet(data.image_shape[0], data.classes)
    from torchvision import models

    if name not in models.list_models(module=models):
        raise ValueError(f"--model {name}: expected cnn or one of torchvision's classifiers, such as resnet18")
    return ThreeChannels(models.get_model(name, weights=None, num_classes=data.classes))


def learning_rate(step, total_steps, peak):
    """A linear warm-up, then a cosine to zero. A function of the step, so a checkpoint need not hold it."""
    warmup = max(1, round(WARMUP_FRACTION * total_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def rank_batches(data, seed, epoch, batch_size, rank, world_size):
    """One rank's batches of an epoch, (uint8 images, labels): its share of one order that all ranks draw alike.

    The order depends on the seed and the epoch alone: runs with different compressors and engines see the
    same images, and a resumed run needs no generator's state.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    count = len(data.train_images)
    order = torch.randperm(count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    steps = count // (batch_size * world_size)
    order = order[: steps * batch_size * world_size].view(steps, world_size, batch_size)
    for index in order[:, rank]:
        images, mirror = data.train_images[index], mirrored[index]
        images[mirror] = images[mirror].flip(3)
        yield images, data.train_labels[index]


@dataclasses.dataclass
class Engine:
    """What the loop below needs of an engine.

    name: for the log. rank, size: this worker and how many there are.
    wrap: (optimizer, model) -> (the optimizer to step, the model to call, a gcompress Report).
    sum: a list of numbers -> their sums over the workers.
    """

    name: str
    rank: int
    size: int
    wrap: Callable
    sum: Callable


def parser(prog, description):
    """The options that the examples on other engines than Horovod have in common."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--compressor", metavar="SPEC|none", default="mask:sparsity=0.99,bits=2", help="default: %(default)s")
    add("--min-numel", type=int, default=1024, help="smaller tensors go uncompressed (%(default)s)")
    add("--no-error-feedback", dest="error_feedback", action="store_false", help="forget what was not sent")
    add("--data", metavar="PATH", help="folder of Fashion-MNIST")
    add("--limit-train", type=int, metavar="N", help="use the first N training images only")
    add("--limit-test", type=int, metavar="N", help="use the first N test images only")
    add("--epochs", type=int, default=10, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="images per worker and step (%(default)s)")
    add("--lr", type=float, default=0.1, help="peak learning rate (%(default)s)")
    add("--momentum", type=float, default=0.9, help="default: %(default)s")
    add("--weight-decay", type=float, default=1e-4, help="default: %(default)s")
    add("--seed", type=int, default=1, help="of initial weights and batches (%(default)s)")
    add("--log-file", metavar="FILE", help="write a JSON line for each epoch")
    add_amp(add)
    return parser


def add_amp(add):
    """The options of mixed precision, which all examples have."""
    add("--amp", choices=("none", "fp16"), default="none", help="scale the loss as for float16 (%(default)s)")
    add(
        "--overflow-at",
        type=int,
        nargs="+",
        default=[],
        metavar="STEP",
        help="for tests: one rank's gradients overflow at these steps, which are skipped and repeated",
    )


def loss_scaler(arguments):
    """torch's scaler for --amp; without it one that does nothing.

    It scales the loss, skips steps that overflow, and changes its scale. The examples run on the CPU, whose
    arithmetic stays float32; on a GPU the forward pass would be under torch.autocast besides.
    """
    return torch.amp.GradScaler("cpu", enabled=arguments.amp == "fp16", growth_interval=5)


def take_step(optimizer, scaler, loss_of, overflows=False):
    """One step with a loss scaler; returns what `loss_of` did.

    Args:
        optimizer: any engine's.
        scaler: from `loss_scaler`.
        loss_of: function without arguments that returns a tuple that begins with the loss.
        overflows: make this attempt overflow.
    """
    optimizer.zero_grad()
    results = loss_of()
    scaler.scale(results[0] * (math.inf if overflows else 1.0)).backward()
    # Horovod, MPI and BytePS exchange before the scaler looks for overflows; DDP has exchanged already.
    if hasattr(optimizer, "synchronize"):
        optimizer.synchronize()
    scaler.unscale_(optimizer)
    with getattr(optimizer, "skip_synchronize", contextlib.nullcontext)():
        scaler.step(optimizer)
    scaler.update()
    return results


def step_of(optimizer, scaler, loss_of, step, rank, arguments):
    """`take_step`, and before it a step that overflows on rank 0 alone where --overflow-at asks for that."""
    if step in arguments.overflow_at:
        with torch.random.fork_rng():  # the same dropout once more
            take_step(optimizer, scaler, loss_of, overflows=rank == 0)
    return take_step(optimizer, scaler, loss_of)


def checksum(model):
    """A number that differs for other weights, to the bit."""
    return zlib.crc32(b"".join(p.detach().contiguous().numpy().tobytes() for p in model.parameters()))


def policy_of(arguments):
    """What the plugins take as `compression`; None for "none"."""
    if arguments.compressor == "none":
        return None
    return gcompress.Policy(
        arguments.compressor,
        min_numel=arguments.min_numel,
        error_feedback=None if arguments.error_feedback else False,
    )


def train(engine, arguments, *, optimizer_momentum=None):
    """Train the CNN on Fashion-MNIST on one worker; returns the last epoch's record.

    optimizer_momentum: where the engine keeps the momentum, 0.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // engine.size))
    data = image_data.load("fashion-mnist", arguments.data, None, arguments.limit_train, arguments.limit_test)
    torch.manual_seed(arguments.seed)
    model = build_model("cnn", data)
    momentum = arguments.momentum if optimizer_momentum is None else optimizer_momentum
    optimizer = torch.optim.SGD(
        model.parameters(), lr=arguments.lr, momentum=momentum, weight_decay=arguments.weight_decay
    )
    optimizer, model, report = engine.wrap(optimizer, model)
    # From here on each worker draws its own dropout; initial weights are drawn.
    torch.manual_seed(arguments.seed * 1_000_003 + 1 + engine.rank)
    total_steps = len(data.train_images) // (arguments.batch_size * engine.size) * arguments.epochs
    scaler = loss_scaler(arguments)
    step, record, started = 0, None, time.perf_counter()
    if engine.rank == 0 and arguments.log_file:
        pathlib.Path(arguments.log_file).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(arguments.log_file).write_text("")
    for epoch in range(arguments.epochs):
        model.train()
        loss_sum, seen = 0.0, 0
        for images, labels in rank_batches(data, arguments.seed, epoch, arguments.batch_size, engine.rank, engine.size):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, arguments.lr)

            def loss_of(images=images, labels=labels):
                return (functional.cross_entropy(model(data.normalised(images)), labels),)

            (loss,) = step_of(optimizer, scaler, loss_of, step, engine.rank, arguments)
            step, seen, loss_sum = step + 1, seen + len(labels), loss_sum + loss.item() * len(labels)
        totals = engine.sum([loss_sum, seen, *tested(model, data, engine)])
        record = {
            "engine": engine.name,
            "compressor": arguments.compressor,
            "world_size": engine.size,
            "epoch": epoch + 1,
            "step": step,
            "seconds": round(time.perf_counter() - started, 3),
            "train_loss": totals[0] / max(totals[1], 1),
            "test_accuracy": totals[2] / totals[3],
            "weights": checksum(model),
            **report.as_dict(),
        }
        if engine.rank == 0:
            show(record, arguments)
    return record


def tested(model, data, engine):
    """(correct, seen) of this worker's share of the test set."""
    model.eval()
    share = slice(engine.rank, None, engine.size)
    images, labels = data.test_images[share], data.test_labels[share]
    correct = 0
    with torch.inference_mode():
        for first in range(0, len(images), TEST_BATCH):
            part = slice(first, first + TEST_BATCH)
            correct += (model(data.normalised(images[part])).argmax(1) == labels[part]).sum().item()
    return correct, len(images)


def show(record, arguments):
    """One line of an epoch, and one of the log."""
    sent = record["sent_bytes"] // max(record["step"], 1)
    print(
        f"epoch {record['epoch']:>2}/{arguments.epochs}  step {record['step']:>5}  loss {record['train_loss']:.4f}  "
        f"test {100 * record['test_accuracy']:.2f} %  sent {sent:,} bytes a step ({record['ratio']:.1f}x below "
        f"fp32)  {record['seconds']:.1f} s",
        flush=True,
    )
    if arguments.log_file:
        with open(arguments.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
