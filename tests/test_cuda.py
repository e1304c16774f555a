"""The kernels of the GPU without a GPU: they compile for what they are for, and on the host make the CPU's bytes.

With a GPU, `make test-gpu` runs the same laws on it (test_cuda_device.py).
"""

import concurrent.futures
import json
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from gcompress import PayloadError, backends, cli, from_spec
from gcompress.backends import gpu
from gcompress.backends.gpu import compiler, sources
from gcompress.backends.gpu import launcher as device_launcher
from gcompress.backends.gpu.plans import DeviceKernels
from gcompress.feedback import ErrorFeedback
from tests import emulation, nvrtc
from tests.compressors import COMPRESSORS, SIZES, inputs, poisoned, same_or_nan
from tests.hostile import with_scales
from tests.launching import REPOSITORY

ON_DEVICE = [compressor for compressor in COMPRESSORS if backends.provides(DeviceKernels, compressor)]
BUILD = REPOSITORY / "build"
ARCHITECTURES = (70, 100)  # the oldest and the newest
EVERY_INPUT = [numel for numel in SIZES if numel <= 1024] if os.environ.get("GCOMPRESS_LONG") == "1" else (7, 129, 1023)
every_compressor = pytest.mark.parametrize("compressor", ON_DEVICE, ids=str)
watches_memory = pytest.mark.skipif(
    not emulation.watches_memory(), reason="watching memory needs a compiler with -fsanitize=thread"
)
needs_compiler = pytest.mark.skipif(not emulation.COMPILER, reason="the emulation needs a C++ compiler")


@pytest.fixture(scope="session")
def library():
    return emulation.build(BUILD)


@pytest.fixture
def launcher(library):
    return emulation.EmulatedLauncher(library)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for(architecture):
    """By the newest NVRTC here that knows the architecture: that of CUDA 13 begins with 75."""
    installed = nvrtc.installed()
    able = [library for library in installed if architecture in library.architectures]
    if not able:
        has = ", ".join(f"{major}.{minor}" for major, minor in (library.version for library in installed)) or "none"
        pytest.skip(f"no NVRTC for sm_{architecture} is installed (found: {has}): pip install nvidia-cuda-nvrtc-cu12")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        cubins = pool.map(lambda module: able[0].compile(module, architecture), sources.modules())
        assert all(cubin[:4] == b"\x7fELF" for cubin in cubins)


def test_cupy_compiles_the_same(tmp_path, monkeypatch):
    """As it does at run time, without a driver; what it made is found again."""
    installed = nvrtc.installed()
    if not installed:
        pytest.skip("no NVRTC is installed: pip install nvidia-cuda-nvrtc-cu12")
    nvrtc.preload(installed[0])
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'gcompress[cuda]'")
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # of another CUDA than the NVRTC that is there
        pytest.skip(f"CuPy finds no NVRTC: {error}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = compiler.cached_cubin("natural", 90)
    assert path.read_bytes()[:4] == b"\x7fELF" and path.is_relative_to(tmp_path)
    made = path.stat().st_mtime_ns
    assert compiler.cached_cubin("natural", 90).stat().st_mtime_ns == made
    with pytest.raises(RuntimeError, match="does not compile for compute capability 1.0"):
        compiler.cubin("natural", 10)


@pytest.mark.parametrize("option", ["--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"])
def test_nothing_approximate_is_compiled(option):
    assert option in sources.OPTIONS


def test_without_a_device_the_reason_is_said_once(caplog):
    active, reason = gpu.status()
    if active:
        pytest.skip("there is a device")
    assert "CUDA" in reason or "CuPy" in reason or "capability" in reason
    device_launcher._kernels.cache_clear()
    for _ in range(3):
        assert gpu.kernels(torch.device("cuda", 0)) is None
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()] == [
        f"GPU kernels are not in use, the slower torch reference is: {reason}"
    ]


