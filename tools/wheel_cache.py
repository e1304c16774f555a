"""Pinned downloads for the build_ and install_ tools, and a cache of built wheels that says what each was made of.

An entry of the cache is a folder whose name ends with a digest of its recipe: of all that decides the build. Its
`recipe.json` has the recipe, and the SHA-256 of every other file in it. So another recipe finds no entry and builds,
and an entry whose files are not those that were stored is refused, removed and built anew.
"""

import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
RECIPE = "recipe.json"
# What a user may set to build otherwise; beside these, variables that begin with the engine's own name.
BUILD_VARIABLES = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")


class CannotBuild(Exception):
    """Why something cannot be built here, in one sentence."""


def run(command, **kwargs):
    print("+", " ".join(map(str, command)), flush=True)
    subprocess.run(command, check=True, **kwargs)


def pinned(folder, name, version, sha256):
    """pip's arguments for a release of which it takes just this file, and runs nothing of any other."""
    requirements = folder / f"{name}.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    return ["--no-deps", "--require-hashes", "-r", str(requirements)]


def download_source(scratch, name, version, sha256, **kwargs):
    """Download a source distribution with pip and unpack it in the folder `scratch`; returns where it lies."""
    command = [*PIP, "download", "-q", "--no-binary", ":all:", "--no-build-isolation", "-d", str(scratch)]
    run(command + pinned(scratch, name, version, sha256), **kwargs)
    unpack(scratch / f"{name}-{version}.tar.gz", scratch)
    return scratch / f"{name}-{version}"


def unpack(archive, folder):
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
            return
        # Python before 3.10.12 and 3.11.4 has no filters. Our archives need neither links nor anything special.
        for member in tar.getmembers():
            inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
            if not inside or not (member.isfile() or member.isdir()):
                raise CannotBuild(f"{archive.name}: expected plain files below its folder, found {member.name!r}")
        tar.extractall(folder)


def compiler():
    """The C++ compiler's command, which builds everything that must fit together."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    raise CannotBuild("no C++ compiler was found")


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def file_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests_below(folder):
    """{path within the folder: SHA-256} of all its files but the recipe."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_digest(path) for path in files if path != folder / RECIPE}


def make_recipe(name, version, sha256, tools, **more):
    """What decides the build of a release: a dict that is the same whenever the wheel may be used again.

    Args:
        name, version, sha256: of the release.
        tools: files that say how it is built; this one is always among them.
        more: strings that decide it as well.
    """
    import torch

    return {
        "release": f"{name} {version} {sha256}",
        "tools": {path.name: file_digest(path) for path in (*tools, pathlib.Path(__file__))},
        "python": f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI')}",
        "torch": f"{torch.__version__} {torch.version.git_version}",
        "platform": f"{sysconfig.get_platform()} {' '.join(platform.libc_ver())}",
        "compiler": output_of(*compiler().split(), "--version").partition("\n")[0],
        "environment": {
            key: value
            for key, value in sorted(os.environ.items())
            if key in BUILD_VARIABLES or key.startswith(f"{name.upper()}_")
        },
        **more,
    }


def entry(recipe):
    """The folder of a recipe's entry, whether it is there or not."""
    root = os.environ.get("GCOMPRESS_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "gcompress"
    )
    name, version, _ = recipe["release"].split()
    parts = [f"{name}{version}", recipe["python"].split()[0], f"torch{recipe['torch'].split()[0]}"]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    return pathlib.Path(root) / "wheels" / "-".join(re.sub(r"[^A-Za-z0-9.+]", "_", part) for part in [*parts, digest])


def fault(folder, recipe):
    """Why an entry must not be used, in a few words, or None."""
    try:
        stored = json.loads((folder / RECIPE).read_text())
        made_by, files = stored["recipe"], dict(stored["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{RECIPE} is missing or damaged"
    if made_by != recipe:
        return "it was made by another recipe"
    found = digests_below(folder)
    changed = sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name))
    return f"{changed[0]} is not what was stored" if changed else None


def usable(recipe):
    """Whether a recipe's entry is there. A damaged one is removed, and the reason printed."""
    folder = entry(recipe)
    if not folder.exists():
        return False
    reason = fault(folder, recipe)
    if reason:
        print(f"{folder}: refused, {reason}; it is built anew", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    return not reason


def store(recipe, built):
    """Put the files below the folder `built` into the cache, as the recipe's entry."""
    folder = entry(recipe)
    # In one step: an interrupted build leaves nothing behind that looks whole.
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(built, partial)
    (partial / RECIPE).write_text(json.dumps({"recipe": recipe, "files": digests_below(built)}, indent=1) + "\n")
    if not folder.exists():
        os.replace(partial, folder)
    shutil.rmtree(partial, ignore_errors=True)


def install_wheel(wheel):
    run([*PIP, "install", "-q", "--no-deps", "--force-reinstall", str(wheel)])
