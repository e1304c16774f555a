#!/usr/bin/env python3
"""The same training on every engine: Horovod, DDP, MPI parameter servers and BytePS, in one table.

Each trains the examples' CNN on Fashion-MNIST with the same compressor, seed, batches and
schedule on the same number of workers; the table has each one's test accuracy and counted bytes
of one worker and step: handed to the engine, and leaving the worker on the wire. An engine that
is not installed is left out, saying so.

    python benchmarks/engines.py
    python benchmarks/engines.py --compressor topk:sparsity=0.99 --epochs 10 --workers 4
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"
TIMEOUT_SECONDS = 3600


def commands(workers, servers):
    """{engine: (the module it needs, how to install that, its command line but the example's options)}"""
    here = pathlib.Path(sys.executable).parent
    mpirun = shutil.which("mpirun", path=f"{here}{os.pathsep}{os.environ['PATH']}") or "mpirun"
    launch = [sys.executable, "-m", "gcompress.plugins.byteps.launch"]
    return {
        "Horovod": (
            "horovod",
            "python tools/build_horovod.py",
            [sys.executable, "-m", "horovod.runner.launch", "-np", str(workers), "--gloo"]
            + [sys.executable, str(EXAMPLES / "train.py")],
        ),
        "DDP": (
            "gcompress.plugins.ddp",
            "pip install -e .",
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
            + [str(EXAMPLES / "train.py")],
        ),
        "MPI servers": (
            "mpi4py",
            "python tools/install_mpi.py",
            [mpirun, "-np", str(workers + servers), sys.executable, str(EXAMPLES / "train.py")]
            + ["--servers", str(servers)],
        ),
        "BytePS": (
            "byteps",
            "python tools/build_byteps.py",
            [*launch, "-np", str(workers), "--servers", str(servers)] + [sys.executable, str(EXAMPLES / "train.py")],
        ),
    }


def measure(command, options, folder):
    """Run one engine; returns the last epoch's record."""
    log = folder / "log.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *options, "--log-file", str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.terminate()  # every launcher then ends its ranks
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}\n{output[-4000:]}")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record for record in records if not record.get("final")][-1]


def row(engine, record):
    steps = record["step"]
    return (
        f"| {engine:<11} | {100 * record['test_accuracy']:>11.2f} % | {record['sent_bytes'] // steps:>18,} "
        f"| {record['fp32_bytes'] / record['sent_bytes']:>12.1f}x | {record['wire_bytes'] // steps:>18,} "
        f"| {record['seconds']:>8.0f} s |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compressor", default="mask:sparsity=0.99,bits=2", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--servers", type=int, default=2, help="of MPI and BytePS (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--limit-train", type=int, metavar="N", help="use the first N training images only")
    parser.add_argument("--engines", nargs="+", help="leave out the others")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = ["--compressor", arguments.compressor, "--epochs", str(arguments.epochs), "--seed", str(arguments.seed)]
    options += ["--limit-train", str(arguments.limit_train)] if arguments.limit_train else []
    print(f"{arguments.compressor}, {arguments.workers} workers, {arguments.epochs} epochs, seed {arguments.seed}\n")
    print("| engine      | test accuracy | bytes handed over | against fp32 | bytes on the wire | training   |")
    print("|---|---|---|---|---|---|", flush=True)
    accuracies = []
    for engine, (module, how, command) in commands(arguments.workers, arguments.servers).items():
        if arguments.engines and engine not in arguments.engines:
            continue
        if importlib.util.find_spec(module) is None:
            print(f"| {engine:<11} | left out: {module} is not installed ({how}) |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder:
            record = measure(command, options, pathlib.Path(folder))
        accuracies.append(100 * record["test_accuracy"])
        print(row(engine, record), flush=True)
    if len(accuracies) > 1:
        print(f"\nlargest difference of accuracies: {max(accuracies) - min(accuracies):.2f} points")


if __name__ == "__main__":
    main()
