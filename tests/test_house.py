"""The house stays in order: where imports may go, how long a file may be, one name for one thing."""

import ast
import collections
import importlib
import inspect
import re

import pytest

from tests.launching import REPOSITORY

# From the ground up: a module imports from its own layer and from those below it.
LAYERS = [
    ("gcompress.errors",),
    ("gcompress.checks", "gcompress.packing", "gcompress.units"),
    ("gcompress.backends",),
    ("gcompress.compressors",),
    ("gcompress.memory", "gcompress.residual_types", "gcompress.feedback", "gcompress.auto", "gcompress.policy"),
    ("gcompress.exchange", "gcompress.forecast"),  # an exchange asks what to choose, which exchanges are run to know
    ("gcompress.split",),
    ("gcompress", "gcompress.cli"),
    ("gcompress.plugins",),
    ("examples",),
]
CODE = ("gcompress", "plugins", "csrc", "examples", "tools", "tests", "benchmarks")
LONGEST_FILE = 500  # lines


def python_files(*folders):
    return [path for name in folders for path in sorted((REPOSITORY / name).rglob("*.py"))]


def module_of(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    parts = ("gcompress", *parts) if parts[0] == "plugins" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path):
    """The modules, or names in modules, that a file imports as a program that stands at its place."""
    module = module_of(path).split(".")
    package = module if path.name == "__init__.py" else module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            yield from (f"{origin}.{name.name}" for name in node.names)


def layer_of(module):
    """The number of a module's layer, None if it is none of ours; the longest name that fits decides."""
    fitting = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(fitting)[1] if fitting else None


@pytest.mark.parametrize("path", python_files("gcompress", "plugins"), ids=module_of)
def test_no_import_runs_upward(path):
    own = layer_of(module_of(path))
    for name in imported(path):
        if name.startswith("gcompress."):
            found = name if layer_of(name) != layer_of("gcompress") else "gcompress.errors"  # a name of the package
            assert layer_of(found) <= own, f"{module_of(path)} imports {name}"


def test_no_file_of_code_is_long():
    endings = (".py", ".h", ".cc", ".cu", ".cuh", ".def")
    files = [path for name in CODE for path in (REPOSITORY / name).rglob("*") if path.suffix in endings]
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 200
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_what_must_be_one_is_defined_once():
    text = "\n".join(path.read_text() for path in python_files("gcompress", "plugins"))
    assert len(re.findall(r"^FORMAT_VERSION = ", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^ *def agree\(", text, re.MULTILINE)) == 1
    assert len(re.findall(r"GCOMPRESS_TIMEOUT\"", text)) == 1


def test_no_two_modules_and_no_two_classes_share_a_name():
    files = python_files("gcompress", "plugins")
    modules = collections.Counter(path.stem for path in files if path.stem != "__init__")
    classes = collections.Counter(
        node.name
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in (modules + classes).items() if count > 1] == []


def test_tests_find_each_other_as_a_package():
    for path in python_files("tests"):
        assert path.name in ("test_house.py", "test_pictures.py") or "sys.path.insert" not in path.read_text(), path


def unannotated(module):
    """The parameters and results without a type hint of what a module exports, as {name: what lacks}."""
    found = {}
    for name in module.__all__:
        thing = getattr(module, name)
        functions = {name: thing} if inspect.isfunction(thing) else {}
        if inspect.isclass(thing):
            members = {f"{name}.{key}": value for key, value in vars(thing).items() if not key.startswith("_")}
            functions = {
                key: getattr(value, "fget", getattr(value, "__func__", value)) for key, value in members.items()
            }
        for key, function in functions.items():
            if inspect.isfunction(function):
                signature = inspect.signature(function)
                hints = {parameter.name: parameter.annotation for parameter in signature.parameters.values()}
                hints = {**hints, "return": signature.return_annotation}
                found[key] = [at for at, hint in hints.items() if hint is inspect.Signature.empty and at not in SELF]
    return {key: lacks for key, lacks in found.items() if lacks}


SELF = ("self", "cls", "compression", "scaler")  # of the last two many kinds are taken: the docstring lists them


PUBLIC = ["gcompress", "gcompress.exchange", "gcompress.split", "gcompress.plugins.ddp", "gcompress.plugins.fsdp"]


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_public_has_type_hints(name):
    if name == "gcompress.split":
        pytest.importorskip("grpc", reason="grpcio is not installed: pip install -e .[split]")
    assert unannotated(importlib.import_module(name)) == {}
