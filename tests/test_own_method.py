"""A method is one file, whether it is new in compressors/ or another package brings it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests import emulation
from tests.launching import REPOSITORY

TOY = REPOSITORY / "tests" / "toy"
MODULE, KERNELS = pathlib.Path("gcompress", "compressors", "toy.py"), pathlib.Path("csrc", "kernels.def")
COPIED = ("gcompress", "csrc", "tests", "benchmarks", "tools", "docs", "pyproject.toml")


def python(folder, *arguments, **environment):
    """What Python prints that finds the packages of a folder before all others; the test fails if it does."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with the toy in compressors/."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        path = REPOSITORY / name
        ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
        shutil.copytree(path, folder / name, ignore=ignored) if path.is_dir() else shutil.copy(path, folder)
    shutil.copy(TOY / "toy.py", folder / "gcompress" / "compressors")
    return folder


@pytest.fixture(scope="module")
def golden(checkout):
    """The golden payloads after the one command that writes them."""
    before = json.loads((checkout / "tests" / "golden" / "version-1.json").read_text())
    python(checkout, "-m", "tests.test_golden")
    after = json.loads((checkout / "tests" / "golden" / "version-1.json").read_text())
    assert {name: after[name] for name in before} == before
    return after


def check_laws(folder):
    """Run the laws on the toy, on every backend; they must run."""
    laws = ["tests/test_compressor_laws.py", "tests/test_extremes.py", "tests/test_golden.py"]
    chosen = "toy and not sixteen_million"
    said = python(folder, "-m", "pytest", "-q", "-k", chosen, "-p", "no:cacheprovider", *laws, TEST_METHOD="toy")
    assert int(said.split(" passed")[0].split()[-1]) > 20


def test_one_file_is_a_method(checkout, golden):
    assert set(golden["toy"]) == {"payload", "decoded"}
    check_laws(checkout)
    python(checkout, "-m", "pytest", "-q", "--doctest-modules", checkout / "gcompress" / "compressors" / "toy.py")


def test_it_is_in_the_benchmark_the_doctor_and_the_readme(checkout):
    said = python(checkout, "benchmarks/compressors.py", "--numel", 5000, "--repeat", 1, "--backends", "portable")
    assert re.search(r"^toy +portable +8\.006", said, re.MULTILINE) and "reference is in use" in said
    said = python(checkout, "-m", "gcompress.cli", "doctor")
    assert "by the torch reference: toy" in said
    python(checkout, "tools/method_table.py")
    assert "| `toy` | `Toy` | A signed byte for every entry" in (checkout / "docs" / "METHODS.md").read_text()


@pytest.mark.skipif(not emulation.COMPILER, reason="building kernels needs a C++ compiler")
def test_a_block_of_kernels_def_and_two_headers_make_it_native(checkout, golden, tmp_path):
    folder = tmp_path / "checkout"
    shutil.copytree(checkout, folder)
    for part in ("arith", "cpu"):
        shutil.copy(TOY / f"{part}_toy.h", folder / "csrc" / part / "toy.h")
    for target, addition in ((KERNELS, "kernels.def"), (MODULE, "native.txt")):
        with open(folder / target, "a") as file:
            file.write((TOY / addition).read_text())
    said = python(folder, "-c", "import gcompress; print(gcompress.backends.backend())")
    assert "has other kernels than csrc/kernels.def lists: build it again" in said and said.startswith("reference\n")
    sources, flags = ["csrc/dispatch.cc", "csrc/kernels.cc"], ["-std=c++17", "-O0", "-fPIC", "-ffp-contract=off"]
    command = [emulation.COMPILER, *flags, "-DGC_ISA=portable", "-shared", "-o", "gcompress/_native.so", *sources]
    subprocess.run(command, cwd=folder, check=True)
    program = (
        "from gcompress import backends, from_spec\nprint(backends.provides(backends.cpu_kernels(), from_spec('toy')))"
    )
    assert python(folder, "-c", program) == "True\n"
    check_laws(folder)


def test_another_package_brings_a_method(tmp_path):
    shutil.copy(TOY / "toy.py", tmp_path / "toy_package.py")
    about = tmp_path / "toy_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[gcompress.compressors]\ntoy = toy_package:Toy\nlost = nowhere:Lost\n")
    program = """
import torch, gcompress
assert gcompress.from_spec("topk:sparsity=0.9").sparsity == 0.9 and "toy" not in __import__("sys").modules
compressor = gcompress.from_spec("toy")
payload, context = compressor.compress(torch.ones(1000))
print(type(compressor).__module__, payload.numel(), float(compressor.decompress(payload, context).sum()))
print(sorted(gcompress.methods())[-2:], gcompress.Policy("chain:(quantize:bits=4),(toy)"))
"""
    said = python(tmp_path, "-c", program)
    assert "toy_package 1004 1000.0" in said and "chain:(quantize:bits=4),(toy)" in said
    assert "'lost' of nowhere:Lost is left out: No module named 'nowhere'" in said


def test_two_methods_cannot_share_a_name(tmp_path):
    text = (TOY / "toy.py").read_text().replace('"toy"', '"topk"')
    (tmp_path / "taken.py").write_text(text)
    program = "import gcompress\ntry:\n    import taken\nexcept gcompress.ConfigError as error:\n    print(error)"
    assert "name: got 'topk' in Toy, which is TopK's" in python(tmp_path, "-c", program)
