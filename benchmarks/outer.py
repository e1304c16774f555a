#!/usr/bin/env python3
"""Outer steps at equal bytes: validation loss of a language model, method against method in one run.

    python benchmarks/outer.py                                            # the table of docs/OUTER.md, 40 minutes
    python benchmarks/outer.py --every 15 --seeds 1 --methods none "topk:sparsity=0.99"
    python benchmarks/outer.py --rate 100mbit 20mbit --methods ddp-fp16 "polar:rate=0.25"

Ranks on this machine (torchrun, Gloo) train the byte-level transformer of examples/train_lm.py on the sources of
Python's standard library. A method is what travels between outer steps: a policy, or `none`, and behind an
@ the outer optimizer's options if it does not average: `none @ lr=0.7,momentum=0.9`. `ddp` and `ddp-fp16` have no
outer steps: DistributedDataParallel's gradients at each step. Runs of one seed begin with the same weights and see the
same text. Printed are the validation loss at the end in nats a byte, the highest that it rose in the later half of
the rounds above a round before, and the bits that a rank handed over for each entry and exchange: of the matrices
that are compressed, and of the whole model.

With --rate all ranks share a link of that rate in a network namespace (Linux, root; tools/slow_link.py), and each
method's tokens per second over all ranks are printed, and how many times those of `ddp-fp16` that is.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
SPARSELOCO = f"chain:(topk:sparsity={1 - 64 / 4096},chunk=4096,index=places),(binmean:bits=2)"
# In its bytes, since places are coded, not written out, and signs in 0.4 of them and in 0.2.
MORE = f"chain:(topk:sparsity={1 - 88 / 4096},chunk=4096),(binmean:bits=2); mean=senders; feedback_decay=0.8"
SIGNS = "chain:(topk:sparsity={},chunk=4096),(sign:bucket=0); mean=senders; feedback_decay=0.8"
POLAR = "polar:rate={},rank=0,floor=0; exchange=turns @ lr=0.7,momentum=0.5"
METHODS = [
    "none",
    f"{SPARSELOCO}; feedback_decay=0.95",
    *(f"{SPARSELOCO}; mean=senders; feedback_decay={decay}" for decay in (0.95, 0.8)),
    MORE,
    *(SIGNS.format(1 - kept / 4096) for kept in (64, 37, 16)),
    *(POLAR.format(rate) for rate in (0.875, 0.219)),  # a rank sends a fourth of the entries
]
PLAIN = ("ddp", "ddp-fp16")  # without outer steps


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--every", type=int, nargs="+", default=[5, 15, 50], help="inner steps of a round")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each method and round length (default 2)")
    parser.add_argument("--steps", type=int, default=300, help="inner steps, at least 8 rounds (default 300)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a rank and step (default 8)")
    parser.add_argument("--size", default="tiny", help="of the model, as of train_lm.py (default tiny)")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="METHOD")
    parser.add_argument("--rate", nargs="+", help="of the link that all ranks share, such as 20mbit: print speed")
    parser.add_argument("--json", metavar="FILE", help="also write each row to this file, as it is there")
    parser.add_argument("--plot", metavar="FILE", help="draw loss against bits, or speed against methods")
    parser.add_argument("--rank", nargs=2, metavar=("RATE", "FILE"), help=argparse.SUPPRESS)  # what a rank trains
    arguments = parser.parse_args()
    if min(arguments.ranks, arguments.seeds, arguments.steps, arguments.batch, *arguments.every) < 1:
        parser.error("--ranks, --every, --seeds, --steps, --batch: expected at least 1")
    return arguments


def launch(arguments):
    from slow_link import link_tool

    tool, rows = link_tool(), []
    if arguments.rate and tool.missing():
        sys.exit(f"outer.py: error: {tool.missing()}")
    for rate in arguments.rate or ["none"]:
        with tempfile.TemporaryDirectory() as folder:
            figures = pathlib.Path(folder) / "figures.jsonl"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={arguments.ranks}", *sys.argv, "--rank", rate, str(figures)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            if rate == "none":
                ended = subprocess.run(command, env=environment).returncode
            else:
                with tool.namespace(rate) as enter:
                    ended = subprocess.run([*enter, *command], env=environment).returncode
            if ended:
                sys.exit(ended)
            rows += map(json.loads, figures.read_text().splitlines())
    if arguments.plot:
        plot(arguments, rows)


class Run:
    """One method's training on one rank."""

    def __init__(self, arguments, text, method, every, seed):
        import gcompress.plugins.ddp as plugin
        import torch
        import torch.distributed as dist

        import gcompress
        import language_model

        self.arguments, self.text, self.method, self.every, self.seed = arguments, text, method, every, seed
        self.rank, self.size, self.losses = dist.get_rank(), dist.get_world_size(), []
        torch.manual_seed(seed)
        self.model = self.network = language_model.ByteTransformer(language_model.SIZES[arguments.size])
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.1)
        if method in PLAIN:
            self.network = torch.nn.parallel.DistributedDataParallel(self.model)
            rule = "fp16:bucket=0" if method == "ddp-fp16" else None
            self.exchange = plugin.register(self.network, gcompress.Policy(rule, min_numel=1)).exchange
            self.optimizer = self.inner
        else:
            policy, _, options = (part.strip() for part in method.partition("@"))
            options = {
                key: float(value) for key, _, value in (each.partition("=") for each in options.split(",") if each)
            }
            policy = None if policy == "none" else policy
            engine = plugin.engine()
            self.optimizer = gcompress.OuterOptimizer(self.inner, self.model, engine, policy, every=every, **options)
            self.exchange = self.optimizer.exchange

    def step(self, number, steps):
        """One step, with a warm-up of the learning rate and a cosine after it."""
        import language_data
        import language_model
        from image_training import learning_rate

        arguments = self.arguments
        for group in self.inner.param_groups:
            group["lr"] = learning_rate(number, steps, 2e-3)
        context = self.model.shape.context
        batch = language_data.training_batch(self.text, context, arguments.batch, self.seed, self.rank, number)
        self.inner.zero_grad()
        language_model.loss_of(self.network, batch).backward()
        self.optimizer.step()

    def validate(self):
        import torch
        import torch.distributed as dist

        import language_data
        import language_model

        share = language_data.validation_share(self.text, self.model.shape.context, 512, self.rank, self.size)
        with torch.no_grad():
            total = language_model.loss_of(self.model, share).double() * len(share)
        figures = torch.tensor([total, len(share)], dtype=torch.float64)
        dist.all_reduce(figures)
        self.losses.append(float(figures[0] / figures[1]))

    def train(self):
        """All steps, validated after every round; returns the row."""
        from language_model import numel

        steps = max(self.arguments.steps, 8 * self.every)
        seldom = self.every * max(1, steps // self.every // 20)  # about 20 times, each right after an exchange
        for number in range(steps):
            self.step(number, steps)
            if (number + 1) % seldom == 0:
                self.validate()
        if self.method not in PLAIN:
            self.optimizer.finish()
        self.validate()
        report, later = self.exchange.report, self.losses[len(self.losses) // 2 :]
        rises = [after - before for before, after in zip(later, later[1:], strict=False)]
        return {
            "method": self.method,
            "every": self.every,
            "seed": self.seed,
            "loss": self.losses[-1],
            "rise": max(0.0, *rises),
            "bits": self.bits_of_matrices(),
            "bits_of_all": 8 * report.sent_bytes / report.steps / numel(self.model),
            "sent": report.sent_bytes,
            "losses": self.losses,
        }

    def bits_of_matrices(self):
        """Bits handed over for an entry of what is compressed, the mean over ranks."""
        entries = [entry for entry in self.exchange.plan.entries.values() if entry.compressor]
        sizes = [
            sum(entry.compressor.nbytes(piece.numel) for piece in entry.pieces) / self.size
            if entry.exchange == "turns"
            else entry.compressor.nbytes(entry.numel)
            for entry in entries
        ]
        return 8 * sum(sizes) / sum(entry.numel for entry in entries) if entries else 32.0

    def tokens_per_second(self, rounds=3):
        """Over all ranks, in some rounds after a first one."""
        import torch.distributed as dist

        steps = self.every if self.method not in PLAIN else 1
        for number in range(steps):
            self.step(number, 1000)
        dist.barrier()
        begun, sent = time.perf_counter(), self.exchange.report.sent_bytes
        for number in range(rounds * steps):
            self.step(number, 1000)
        dist.barrier()
        seconds = time.perf_counter() - begun
        tokens = self.size * rounds * steps * self.arguments.batch * self.model.shape.context
        return {
            "method": self.method,
            "every": self.every,
            "tokens": tokens / seconds,
            "step": seconds / rounds / steps,
            "sent": (self.exchange.report.sent_bytes - sent) / rounds / steps,
        }


def rank(arguments):
    import datetime

    import torch
    import torch.distributed as dist

    import language_data
    import language_model

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=10))
    rate, path = arguments.rank
    text = language_data.load(None, language_model.SIZES[arguments.size].context)
    first, fp16 = dist.get_rank() == 0, None
    if first and rate == "none":
        print(f"{'H':>3} {'seed':>4} {'loss':>7} {'rise':>6} {'bits':>7} {'of all':>7}  method", flush=True)
    elif first:
        print(f"{rate}\n{'H':>3} {'tokens/s':>9} {'s a step':>9} {'bytes':>9} {'x fp16':>7}  method", flush=True)
    for every in arguments.every:
        for method in arguments.methods:
            if method in PLAIN and every != arguments.every[0]:
                continue
            for seed in range(arguments.seeds if rate == "none" else 1):
                run = Run(arguments, text, method, every, seed)
                row = {"rate": rate, **(run.train() if rate == "none" else run.tokens_per_second())}
                if not first:
                    continue
                if rate == "none":
                    line = f"{every:3} {seed:4} {row['loss']:7.4f} {row['rise']:6.3f} {row['bits']:7.3f}"
                    line += f" {row['bits_of_all']:7.3f}"
                else:
                    fp16 = row["tokens"] if method == "ddp-fp16" else fp16
                    times = f"{row['tokens'] / fp16:7.1f}" if fp16 else f"{'':7}"
                    line = f"{every:3} {row['tokens']:9.0f} {row['step']:9.3f} {row['sent']:9.0f} {times}"
                print(f"{line}  {method}", flush=True)
                for file in filter(None, (path, arguments.json)):
                    with open(file, "a") as lines:
                        lines.write(json.dumps(row) + "\n")
    dist.destroy_process_group()


