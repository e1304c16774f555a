"""The kernels of csrc/cuda/ on the host (emulator/), behind the launcher that gcompress.cuda plans launches for."""

import ctypes
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

import torch

from gcompress.backends.gpu import sources
from gcompress.backends.gpu.plans import THREADS
from tests.processes import only_one

EMULATOR = pathlib.Path(__file__).parent / "emulator"
# What a GPU does otherwise than a PC ends a launch: words at odd addresses, shifts too far, floats out of an integer's
# range. No fused multiply-add, as on the GPU.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-w", "-DGC_EMULATED"]
FLAGS += ["-fsanitize=alignment,shift-exponent,float-cast-overflow,integer-divide-by-zero"]
FLAGS += ["-fsanitize-undefined-trap-on-error"]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


class EmulationError(AssertionError):
    """A launch that a GPU would not have run, or not to this end."""


def watches_memory():
    """Whether the compiler can have every access to memory call a function, as races.cc needs."""
    if not COMPILER:
        return False
    command = [COMPILER, "-fsanitize=thread", "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input=b"int f(int* p) { return *p; }", capture_output=True).returncode == 0


def build(folder, races=False):
    """Compile the emulator and all kernels to a shared library in `folder`; returns its path.

    races: whether it watches every access to shared memory, which takes a multiple of the time.
    """
    csrc = sources.folder()
    modules = [csrc / "cuda" / f"{name}.cu" for name in sources.modules()]
    inputs = [*modules, *csrc.glob("cuda/*.cuh"), *csrc.glob("arith/*.h"), *EMULATOR.iterdir()]
    digest = hashlib.sha256(repr((FLAGS, races)).encode() + b"".join(path.read_bytes() for path in sorted(inputs)))
    library = pathlib.Path(folder) / f"emulation-{digest.hexdigest()[:16]}.so"
    with only_one(library.with_suffix(".lock")):
        if not library.exists():
            compile_all(library, modules, races)
    return library


def compile_all(library, modules, races):
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        commands = {}
        own = [EMULATOR / "emulator.cc", EMULATOR / ("races.cc" if races else "no_races.cc")]
        for source in [*modules, *own]:
            target = pathlib.Path(scratch) / f"{source.stem}.o"
            language = ["-x", "c++", "-c", str(source), "-o", str(target)]
            watch = ["-fsanitize=thread"] if races and source in modules else []
            commands[target] = subprocess.Popen([COMPILER, *FLAGS, *watch, f"-I{EMULATOR}", *language])
        if any(process.wait() for process in commands.values()):
            raise RuntimeError("the emulation of csrc/cuda/ does not compile")
        finished = pathlib.Path(scratch) / library.name
        subprocess.run([COMPILER, "-shared", *map(str, commands), "-o", str(finished)], check=True)
        finished.replace(library)


class EmulatedLauncher:
    """Runs launches at once, under the schedules in turn (see emulator.cc: 0 in order, 1 in reverse, others random)."""

    def __init__(self, library, schedules=(0, 1, 2)):
        self._library = ctypes.CDLL(str(library))
        self._library.emulator_launch.restype = ctypes.c_char_p
        self._library.emulator_kernels.restype = ctypes.c_char_p
        self._library.emulator_barriers.restype = ctypes.c_char_p
        self._library.emulator_allocate.restype = ctypes.c_void_p
        self.schedules, self.turn = schedules, 0
        self.launched, self.constants = set(), {}

    def kernels(self):
        """The names of all kernels."""
        return set(self._library.emulator_kernels().decode().split())

    def barriers(self):
        """The "file:line" of the barriers met so far under schedule 0."""
        return self._library.emulator_barriers().decode().split()

    def leave_out(self, where):
        """Let the barrier at "file:line" do nothing; an empty string puts it back."""
        self._library.emulator_leave_out(where.encode())

    def empty(self, nbytes):
        return torch.full((nbytes,), 0xA5, dtype=torch.uint8)

    def zeros(self, nbytes):
        return torch.zeros(nbytes, dtype=torch.uint8)

    def numbers(self, values):
        return torch.tensor(values)

    def constant(self, key, make):
        return self.constants.setdefault(key, torch.from_numpy(make()))

    def upload(self, array):
        return torch.from_numpy(array).clone()

    def read(self, tensor):
        return tensor.view(torch.int32).tolist()

    def launch(self, module, kernel, blocks, *arguments, shared=0):
        self.launched.add(kernel)
        self.turn += 1
        schedule = self.schedules[self.turn % len(self.schedules)]
        schedule += self.turn if schedule > 1 else 0
        slots = (ctypes.c_uint64 * len(arguments))(*(_slot(argument) for argument in arguments))
        error = self._library.emulator_launch(
            kernel.encode(), ctypes.c_int64(blocks), THREADS, ctypes.c_int64(shared), slots, len(arguments),
            ctypes.c_int64(schedule),
        )  # fmt: skip
        if error:
            raise EmulationError(f"{kernel}: {error.decode()}")

    def guarded(self, tensor, alignment):
        """A copy of a tensor whose memory ends where nobody may read on; `alignment` in bytes."""
        size = max(1, tensor.numel() * tensor.element_size())
        address = self._library.emulator_allocate(ctypes.c_int64(size), ctypes.c_int64(alignment))
        buffer = (ctypes.c_uint8 * size).from_address(address)
        copy = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel())
        return copy.copy_(tensor)


def _slot(argument):
    if isinstance(argument, float):
        return ctypes.c_uint64.from_buffer_copy(ctypes.c_double(argument)).value
    return int(argument) & 0xFFFFFFFFFFFFFFFF
