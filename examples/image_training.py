"""What the examples train, whatever engine carries their gradients: model, batches, schedule and a plain loop."""

import contextlib
import math
import zlib

import torch

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
