#!/usr/bin/env python3
"""Put Fashion-MNIST into ./data/fashion-mnist, unless it is there or in /usr/share/datasets/fashion-mnist.

On Debian and Ubuntu it comes from the package dataset-fashion-mnist, which is unpacked without being
installed and needs no root; elsewhere from torchvision's download. What is put there is what was published:
its digests are known. Calling it again does nothing.

    python tools/fetch_data.py
"""

import gzip
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zlib

TARGET = pathlib.Path(__file__).resolve().parent.parent / "data" / "fashion-mnist"
INSTALLED = pathlib.Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
# SHA-256 of what is in each file: Debian's are compressed once more, without their names, and so differ by bytes.
FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


class Unavailable(Exception):
    """This source cannot give the files; the message says why."""


def is_complete(folder):
    return all((folder / name).is_file() or (folder / name).with_suffix("").is_file() for name in FILES)


def run(*command, folder):
    """Run a command in `folder`; its last line of complaint becomes an Unavailable."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        complaint = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"{command[0]} {command[1]}: {complaint}")


def from_debian(scratch):
    """Unpack Debian's package below `scratch`; returns the folder with the files."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise Unavailable("there is no apt-get")
    try:
        run("apt-get", "download", PACKAGE, folder=scratch)
    except Unavailable:
        # Fresh containers come without package lists, and only root can fetch them.
        if os.geteuid() != 0:
            raise
        run("apt-get", "update", "-qq", folder=scratch)
        run("apt-get", "download", PACKAGE, folder=scratch)
    (archive,) = scratch.glob(f"{PACKAGE}_*.deb")
    run("dpkg-deb", "-x", str(archive), str(scratch / "unpacked"), folder=scratch)
    return scratch / "unpacked" / "usr/share/datasets/fashion-mnist"


def from_torchvision(scratch):
    """Have torchvision download and check the files; returns the folder with them."""
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        raise Unavailable(f"torchvision: {error}") from error
    try:
        FashionMNIST(scratch, download=True)
    except (RuntimeError, OSError) as error:
        raise Unavailable(f"torchvision: {str(error).splitlines()[0]}") from error
    return scratch / "FashionMNIST" / "raw"


def check(source):
    """Unavailable unless the folder has every file, and in it what was published."""
    for name, expected in FILES.items():
        if not (source / name).is_file():
            raise Unavailable(f"{name} is not in what was downloaded")
        try:
            found = hashlib.sha256(gzip.decompress((source / name).read_bytes())).hexdigest()
        except (OSError, EOFError, zlib.error) as error:
            raise Unavailable(f"{name} is damaged: {error}") from error
        if found != expected:
            raise Unavailable(f"{name} holds something else: SHA-256 {found}, expected {expected}")


def put_in_place(source):
    """Move the files to TARGET one by one, each in one step: what lies there is never half a file."""
    check(source)
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        os.replace(source / name, TARGET / name)


def main():
    for folder in (TARGET, INSTALLED):
        if is_complete(folder):
            print(f"Fashion-MNIST is in {folder}")
            return
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for source in (from_debian, from_torchvision):
        # Beside the target, so that moving a file is a rename.
        with tempfile.TemporaryDirectory(prefix="fetch-", dir=TARGET.parent) as scratch:
            try:
                put_in_place(source(pathlib.Path(scratch)))
            except Unavailable as reason:
                reasons.append(str(reason))
                continue
        print(f"Fashion-MNIST is in {TARGET}")
        return
    sys.exit(
        f"fetch_data.py: Fashion-MNIST could not be fetched ({'; '.join(reasons)}). "
        f"Put {', '.join(FILES)} from the repository zalandoresearch/fashion-mnist into {TARGET}."
    )


if __name__ == "__main__":
    main()
