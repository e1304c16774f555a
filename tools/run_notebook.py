#!/usr/bin/env python3
"""Run a notebook's cells in order, without Jupyter, and write what they print and draw into it.

    python tools/run_notebook.py docs/tutorials/first_compression.ipynb

tests/test_snippets.py runs the notebook by `outputs_of` and compares what is printed with what is stored.
"""

import base64
import contextlib
import io
import json
import pathlib
import sys


def source_of(cell):
    """The text of a cell."""
    return "".join(cell["source"])


def outputs_of(cells):
    """[(text printed, pictures as PNG bytes)] for each of a notebook's cells of code."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, outputs = {"__name__": "__main__"}, []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        printed, pictures = io.StringIO(), []
        with contextlib.redirect_stdout(printed):
            exec(compile(source_of(cell), "<cell>", "exec"), names)
        for number in pyplot.get_fignums():
            picture = io.BytesIO()
            pyplot.figure(number).savefig(picture, dpi=80, metadata={"Software": None})
            pictures.append(picture.getvalue())
        pyplot.close("all")
        outputs.append((printed.getvalue(), pictures))
    return outputs


def stored(text, pictures):
    """Outputs in the form of a notebook."""
    streams = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}] if text else []
    return streams + [
        {
            "data": {"image/png": base64.b64encode(picture).decode()},
            "metadata": {},
            "output_type": "display_data",
        }
        for picture in pictures
    ]


def main():
    path = pathlib.Path(sys.argv[1])
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(code, outputs_of(code), strict=True), 1):
        cell["outputs"], cell["execution_count"] = stored(*outputs), number
        sys.stdout.write(outputs[0])
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
