"""What the documentation site needs beside the plugins of mkdocs.yml, which names this file as its hooks.

- Pages that stand outside of docs/ (PLACES) come in, README.md as the first; so do notebooks, and files of code that a
  page links to.
- A link that is right on a code host, where files are beside files, is right in the site as well.
- A heading has the anchor that a code host gives it (`anchor`).
- The package lies in a folder as it is installed, with the plugins in it, for what reads docstrings from files.

tests/test_documents.py checks links and anchors by the same functions, without building anything.
"""

import json
import os
import pathlib
import re
import shutil

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Where in the site a page of the repository is, if not at its own place below docs/.
PLACES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(!?\[[^\]\n]*(?:\n[^\]\n]+)?\])\(([^()\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def anchor(title, separator="-"):
    """The anchor of a heading: small letters, digits, `-` and `_`; each space is a `-`."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def anchors(text):
    """The anchors of all headings in a page of Markdown."""
    titles = re.findall(r"^#{1,6} +(.*?) *#*$", FENCE.sub("", text), re.MULTILINE)
    return {anchor(LINK.sub(lambda match: match[1].strip("[]"), title)) for title in titles}


def links(text):
    """The targets of all links and pictures in a page of Markdown, outside of blocks of code."""
    return [target for _, target in LINK.findall(FENCE.sub("", text))]


def resolved(target, source):
    """(path in the repository, anchor) of a link in the page `source`; None if it leads out of the repository."""
    path, _, place = target.partition("#")
    if re.match(r"[a-z]+:", target):
        return None
    found = os.path.normpath(os.path.join(os.path.dirname(source), path)) if path else source
    return found, place


def site_place(path):
    """Where in the site a file of the repository is, relative to the site's root; pages end in .md."""
    if path in PLACES:
        return PLACES[path]
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}.md"


def moved(text, source):
    """A page of the repository with its links as the site has them."""
    here = os.path.dirname(site_place(source))

    def replace(match):
        found = resolved(match[2], source)
        if found is None or not (ROOT / found[0]).is_file():
            return match[0]
        target = os.path.relpath(site_place(found[0]), here or ".")
        return f"{match[1]}({target}{'#' + found[1] if found[1] else ''})"

    return LINK.sub(replace, text)


def notebook_page(path):
    """A Jupyter notebook as a page of Markdown, with the outputs that it holds."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text'])}```")
            picture = output.get("data", {}).get("image/png")
            if picture:
                parts.append(f"![what the cell draws](data:image/png;base64,{''.join(picture.split())})")
    return "\n\n".join(parts) + "\n"


def code_page(path):
    """A file of code as a page of Markdown."""
    return f"# {path}\n\n```{'python' if path.endswith('.py') else 'text'}\n{(ROOT / path).read_text()}\n```\n"


def lay_out(folder):
    """Make a folder with the package `gcompress` as setup.py installs it, by links."""
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "gcompress"
    package.mkdir(parents=True)
    parts = {path.name: path for path in (ROOT / "gcompress").iterdir()}
    for name, path in {**parts, "plugins": ROOT / "plugins"}.items():
        (package / name).symlink_to(path)


def on_config(config):
    """Called by mkdocs: anchors are made by `anchor`, and docstrings found where the package is laid out."""
    folder = ROOT / "build" / "documented"
    lay_out(folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder)]
    config.mdx_configs.setdefault("toc", {})["slugify"] = anchor
    return config


on_config.mkdocs_priority = 100  # before the plugins look at their settings


def on_files(files, config):
    """Called by mkdocs: add the pages that are not Markdown files below docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    def add(path, text, inclusion=InclusionLevel.UNDEFINED):
        file = File.generated(config, site_place(path), content=moved(text, path))
        file.inclusion = inclusion
        files.append(file)

    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for path in PLACES:
        pages[path] = (ROOT / path).read_text()
        add(path, pages[path])
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        files.remove(file)
        path = f"docs/{file.src_uri}"
        pages[path] = notebook_page(ROOT / path)
        add(path, pages[path])
    targets = [resolved(target, source) for source, text in pages.items() for target in links(text)]
    for path in sorted({target[0] for target in targets if target} - set(pages)):
        if not path.startswith("docs/") and (ROOT / path).is_file():
            add(path, code_page(path), InclusionLevel.NOT_IN_NAV)
    return files


def on_page_markdown(markdown, page, config, files):
    """Called by mkdocs: links of a page below docs/ that lead out of it, and one chapter for each plugin."""
    if page.file.generated_by:
        return markdown
    plugins = sorted(path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py"))
    chapters = "\n\n".join(f"::: gcompress.plugins.{name}\n    options: {{filters: public}}" for name in plugins)
    return moved(markdown.replace("<!-- plugins -->", chapters), f"docs/{page.file.src_uri}")
