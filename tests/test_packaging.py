"""What pip installs is all that users run: no engine has to be built first, and what is missing says how to get it."""

import subprocess
import sys
import zipfile

import pytest

from tests.launching import REPOSITORY, run

# Of the extras: none of them may be needed to compress, nor for torch's own engines.
EXTRAS = ("accelerate", "cupy", "google_crc32c", "grpc", "horovod", "lightning", "matplotlib", "mpi4py", "torchvision")
PLAIN = ("gcompress", "gcompress.cli", "gcompress.plugins.ddp", "gcompress.plugins.fsdp")


def imports_without(names, code):
    """Run code in a process in which these packages cannot be imported; returns what it wrote to stderr."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({names!r}))\n"
    return subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True, cwd=REPOSITORY).stderr


def test_torch_is_all_that_torchs_engines_need():
    assert imports_without(EXTRAS, "\n".join(f"import {name}" for name in PLAIN)) == ""


@pytest.mark.parametrize(
    "name, module, command",
    [
        ("horovod", "gcompress.plugins.horovod", "gcompress install horovod"),
        ("mpi4py", "gcompress.plugins.mpi", "pip install 'gcompress[mpi]'"),
        ("grpc", "gcompress.split", "pip install 'gcompress[split]'"),
    ],
)
def test_what_is_missing_says_how_to_get_it(name, module, command):
    error = imports_without([name], f"import {module}").splitlines()[-1]
    assert error.startswith("ImportError: ") and command in error


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel as it is built where there is no compiler, which takes no minutes; and the folder it is installed in."""
    folder = tmp_path_factory.mktemp("wheel")
    source, pip = folder / "source", [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # Of a copy: setuptools writes beside what it builds.
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    code, output = run(built, 300, None, {"CC": "false", "CXX": "false", "GCOMPRESS_REQUIRE_NATIVE": ""})
    assert code == 0, output
    (file,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", file], check=True)
    return file, folder / "site"


def test_a_wheel_needs_torch_and_numpy_alone(wheel):
    with zipfile.ZipFile(wheel[0]) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in needed) == ["numpy", "torch"]
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    assert {"cuda", "examples", "frameworks", "horovod", "mpi", "split"} <= extras


def test_a_wheel_holds_what_users_run(wheel, tmp_path):
    def start(*command):
        environment = {"PYTHONPATH": str(wheel[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    place = start("-c", "import gcompress; print(gcompress.__file__)")
    assert place.startswith(str(wheel[1]))
    told = start("-m", "gcompress.cli", "doctor")
    assert "by the torch reference: bf16" in told and "the same bits on all" in told and "gloo" in told
    demo = start("-m", "gcompress.cli", "demo", "--steps", 3, "--compressors", "none", "topk:sparsity=0.99")
    assert [line.split()[0] for line in demo.splitlines()[1:]] == ["method", "none", "topk:sparsity=0.99"]
    shown = (REPOSITORY / "README.md").read_text()
    assert all(line.replace(" 3 steps", " 400 steps") in shown for line in demo.splitlines()[:2]), "what README shows"
    bench = start("-m", "gcompress.cli", "bench", "--specs", "sign", "--numel", 4096)
    assert bench.splitlines()[-1].split()[:2] == ["sign", "reference"]
    assert "horovod" in start("-m", "gcompress.cli", "install", "--help")
    example = wheel[1] / "gcompress" / "examples" / "frameworks" / "ddp.py"
    assert start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", example)


def test_the_demo_refuses_what_it_cannot_run():
    for arguments, told in ((["--compressors", "sgn"], "got 'sgn'"), (["--ranks", "0"], "expected at least 1")):
        command = [sys.executable, "-m", "gcompress.cli", "demo", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 2 and told in done.stderr.splitlines()[-1]
