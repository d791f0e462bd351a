"""The table of architectures: built-in rows, rows registered at run time, and rows of other packages."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from interp_vlm.errors import ModelError
from interp_vlm.models.anatomy import Family

__all__ = ["ENTRY_POINTS", "families", "family_for", "register"]

ENTRY_POINTS = "interp_vlm.families"
"""Entry-point group through which other packages add a `Family` or a list of them."""

_BUILT_IN = (
    "llava",
    "llava_next",
    "llava_onevision",
    "paligemma",
    "gemma3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
)
_table: dict[str, Family] = {}
_complete = False


def register(family: Family) -> Family:
    """Add a row to the table.

    Raises:
        ModelError: if its name or its architecture is already there.

    Example:
        >>> register(family_for("LlavaForConditionalGeneration"))
        Traceback (most recent call last):
        ...
        interp_vlm.errors.ModelError: LlavaForConditionalGeneration is already registered, as family 'llava'; ...
    """
    _fill()
    return _add(family)


def families() -> dict[str, Family]:
    """Every known row by architecture, entry points of installed packages included."""
    _fill()
    return dict(_table)


def family_for(model: Any) -> Family:
    """The row of a model's architecture.

    Args:
        model: a Hugging Face configuration, or the name of an architecture.

    Raises:
        ModelError: if the architecture is not in the table.
    """
    if isinstance(model, str):
        architecture = model
    else:
        architecture = next(iter(getattr(model, "architectures", None) or []), None) or type(model).__name__
    table = families()
    if architecture not in table:
        raise ModelError(
            f"architecture {architecture} is not known",
            expected=", ".join(sorted(table)),
            remedy=f"register a Family row, or ship one through the entry-point group {ENTRY_POINTS!r} "
            "(docs: how to add a family)",
        )
    return table[architecture]


def _add(family: Family) -> Family:
    if family.architecture in _table:
        raise ModelError(
            f"{family.architecture} is already registered, as family {_table[family.architecture].name!r}",
            remedy="register each architecture once",
        )
    if any(family.name == other.name for other in _table.values()):
        raise ModelError(f"a family called {family.name!r} is already registered", remedy="choose another name")
    _table[family.architecture] = family
    return family


def _fill() -> None:
    """Built-in rows first, so that no installed package can take their place; all of them or none."""
    global _complete
    if _complete:
        return
    _complete = True
    try:
        for name in _BUILT_IN:
            _add(importlib.import_module(f"interp_vlm.models.{name}").FAMILY)
        for point in entry_points(group=ENTRY_POINTS):
            for family in _shipped(point):
                _add(family)
    except BaseException:
        _table.clear()
        _complete = False
        raise


def _shipped(point: EntryPoint) -> list[Family]:
    found = point.load()
    rows = list(found) if isinstance(found, (list, tuple)) else [found]
    for row in rows:
        if not isinstance(row, Family):
            raise ModelError(
                f"entry point {point.name!r} of group {ENTRY_POINTS!r} gives a {type(row).__name__}",
                expected="a Family or a list of them",
                remedy="fix or uninstall the package that ships it",
            )
    return rows