def test_the_doctor_says_what_runs_and_why(capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"CPU    {backends.backend()}" in said and gpu.status()[1] in said and "polar" in said


def check_bytes(compressor, table, tensor, where):
    """Encoding, decoding and adding by `table` against the CPU backend."""
    payload, ctx = compressor.compress(tensor, seed=7)
    decoded, total = compressor.decompress(payload, ctx), torch.ones(tensor.numel())
    compressor.decode_into(payload, total, add=True)
    with backends.use_backend(table):
        assert torch.equal(compressor.compress(tensor, seed=7)[0], payload), where
        assert same_or_nan(compressor.decompress(payload, ctx), decoded), where
        own_total = torch.ones(tensor.numel())
        compressor.decode_into(payload, own_total, add=True)
        assert same_or_nan(own_total, total), where


@needs_compiler
@every_compressor
def test_the_bytes_are_those_of_the_cpu(compressor, launcher):
    """Whatever the input, and whichever thread comes first: schedules take turns. (Every input at some sizes only.)"""
    for numel in SIZES:
        for name, tensor in {**inputs(numel), **poisoned(numel)}.items():
            if numel not in EVERY_INPUT and name not in ("heavy", "ties"):
                continue
            check_bytes(compressor, DeviceKernels(launcher), tensor, (numel, name))


@needs_compiler
@every_compressor
def test_the_order_of_threads_does_not_matter(compressor, library):
    for schedule in (0, 1, 2, 3):
        table = DeviceKernels(emulation.EmulatedLauncher(library, schedules=(schedule,)))
        for numel in (65, 1023, 8200):
            for name in ("gauss", "ties"):
                check_bytes(compressor, table, inputs(numel)[name], (schedule, numel, name))


@needs_compiler
@every_compressor
def test_nothing_beyond_a_tensor_is_touched_and_any_address_will_do(compressor, launcher):
    """Memory ends at the tensors' last byte; floats lie at multiples of 4 bytes, payloads anywhere."""
    for numel in (1, 7, 130, 4101):
        tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
        payload, _ = compressor.compress(tensor, seed=3)
        expected = torch.empty(numel)
        compressor.decode_into(payload, expected)
        out = launcher.guarded(torch.zeros(numel), 4)
        with backends.use_backend(DeviceKernels(launcher)):
            assert torch.equal(compressor.compress(launcher.guarded(tensor, 4), seed=3)[0], payload)
            compressor.decode_into(launcher.guarded(payload, 1), out)
        assert same_or_nan(out, expected)
        canary = torch.full((numel + 8,), 5.0)
        with backends.use_backend(DeviceKernels(launcher)):
            compressor.decode_into(payload, canary[4:-4])
        assert same_or_nan(canary[4:-4], expected) and bool((canary[:4] == 5).all() and (canary[-4:] == 5).all())


@needs_compiler
@every_compressor
def test_damaged_bytes_decode_or_are_refused_but_never_crash(compressor, launcher):
    generator = torch.Generator().manual_seed(3)
    payload, _ = compressor.compress(torch.randn(333, generator=generator))
    out = launcher.guarded(torch.empty(333), 4)
    with backends.use_backend(DeviceKernels(launcher)):
        for trial in range(30):
            damaged = payload.clone()
            positions = torch.randint(0, len(payload), (1 + trial % 5,), generator=generator)
            damaged[positions] = torch.randint(0, 256, positions.shape, generator=generator).to(torch.uint8)
            for wrong in (damaged, torch.full_like(payload, 255 * (trial % 2))):
                try:
                    compressor.decode_into(wrong, out)
                except PayloadError:
                    pass


@needs_compiler
@every_compressor
def test_any_scale_decodes_as_on_the_cpu(compressor, launcher):
    """Negative, not finite, -0 or subnormal. What the CPU refuses is refused here too, or is not finite."""
    payload, _ = compressor.compress(inputs(333)["heavy"], seed=7)
    for wrong in with_scales(payload, {0, 1, 4, 8, max(0, len(payload) - 5)}):
        expected, refused, out = torch.ones(333), False, torch.ones(333)
        try:
            compressor.decode_into(wrong, expected, add=True)
        except PayloadError:
            refused = True
        try:
            with backends.use_backend(DeviceKernels(launcher)):
                compressor.decode_into(wrong, out, add=True)
        except PayloadError:
            assert refused, wrong
        else:
            assert not out.isfinite().all() if refused else same_or_nan(out, expected), wrong


@needs_compiler
@every_compressor
def test_error_feedback_is_that_of_the_cpu(compressor, launcher):
    """Payloads and residuals of five steps, one of which is not finite, with a memory and without one."""
    for numel in (5, 1023, 8200):
        for poisoned_step in (0, 2):
            expected, fused = ErrorFeedback(), ErrorFeedback()
            for step in range(5):
                gradient = inputs(numel, seed=step)["heavy"]
                if step == poisoned_step:
                    gradient[numel // 2] = float("nan")
                payload, _ = expected.compress("w", gradient, compressor, seed=step)
                with backends.use_backend(DeviceKernels(launcher)):
                    assert torch.equal(fused.compress("w", gradient, compressor, seed=step)[0], payload)
                before = expected.residual("w")
                assert same_or_nan(fused.residual("w"), torch.zeros(numel) if before is None else before)
    assert any(kernel.endswith("_restore") for kernel in launcher.launched)


# A few launches of each kernel, with every branch that has a barrier; last what takes a large tensor.
QUICK_SPECS = [
    "quantize:bits=4",
    "quantize:bits=1,bucket=0",
    "onebit",
    "bf16",
    "fp16:bucket=0",
    "fp8:bucket=0",
    "mxfp4",
    "qsgd:bits=4,bucket=0",
    "ternary:rounding=nearest",
    "natural",
    "randomk:sparsity=0.9",
    "topk:sparsity=0.9,index=fixed",
    "topk:sparsity=0.9,index=bitmap",
    "topk:sparsity=0.5,index=gaps",
    "topk:sparsity=0.5,index=places,chunk=8192",
    "topk:sparsity=0.5,index=bitmap,chunk=8192",
    "threshold:threshold=0.3,relative=true",
    "mask:sparsity=0.9,bits=2",
    "mask:sparsity=0.9,bits=6,levels=lloyd",
    "hybrid:(topk:sparsity=0.99),(quantize:bits=2)",
    "eden:bits=2",
    "eden:bits=0.5,block=16384",
    "shared:bits=4",
    "entropy:(quantize:bits=3)",
    "entropy:(topk:sparsity=0.5)",
    "lowrank:rank=1",
]
# Of polar, whose barriers no other method has: all of its kernels, with every branch that has a barrier.
QUICK_POLAR = [
    ("polar:rate=0.9,block=512,floor=0", (3000,), "gauss"),
    ("polar:rate=1.5,block=256,scales=chunk,floor=0", (1500,), "heavy"),
    ("polar:rate=0.5,rank=0,floor=0", (40, 50), "heavy"),
    ("polar:rate=0.5,block=64,list_size=2,outliers=0.0,floor=0", (700,), "gauss"),
    ("polar:rate=2.0,outliers=0.02,block=64,floor=0", (4500,), "heavy"),
    ("polar:rate=0.5,unbiased=true,block=64,floor=0", (1023,), "gauss"),
    ("polar:rate=0.5,unbiased=true,block=64,floor=0", (1023,), "one entry"),
]
QUICK = [(spec, numel, name) for spec in QUICK_SPECS for numel in (1023, 8200) for name in ("gauss", "ties")]
QUICK += [("eden:bits=2", 8200, "one nan"), *QUICK_POLAR]
QUICK += [("onebit:bucket=0", 2**20 + 5000, "gauss"), ("topk:sparsity=0.9", 2**20 + 5000, "gauss")]


def quick_run(launcher, launches=QUICK):
    feedback = ErrorFeedback()
    with backends.use_backend(DeviceKernels(launcher)):
        feedback.compress("w", torch.randn(100), from_spec("bf16"))
        feedback.compress("m", torch.randn(100), from_spec("mask:sparsity=0.9"))
    for spec, shape, name in launches:
        shape = shape if isinstance(shape, tuple) else (shape,)
        numel = math.prod(shape)
        tensor = {**inputs(numel), **poisoned(numel)}[name].view(shape)
        check_bytes(from_spec(spec), DeviceKernels(launcher), tensor, (spec, shape, name))


@needs_compiler
def test_every_kernel_is_run(launcher):
    quick_run(launcher)
    assert launcher.kernels() - launcher.launched == set()


@pytest.fixture(scope="session")
def racing_library():
    return emulation.build(BUILD, races=True)


def race_at(where, library, launches):
    """What is wrong without one barrier, or None."""
    launcher = emulation.EmulatedLauncher(library)
    launcher.leave_out(where)
    try:
        quick_run(launcher, launches)
    except AssertionError as error:
        return str(error)
    finally:
        launcher.leave_out("")


@needs_compiler
@watches_memory
def test_no_two_threads_race_in_shared_memory(racing_library):
    """Every access is watched; and that notices a missing barrier at once, whoever comes first."""
    quick_run(emulation.EmulatedLauncher(racing_library, schedules=(0,)), QUICK[:1])
    barriers = emulation.EmulatedLauncher(racing_library).barriers()
    of_quantize = [where for where in barriers if where.startswith("bucket.cuh")]
    assert len(of_quantize) == 3
    for where in of_quantize:
        assert "a race with thread" in race_at(where, racing_library, QUICK[:1])
    assert race_at("", racing_library, QUICK[:-2]) is None


def ends_well(where, library, schedule):
    """Whether all is as ever without one barrier, in a process of its own: anything may happen there."""
    polar = where.startswith("polar")
    launches = [launch for launch in QUICK if not where or (launch in QUICK_POLAR) == polar]
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            signal.alarm(60)
            launcher = emulation.EmulatedLauncher(library, schedules=(schedule,))
            launcher.leave_out(where)
            quick_run(launcher, launches)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def print_unnoticed(library):
    """What `test_a_barrier_left_out_is_noticed` runs in a fresh process, which may fork: it has one thread."""
    torch.set_num_threads(1)
    launcher = emulation.EmulatedLauncher(library, schedules=(0,))
    quick_run(launcher)
    barriers = launcher.barriers()
    well = [schedule for schedule in (0, 1, 2) if ends_well("", library, schedule)]
    unnoticed = [where for where in barriers if all(ends_well(where, library, schedule) for schedule in (1, 0, 2))]
    print(json.dumps({"barriers": len(barriers), "well": well, "unnoticed": unnoticed}))


@needs_compiler
def test_a_barrier_left_out_is_noticed(library):
    """Every single one: without it, some schedule makes other bytes or ends in an error."""
    program = f"from tests import test_cuda; test_cuda.print_unnoticed({str(library)!r})"
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=480)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["barriers"] >= 25
    assert found["well"] == [0, 1, 2] and found["unnoticed"] == []
