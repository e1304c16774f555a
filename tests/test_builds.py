"""What setup.py makes: by which compiler, with which tags, and what it says where it can make nothing."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from gcompress import ConfigError, backends
from tests.foreign_kernels import built_with
from tests.launching import REPOSITORY, run
from tests.test_golden import FIXTURES

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# Notes its arguments and writes an empty file where a compiler would write its output: a build takes seconds.
COMPILER = """#!{python}
import pathlib, sys
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).touch()
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the files that the repository tracks: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    return folder


def make_wheel(source, target, **environment):
    """(Exit code, output) of pip, and the wheels in `target`."""
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", target, source]
    shutil.rmtree(source / "build", ignore_errors=True)
    code, output = run(command, 300, None, environment)
    return code, output, list(target.glob("*.whl"))


@pytest.fixture
def compiler(tmp_path):
    """(The path of a program that stands for a compiler, what it was asked for)."""
    path, log = tmp_path / "c++", tmp_path / "log"
    path.write_text(COMPILER.format(python=sys.executable, log=str(log)))
    path.chmod(0o755)
    return path, lambda: log.read_text().splitlines()


def test_without_a_compiler_the_wheel_has_the_reference_and_the_build_says_so(source, tmp_path):
    code, output, (wheel,) = make_wheel(source, tmp_path, CC="false", CXX="false", GCOMPRESS_REQUIRE_NATIVE="0")
    assert code == 0 and "built without C++ kernels, the torch reference is used" in output
    assert "gcompress/_native.so" not in zipfile.ZipFile(wheel).namelist()


def test_kernels_that_are_required_and_missing_fail_the_build(source, tmp_path):
    code, output, wheels = make_wheel(source, tmp_path, CC="false", CXX="false", GCOMPRESS_REQUIRE_NATIVE="1")
    assert code != 0 and not wheels, output


def test_one_wheel_serves_every_python_of_a_platform(source, tmp_path, compiler):
    path, asked = compiler
    environment = {"CC": str(path), "CXX": str(path), "LDFLAGS": "-Wl,-rpath,/of/the/builder"}
    code, output, (wheel,) = make_wheel(source, tmp_path, GCOMPRESS_WERROR="1", **environment)
    assert code == 0, output
    assert re.fullmatch(r"gcompress-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", wheel.name)
    assert "gcompress/_native.so" in zipfile.ZipFile(wheel).namelist()
    compiled = [line for line in asked() if " -c " in f" {line} "]
    (linked,) = [line for line in asked() if line not in compiled]
    assert len(compiled) >= 2 and all(" -Werror" in line for line in compiled)
    assert "rpath" not in linked and " -L" not in linked and " -l" not in linked


def test_the_library_names_no_folder_of_its_builder():
    library = REPOSITORY / "gcompress" / "_native.so"
    if not library.exists() or not shutil.which("readelf"):
        pytest.skip("no library here, or no readelf (binutils)")
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert not re.search("RPATH|RUNPATH", dynamic)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    # Of the C library alone; before glibc 2.34 it has its threads in a file of their own.
    assert all(re.match(r"lib(m|c|gcc_s|pthread)\.so|ld-", name) for name in needed), needed


def test_a_source_distribution_can_be_built_and_tested(source, tmp_path):
    shutil.rmtree(source / "build", ignore_errors=True)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=source, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    tracked = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    wanted = {
        name for name in tracked if name.startswith(("csrc/", "docs/", "gcompress/", "plugins/", "tests/", "tools/"))
    }
    wanted = {name for name in wanted if not name.endswith((".so", ".pyc")) and ".egg-info" not in name}
    assert wanted - names == set()
    assert {"Makefile", "setup.py", "pyproject.toml", "README.md", "constraints.txt"} <= names


def test_the_module_is_the_command():
    for arguments in (["-m", "gcompress", "--version"], ["-m", "gcompress.cli", "--version"]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.stdout == f"gcompress {importlib.metadata.version('gcompress')}\n", done.stderr


def test_a_library_that_cannot_be_used_is_refused_by_name(tmp_path):
    (tmp_path / "other.so").write_text("no library")
    for path in (tmp_path / "other.so", tmp_path / "none.so"):
        environment = {**os.environ, "GCOMPRESS_LIBRARY": str(path)}
        done = subprocess.run(
            [sys.executable, "-c", "import gcompress"], capture_output=True, text=True, cwd=REPOSITORY, env=environment
        )
        assert done.returncode != 0 and ConfigError.__name__ in done.stderr and str(path) in done.stderr


@pytest.mark.parametrize("name", ["clang++"])
def test_clang_gives_the_same_bytes(name):
    """Golden payloads by a library that clang made, on every instruction set; gcc made this checkout's as a rule."""
    compiler = shutil.which(name)
    if not compiler or backends.cpu_kernels() is None:
        pytest.skip(f"no {name} here (Debian: clang), or no kernels to compare with")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/test_golden.py"]
    code, output = run(command, 240, None, {"GCOMPRESS_LIBRARY": str(built_with(compiler))})
    assert code == 0, output[-4000:]
    passed = int(re.search(r"(\d+) passed", output)[1])
    assert passed > len(FIXTURES) * (len(backends.available_backends()) - 1) and "skipped" not in output


COUNT = [sys.executable, "tools/count_instructions.py", "--numel", "4096", "--compressors", "quantize:bits=4"]


@pytest.mark.skipif(not shutil.which("qemu-x86_64"), reason="no emulator (Debian: qemu-user)")
@pytest.mark.skipif("avx2" not in backends.available_backends(), reason="there are no kernels for AVX2 here")
def test_instructions_are_counted_and_wider_vectors_take_fewer():
    code, output = run([*COUNT, "--isas", "avx2", "portable"], 120, None, {})
    assert code == 0, output
    encode, decode = ([float(cell) for cell in line.split("|")[2:4]] for line in output.splitlines()[-2:])
    assert 1 < encode[0] < encode[1] < 5 and 1 < decode[0] < decode[1] < 5


def test_counting_says_what_it_lacks():
    code, output = run([*COUNT, "--isas", "neon"], 60, None, {"PATH": "/nowhere"})
    assert code == 1 and "no neon: there is no qemu-aarch64 (Debian: apt-get install qemu-user)" in output
