"""Docstrings of this project in the words that the site's reader of docstrings knows."""

from __future__ import annotations

import re
from typing import Any

import griffe

# `low, high: text`, with the lines that continue it
TOGETHER = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Sections(griffe.Extension):
    """Rewrites what the reader of docstrings does not take, before it reads.

    `Example:` becomes `Examples:`, the only section whose `>>>` lines are set as code; parameters that are described
    together get a line each.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = TOGETHER.sub(apart, text)


def apart(found: re.Match[str]) -> str:
    """Each of several names with the description that they share."""
    indent, names, about = found.groups()
    return "\n".join(f"{indent}{name}: {about}" for name in names.split(", "))
