"""The command line: `gcompress COMMAND …`. A command is a function in COMMANDS."""

import argparse
import importlib.util
import pathlib
import runpy
import sys

from .errors import GcompressError


def split(arguments):
    """split learning: --demo, --role client, --role server, or `certificates` (try: gcompress split --help)"""
    if arguments[:1] == ["certificates"]:
        return certificates(arguments[1:])
    run_program("examples", "split_learning.py", arguments)


def certificates(arguments):
    """Make a development authority and certificates."""
    parser = argparse.ArgumentParser(
        prog="gcompress split certificates",
        description="Make a development authority, a server's certificate and one for each client, for mutual TLS. "
        "Copy ca.pem, NAME.pem and NAME.key to each machine; keys are for their owner only.",
    )
    add = parser.add_argument
    add("--out", default="certificates", metavar="DIR", help="where to (%(default)s)")
    add("--hosts", nargs="+", default=["localhost", "127.0.0.1"], help="names and addresses of the server")
    add("--clients", nargs="+", default=["client"], metavar="NAME", help="the clients' names (%(default)s)")
    add("--days", type=int, default=365, help="that they are valid (%(default)s)")
    options = parser.parse_args(arguments)
    from .split import make_certificates

    folder = make_certificates(options.out, options.hosts, options.clients, options.days)
    print(f"{folder}: " + ", ".join(sorted(path.name for path in folder.iterdir())))


def install(arguments):
    """an engine beside torch's own: gcompress install horovod, gcompress install mpi"""
    programs = {"horovod": "build_horovod.py", "mpi": "install_mpi.py"}
    parser = argparse.ArgumentParser(
        prog="gcompress install",
        description="horovod: builds Horovod 0.28.1 as released for the torch of this Python (4 to 8 minutes on two "
        "cores, once: the wheel is cached), since what pip builds does not compile for torch 2.1 and later. "
        "mpi: installs mpi4py, and Open MPI where there is no mpirun.",
    )
    parser.add_argument("engine", choices=programs)
    run_program("tools", programs[parser.parse_args(arguments).engine], [])


def doctor(arguments):
    """what runs the compressors here, on the CPU and on each GPU, and why"""
    argparse.ArgumentParser(prog="gcompress doctor", description=doctor.__doc__).parse_args(arguments)
    import torch

    from . import backends, methods
    from .backends import gpu
    from .backends.gpu.plans import DeviceKernels

    built = ", ".join(backends.available_backends())
    print(f"CPU    {backends.backend()} (there are: {built}; GCOMPRESS_BACKEND chooses)")
    print_methods(backends.cpu_kernels(), methods())
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(max(1, count)):
        active, reason = gpu.status(index)
        name = f"GPU {index}" if count else "GPU"
        print(f"{name:6} {'kernels' if active else 'torch reference' if count else 'none'}: {reason}")
    print_methods(DeviceKernels, methods())


def print_methods(kernels, methods):
    """Print which methods a table of kernels serves, and which run on the torch reference."""
    from .backends import provides

    served = {name for name, method in methods.items() if kernels is not None and provides(kernels, method)}
    for what, names in (("with kernels", served), ("by the torch reference", set(methods) - served)):
        if names:
            print(f"       {what}: {', '.join(sorted(names))}")


def run_program(folder, name, arguments):
    """Run a program of examples/ or tools/ as if it had been started by its file name."""
    spec = importlib.util.find_spec(f"gcompress.{folder}")
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / name
    sys.path.insert(0, str(path.parent))  # its neighbours are imported by name
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


COMMANDS = {"doctor": doctor, "install": install, "split": split}


def main(argv=None):
    """Entry point; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--version"]:
        from . import __version__

        print(f"gcompress {__version__}")
        return 0
    command = COMMANDS.get(arguments[0]) if arguments else None
    if command is None:
        asked = arguments[0] if arguments else None
        lines = [f"  gcompress {name:<8} {function.__doc__.splitlines()[0]}" for name, function in COMMANDS.items()]
        right = asked in ("-h", "--help")
        print("\n".join(["usage: gcompress COMMAND … | --version", *lines]), file=sys.stdout if right else sys.stderr)
        return 0 if right else 2
    try:
        return command(arguments[1:]) or 0
    except (GcompressError, ImportError) as error:
        print(f"gcompress {arguments[0]}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
