#!/usr/bin/env python3
"""Write the table of all methods in docs/METHODS.md, from the methods themselves: `python tools/method_table.py`.

A row has a method's first example, its class, the first sentence of its docstring, and the bits that the example's
payload takes for each of 2^20 normal entries. A test compares the page with this table.
"""

import pathlib

import torch

from gcompress import from_spec, methods

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "METHODS.md"
BEGIN, END = "<!-- methods: written by tools/method_table.py -->", "<!-- end of methods -->"
NUMEL = 1 << 20


def table():
    """The Markdown table, a row for each method of this library in the order of their names."""
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0))
    rows = ["| spec | class | what it does | bits per entry |", "|---|---|---|---|"]
    for _, method in sorted(methods().items()):
        if method.__module__.startswith("gcompress.") and method.examples:
            compressor = from_spec(method.examples[0])
            payload, _ = compressor.compress(values)
            sentence = method.__doc__.partition("\n")[0]
            bits = 8 * payload.numel() / NUMEL
            unbiased = " Unbiased." if compressor.unbiased else ""
            rows.append(f"| `{compressor}` | `{method.__name__}` | {sentence}{unbiased} | {bits:.3f} |")
    return "\n".join(rows)


def written(text):
    """The page's text with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
