"""Examples as encoded batches, and the columns that say which question a row is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from interp_vlm.engine.batches import batches

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["identity", "measured"]

T = TypeVar("T")


def measured(
    vlm: VLM,
    examples: Sequence[Example],
    size: int,
    measure: Callable[[Sequence[Example], Batch], Iterable[T]],
) -> list[T]:
    """What `measure` says of each batch of about equal prompts, end to end; of smaller ones where memory runs out.

    Args:
        vlm: the model.
        examples: to be measured.
        size: the most examples of one batch.
        measure: rows of some examples and their batch; what it does besides is done again when memory runs out.
    """

    def rows(numbers: Sequence[int], batch: Batch) -> list[T]:
        return list(measure([examples[number] for number in numbers], batch))

    return [row for _, some in batches(vlm, examples, size).map(rows) for row in some]


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
