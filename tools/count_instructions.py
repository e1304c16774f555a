"""Counts the instructions that kernels execute for an entry, under QEMU, on x86-64 and on 64-bit ARM.

    python tools/count_instructions.py                          # the table in docs/PLATFORMS.md
    python tools/count_instructions.py --isas avx2 --compressors quantize:bits=2

Needs a checkout with its kernels built and Debian's qemu-user; the columns for ARM also g++-aarch64-linux-gnu, and ten
minutes of one core for the first build, which is kept in build/foreign/. What a column lacks is said on stderr, and the
others are printed.

A kernel is run twice with the same arguments. The second run is counted, from one system call to the next.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from gcompress import backends, from_spec  # noqa: E402

try:
    from tests import foreign_kernels
except ImportError:
    sys.exit("count_instructions: needs a checkout, of which it takes tests/foreign_kernels.py")

# The columns: the processor of each, and the instruction set's name there.
ISAS = {"avx2": ("x86_64", "avx2"), "portable": ("x86_64", "portable")}
ISAS |= {"neon": ("aarch64", "neon"), "portable-arm": ("aarch64", "portable")}
COMPRESSORS = ("quantize:bits=4", "sign", "mask:sparsity=0.99,bits=2", "topk:sparsity=0.99")
ARM = {"portable": [], "neon": ["-DGC_NEON"]}  # the flags of each, as in tests/test_aarch64.py


def emulator_of(processor):
    """The command of the emulator, told to write a line for each instruction."""
    found = shutil.which(f"qemu-{processor}") or shutil.which(f"qemu-{processor}-static")
    if not found:
        raise FileNotFoundError(f"there is no qemu-{processor} (Debian: apt-get install qemu-user)")
    options = subprocess.run([found, "--help"], capture_output=True, text=True).stdout
    each = "-one-insn-per-tb" if "-one-insn-per-tb" in options else "-singlestep"  # as it was called before QEMU 8.1
    return [found, "-cpu", "max", each, "-d", "exec,nochain,strace", "-D"]


def program_of(processor):
    """The path of the program that runs kernels for this process, built for a processor."""
    if processor == "x86_64":  # by the library of this checkout
        return foreign_kernels.built_around(pathlib.Path(backends.__file__).parent.parent / "_native.so")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if not compiler:
        raise FileNotFoundError("there is no aarch64-linux-gnu-g++ (Debian: apt-get install g++-aarch64-linux-gnu)")
    return foreign_kernels.built_for(compiler, ARM)


def instructions(command, work):
    """How many the kernels execute that `work` calls, which gets them."""
    found = [0]

    def count():  # from each odd call of getppid to the next one
        counting = False
        with open(log, "rb") as lines:
            for line in lines:
                counting ^= b"getppid(" in line
                found[0] += counting

    (*emulator, (program, isa)) = command
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log")
        os.mkfifo(log)  # it may be gigabytes
        reader = threading.Thread(target=count, daemon=True)
        reader.start()
        with foreign_kernels.ForeignKernels([*emulator, log, program, isa, "twice"]) as kernels:
            with backends.use_backend(kernels):
                work()
        reader.join()
    return found[0]


def counts(command, spec, numel):
    """Instructions for an entry of (encoding, decoding)."""
    compressor, tensor = from_spec(spec), torch.randn(numel, generator=torch.Generator().manual_seed(0))
    payload, context = compressor.compress(tensor, seed=0)
    works = (lambda: compressor.compress(tensor, seed=0)), (lambda: compressor.decompress(payload, context))
    return [instructions(command, work) / numel for work in works]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--isas", nargs="+", choices=ISAS, default=list(ISAS), help="columns")
    parser.add_argument("--compressors", nargs="+", default=COMPRESSORS, metavar="SPEC", help="rows, two for each")
    parser.add_argument("--numel", type=int, default=32768, help="entries of the tensor")
    options = parser.parse_args()
    commands = {}
    for name in options.isas:
        processor, isa = ISAS[name]
        try:
            commands[name] = *emulator_of(processor), (program_of(processor), isa)
        except FileNotFoundError as lacking:
            print(f"count_instructions: no {name}: {lacking}", file=sys.stderr)
    if not commands:
        sys.exit(1)
    print(f"| instructions an entry of {options.numel:,} | " + " | ".join(f"`{name}`" for name in commands) + " |")
    print("|---" * (1 + len(commands)) + "|")
    for spec in options.compressors:
        columns = [counts(command, spec, options.numel) for command in commands.values()]
        for what, row in zip(("encode", "decode"), zip(*columns, strict=True), strict=True):
            print(f"| {spec}, {what} | " + " | ".join(f"{value:.2f}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()
