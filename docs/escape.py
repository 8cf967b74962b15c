"""Docstrings as Markdown: products like <P, D> are text there, not HTML."""

import re

from griffe import Extension, Object

OUTSIDE_CODE = re.compile(r"(`[^`]*`)|<(?=[A-Za-z/])")


class EscapeAngles(Extension):
    """Escape "<" before a letter, except in code and doctests."""

    def on_object(self, *, obj: Object, **_: object) -> None:
        """After an object was loaded."""
        if obj.docstring is not None:
            lines = obj.docstring.value.splitlines()
            obj.docstring.value = "\n".join(
                line if line.lstrip().startswith((">>>", "...")) else OUTSIDE_CODE.sub(lambda m: m[1] or "&lt;", line)
                for line in lines
            )
