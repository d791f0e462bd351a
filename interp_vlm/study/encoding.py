"""Examples as encoded batches, and the columns that say which question a row is about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["batches", "identity"]


def batches(vlm: VLM, examples: Sequence[Example], size: int) -> Iterator[tuple[Sequence[Example], Batch]]:
    """The examples in batches of at most `size`, encoded."""
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        yield some, vlm.encode([example.image for example in some], [example.question for example in some])


def identity(example: Example, condition: str) -> dict[str, Any]:
    """The columns that say which question a row is about."""
    category = example.meta.get("negative") or example.meta.get("category") or ""
    return {
        "condition": condition,
        "example": example.id,
        "group": example.group,
        "kind": example.kind,
        "category": str(category),
        "question": example.question,
        "expected": example.answer,
    }
