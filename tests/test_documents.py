"""What the guides and docstrings say of files, commands, tests and models is so."""

import importlib.util
import json
import re

import gcompress
import method_table
import site_hooks
from gcompress import cli
from tests.launching import REPOSITORY

FOLDERS = ("benchmarks", "csrc", "docs", "examples", "gcompress", "plugins", "tests", "tools")
GUIDES = [
    *(REPOSITORY / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    REPOSITORY / "examples" / "README.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
SOURCES = [path for name in FOLDERS for path in sorted((REPOSITORY / name).rglob("*.py"))]
MAKEFILE = REPOSITORY / "Makefile"


def load(path):
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(pattern, paths):
    """(path, what the pattern's groups matched) for every place in the files."""
    return [(path, match) for path in paths for match in re.findall(pattern, path.read_text(), re.MULTILINE)]


def test_every_file_that_is_named_exists():
    pattern = rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]*\.(?:cc|cu|cuh|h|json|md|png|py))\b"
    missing = {name for _, name in found(pattern, GUIDES + SOURCES) if not (REPOSITORY / name).is_file()}
    assert [name for name in missing if not re.search("NAME|MODULE", name)] == []


def test_the_tools_of_the_checks_have_one_version_everywhere():
    pinned = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    for hook, tool in (("ruff-pre-commit", "ruff"), ("mirrors-clang-format", "clang-format")):
        assert re.search(rf"{hook}\n +rev: v{re.escape(pinned[tool])}\n", hooks), tool
    assert f"clang-format {pinned['clang-format']} " in (REPOSITORY / ".clang-format").read_text()


def cells_of(path):
    """The pages of a notebook's cells of Markdown, as one text."""
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_every_link_leads_somewhere():
    """To a file of the repository and, behind a #, to a heading of that page."""
    pages = {path: path.read_text() for path in GUIDES}
    pages |= {path: cells_of(path) for path in (REPOSITORY / "docs").rglob("*.ipynb")}
    places = {path: site_hooks.anchors(text) for path, text in pages.items()}
    links = [
        (path.relative_to(REPOSITORY).as_posix(), target)
        for path, text in pages.items()
        for target in site_hooks.links(text)
    ]
    assert len(links) > 100
    dead = []
    for source, target in links:
        found = site_hooks.resolved(target, source)
        if found is not None:
            file = REPOSITORY / found[0]
            right = file.is_file() and (not found[1] or found[1] in places.get(file, ()))
            dead += [] if right else [f"{source}: {target}"]
    assert dead == []


def test_every_page_has_its_place_in_the_site():
    named = re.findall(r"[\w/]+\.md\b", (REPOSITORY / "mkdocs.yml").read_text().partition("\nnav:")[2])
    pages = [path.relative_to(REPOSITORY).as_posix() for path in GUIDES]
    pages += [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.ipynb")]
    assert sorted(named) == sorted(site_hooks.site_place(path) for path in pages)


def test_the_reference_has_every_public_name_command_and_variable():
    api, commands, variables = (
        "".join(path.read_text() for path in sorted((REPOSITORY / "docs" / "reference").glob(pattern)))
        for pattern in ("*.md", "command_line.md", "environment.md")
    )
    public = {name for name in gcompress.__all__ if name != "EXCHANGES" and not hasattr(gcompress.errors, name)}
    assert {name for name in public if not re.search(rf"^::: [\w.]+\.{name}$", api, re.MULTILINE)} == set()
    assert "::: gcompress.errors\n" in api
    assert {name for name in cli.COMMANDS if f"`gcompress {name}" not in commands} == set()
    used = {name for _, name in found(r"environ[^\n]*\b(GCOMPRESS_[A-Z_]+)", SOURCES + [REPOSITORY / "setup.py"])}
    assert {name for name in used if f"`{name}`" not in variables} == set()


def test_every_command_that_is_shown_has_its_options():
    scripts = [path for name in ("benchmarks", "examples", "tools") for path in (REPOSITORY / name).glob("*.py")]
    defined = {"--help", *(option for _, option in found(r'"(--[a-z][\w-]*)"', scripts))}
    commands = found(r"\b(?:benchmarks|examples|tools)/\w+\.py((?: +[^\s`|]+)*)", GUIDES + SOURCES)
    shown = {option for _, words in commands for option in re.findall(r"(?<=\s)--[a-z][\w-]*", words)}
    assert len(shown) > 10
    assert shown <= defined


def test_every_make_target_that_is_named_exists():
    targets = {target for _, target in found(r"^([a-z-]+):", [MAKEFILE])}
    named = {target for _, target in found(r"(?:^ {4}|`)make ([a-z-]+)", [*GUIDES, MAKEFILE])}
    assert {"train", "test"} <= named <= targets


def test_every_target_of_make_has_its_line_of_help():
    (_, phony), *_ = found(r"^\.PHONY: (.*)", [MAKEFILE])
    described = {target for _, target in found(r"^([a-z-]+):.*## ", [MAKEFILE])}
    assert set(phony.split()) - described == {"venv"}, "venv is another name of setup"


def test_every_test_that_is_named_exists():
    """A name may be cut short: `test_what_is_not_finite_…`."""
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("*.py"))
    names = found(r"`(Test[A-Z]\w+|test_\w+)(…?)`", GUIDES)
    assert names
    for _, (name, cut) in names:
        end = "" if cut else r"\b"
        assert re.search(rf"(?:class|def) {name}{end}", tests), name


def test_the_table_of_methods_is_that_of_the_methods():
    """`python tools/method_table.py` writes it."""
    page = method_table.PAGE.read_text()
    assert method_table.written(page) == page


def test_every_number_of_parameters_is_that_of_a_model():
    small_cnn, split_models = (load(REPOSITORY / "examples" / f"{name}.py") for name in ("small_cnn", "split_models"))
    split_network = split_models.small_network()
    models = (small_cnn.SmallConvNet(1, 10), split_network, split_network[:8])  # the last: the client's half
    counts = {sum(parameter.numel() for parameter in model.parameters()) for model in models}
    assert counts == {307_978, 426_234, 4848}
    named = {
        int(re.sub("[, ]", "", number))
        for _, number in found(r"\b(\d{1,3}(?:[, ]\d{3})+|\d{2,}) parameters", GUIDES + SOURCES)
    }
    assert named == counts
