"""For the documentation site (mkdocs.yml): examples in docstrings, from `>>>` to an empty line, are shown as code."""

import re

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*?(?=\n *\n|\Z)", re.DOTALL | re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    """Called by griffe for each object whose docstring it has read."""

    def on_object(self, *, obj, **_):
        if not obj.is_alias and obj.docstring:
            fence = r"\1```pycon" + "\n" + r"\g<0>" + "\n" + r"\1```"
            obj.docstring.value = EXAMPLE.sub(fence, obj.docstring.value)
