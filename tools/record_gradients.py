#!/usr/bin/env python3
"""Record real gradients, layer by layer with their shapes, into one .npz file for benchmarks and tests of codecs.

Two networks are trained in one process: the convolutional network of examples/train.py on Fashion-MNIST
(`make data` fetches it), and a byte-level transformer language model of 1.7 million parameters on the source files
of Python's standard library, which are on every machine that runs this. At an early, a middle and the last step the
gradient of every layer is kept: of one batch of one rank, as a compressor would meet it.

    python tools/record_gradients.py                         # runs/gradients.npz, some minutes
    python tools/record_gradients.py --networks cnn --steps 600

Keys of the file are NETWORK/PHASE/LAYER, for example "transformer/late/blocks.0.linear1.weight"; each holds float32
of the layer's own shape (rows are outputs). `load` reads them back.
"""

import argparse
import pathlib
import sys
import sysconfig
import time

import numpy as np
import torch
from torch.nn import functional

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
DEFAULT_PATH = REPOSITORY / "runs" / "gradients.npz"
PHASES = ("early", "middle", "late")
CONTEXT = 128  # bytes of one sequence
BATCH = {"cnn": 64, "transformer": 16}
# Steps of the whole training by default; early is 1 % of them, middle a third.
STEPS = {"cnn": 3000, "transformer": 600}


class ByteTransformer(torch.nn.Module):
    """A causal language model on bytes: two layers of width 256, four heads each, 1.7 million parameters."""

    def __init__(self, width=256, layers=2, heads=4):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, width)
        self.position = torch.nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = torch.nn.LayerNorm(width)
        self.output = torch.nn.Linear(width, 256, bias=False)

    def forward(self, tokens):
        """Tokens (batch, CONTEXT) int64 to logits (batch, CONTEXT, 256)."""
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        state = self.embedding(tokens) + self.position
        for block in self.blocks:
            state = block(state, src_mask=mask, is_causal=True)
        return self.output(self.norm(state))


def cnn_training(total_steps):
    """The network and data of examples/train.py: (model, optimizer, loss of the next batch, peak rate)."""
    sys.path.insert(0, str(REPOSITORY / "examples"))
    import image_data
    from train import build_model

    data = image_data.load("fashion-mnist")
    model = build_model("cnn", data)
    order = torch.cat([torch.randperm(len(data.train_images)) for _ in range(1 + total_steps * BATCH["cnn"] // 60000)])
    batches = iter(order.split(BATCH["cnn"]))

    def loss():
        index = next(batches)
        return functional.cross_entropy(model(data.normalised(data.train_images[index])), data.train_labels[index])

    return model, torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4), loss, 0.05


def transformer_training(total_steps):
    """Next-byte prediction on the standard library's top-level source files; as above."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    model = ByteTransformer()

    def loss():
        starts = torch.randint(0, len(tokens) - CONTEXT - 1, (BATCH["transformer"],))
        rows = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts.tolist()]).long()
        return functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return model, torch.optim.AdamW(model.parameters(), lr=0.0), loss, 1e-3


TRAININGS = {"cnn": cnn_training, "transformer": transformer_training}


def recorded_steps(total_steps):
    """{step: phase} of the steps, counted from 0, whose gradients are kept."""
    last = total_steps - 1
    return dict(zip((min(last, max(1, total_steps // 100)), total_steps // 3, last), PHASES, strict=True))


def record(network, total_steps, seed=1):
    """Train a network and return {key: float32 array} of its gradients (see the module)."""
    torch.manual_seed(seed)
    model, optimizer, next_loss, peak = TRAININGS[network](total_steps)
    wanted, arrays = recorded_steps(total_steps), {}
    started, mean = time.perf_counter(), 0.0
    for step in range(total_steps):
        for group in optimizer.param_groups:  # a short warm-up, then down to zero
            group["lr"] = peak * min((step + 1) / (0.05 * total_steps), (total_steps - step) / (0.95 * total_steps))
        optimizer.zero_grad()
        loss = next_loss()
        loss.backward()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if step in wanted:
            for name, parameter in model.named_parameters():
                arrays[f"{network}/{wanted[step]}/{name}"] = parameter.grad.numpy().copy()
            seconds = time.perf_counter() - started
            print(f"{network}: {wanted[step]}, step {step}, mean loss {mean:.3f}, {seconds:.0f} s", flush=True)
        optimizer.step()
    return arrays


def write(path, networks=tuple(TRAININGS), steps=None, seed=1):
    """Train the networks, each for `steps` or its own default, and write their gradients to a file."""
    arrays = {}
    for network in networks:
        arrays.update(record(network, steps or STEPS[network], seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    print(f"{path}: {len(arrays)} gradients, {sum(array.nbytes for array in arrays.values()) / 1e6:.1f} MB", flush=True)


def load(path=DEFAULT_PATH):
    """{network: {phase: {layer: float32 tensor of the layer's shape}}} of a file that `main` wrote."""
    gradients = {}
    with np.load(path) as file:
        for key in file.files:
            network, phase, layer = key.split("/", 2)
            gradients.setdefault(network, {}).setdefault(phase, {})[layer] = torch.from_numpy(file[key])
    return gradients


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=DEFAULT_PATH, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--networks", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="default: all")
    parser.add_argument("--steps", type=int, metavar="N", help=f"steps of each training (default: {STEPS})")
    parser.add_argument("--seed", type=int, default=1, help="of weights and batches (%(default)s)")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 6:
        parser.error(f"--steps: got {arguments.steps}, expected at least 6, or the phases coincide")
    write(arguments.out, arguments.networks, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
