"""The kernels' sources (csrc/cuda/) as NVRTC takes them: one text a module, its includes in it."""

import functools
import pathlib
import re

# No fused multiply-add and nothing approximate: bytes must be those of the CPU.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")


def folder():
    """The folder that holds cuda/ and arith/: csrc/ of a checkout, or its copy in the installed package."""
    package = pathlib.Path(__file__).resolve().parents[2]
    installed, checkout = package / "csrc", package.parent / "csrc"
    return installed if installed.is_dir() else checkout


def modules():
    """The names of all modules, csrc/cuda/MODULE.cu."""
    return sorted(path.stem for path in (folder() / "cuda").glob("*.cu"))


@functools.cache
def source(module):
    """The text of csrc/cuda/MODULE.cu with each of its headers in the place of its first include.

    CuPy keeps what it compiled by its text alone, so headers must be part of it.
    """
    included = set()

    def text_of(path):
        if path in included:
            return ""
        included.add(path)
        parts = [f'#line 1 "{path.name}"']
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            name = re.fullmatch(r'#include "(.+)"', line)
            if name and name[1] != "emulator.h":
                parts += [text_of((path.parent / name[1]).resolve()), f'#line {number + 1} "{path.name}"']
            elif not line.startswith("#include"):
                parts.append(line)
        return "\n".join(parts)

    return text_of((folder() / "cuda" / f"{module}.cu").resolve())