def label(method):
    """What a figure calls it."""
    name = method.partition(" @")[0]
    if name.startswith("chain:"):
        what = "SparseLoCo's coder" if "places" in name else "signs" if "(sign" in name else "more entries"
        decay = name.partition("feedback_decay=")[2]
        return f"{what}, mean of {'senders' if 'senders' in name else 'ranks'}{decay and f', decay {decay}'}"
    return "polar in turns" if name.startswith("polar") and "turns" in name else name.partition(":")[0]


def plot(arguments, rows):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(arguments.every), figsize=(4.5 * len(arguments.every), 4), squeeze=False)
    for axis, every in zip(axes[0], arguments.every, strict=True):
        of_round = [row for row in rows if row["every"] == every and row["method"] not in PLAIN]
        for name in dict.fromkeys(label(row["method"]) for row in of_round):
            points = sorted((row["bits"], row["loss"]) for row in of_round if label(row["method"]) == name)
            if name == "none":
                loss = sum(loss for _, loss in points) / len(points)
                axis.axhline(loss, linestyle="--", color="gray", label="not compressed")
            else:
                axis.plot(*zip(*points, strict=True), "o", label=name)
        axis.set(title=f"{every} steps a round", xlabel="bits an entry and exchange", ylabel="validation loss, nats")
        axis.set_xscale("log")
        axis.set_xticks([0.05, 0.1, 0.2], ["0.05", "0.1", "0.2"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    figure.legend(handles, names, loc="lower center", ncols=3)
    figure.savefig(arguments.plot, dpi=120)
    print(f"plot: {arguments.plot}")


if __name__ == "__main__":
    given = parse()
    rank(given) if given.rank else launch(given)
