"""Tiny vision-language models of the real Hugging Face classes, trained on digit scenes and shipped with the package.

Only paths and cards are read here; nothing heavy is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interp_vlm.errors import ModelError

__all__ = ["NAMES", "card", "path"]

NAMES = ("llava", "paligemma", "qwen2_vl")
"""The embedded models; each is loaded as `testbed:NAME`."""


def path(name: str) -> Path:
    """Folder of an embedded model, laid out as on the Hugging Face hub.

    Args:
        name: one of `NAMES`, with or without the prefix `testbed:`.

    Raises:
        ModelError: if there is no such embedded model.

    Example:
        >>> path("llava").name
        'llava'
    """
    bare = name.removeprefix("testbed:")
    folder = Path(__file__).parent / "weights" / bare
    if bare not in NAMES or not (folder / "config.json").is_file():
        raise ModelError(
            f"no embedded model is called {name!r}",
            expected=" or ".join(NAMES),
            remedy="choose one of them, or give the path of a model folder",
        )
    return folder


def card(name: str) -> dict[str, Any]:
    """The model card of an embedded model: how it was trained and every measured figure with its interval.

    Example:
        >>> card("llava")["family"]
        'llava'
    """
    return json.loads((path(name) / "card.json").read_text())
