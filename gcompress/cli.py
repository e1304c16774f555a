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
    """what is installed here, what runs the compressors, which engines work; an exchange between two processes"""
    argparse.ArgumentParser(prog="gcompress doctor", description=doctor.__doc__).parse_args(arguments)
    from .doctor import report

    return 0 if report() else 1


def demo(arguments):
    """two ranks train on this machine with and without compression: half a minute, no data, no Horovod"""
    run_program("examples", "demo.py", arguments)


def bench(arguments):
    """the compressors' speed on this machine, against a plain copy"""
    run_program("benchmarks", "compressors.py", arguments)


def run_program(folder, name, arguments):
    """Run a program of examples/, tools/ or benchmarks/ as if it had been started by its file name."""
    spec = importlib.util.find_spec(f"gcompress.{folder}")
    path = pathlib.Path(next(iter(spec.submodule_search_locations))) / name
    sys.path.insert(0, str(path.parent))  # its neighbours are imported by name
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def plan(arguments):
    """which compression pays on your link (try: gcompress plan --help)"""
    from . import cli_plan

    cli_plan.plan(arguments)


COMMANDS = {"demo": demo, "doctor": doctor, "bench": bench, "plan": plan, "install": install, "split": split}


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
