"""Encoded examples, ready for the model, with the map of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from interp_vlm.errors import DataError
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """What the processor made of pictures and questions, one row per example.

    Attributes:
        inputs: what the model's forward takes.
        tokens: one map per row.
        images: the original pictures of each row (RGB, EXIF-transposed).
        questions: the bare questions.
        prompts: the text that was handed to the processor.
        padding: the side that shorter rows are padded on, "left" or "right".
        image_rows: for each example, which rows [start, stop) of each image tensor are its own. Tensors not named
            have one row per example.
    """

    inputs: Mapping[str, Tensor]
    tokens: tuple[TokenMap, ...]
    images: tuple[tuple[Image, ...], ...]
    questions: tuple[str, ...]
    prompts: tuple[str, ...]
    padding: str = "left"
    image_rows: tuple[Mapping[str, tuple[int, int]], ...] = ()

    def __post_init__(self) -> None:
        if self.padding not in ("left", "right"):
            raise DataError(f"padding {self.padding!r}", expected="'left' or 'right'")
        rows = self.image_rows or ({},) * len(self.tokens)
        counts = {
            "tokens": len(self.tokens), "images": len(self.images), "questions": len(self.questions),
            "prompts": len(self.prompts), "image_rows": len(rows),
        }  # fmt: skip
        if len(set(counts.values())) > 1:
            raise DataError(f"a batch of {counts}", expected="one entry per example in each")
        object.__setattr__(self, "inputs", dict(self.inputs))
        object.__setattr__(self, "image_rows", tuple(dict(row) for row in rows))
        pictured = (replace(tokens, pictures=tuple(own)) for tokens, own in zip(self.tokens, self.images, strict=True))
        object.__setattr__(self, "tokens", tuple(pictured))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """The answer position of each row: its last prompt token."""
        return torch.cat([tokens.last for tokens in self.tokens]) if self.tokens else torch.empty(0, dtype=torch.long)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The batch with its inputs on a device; `dtype` converts floating inputs (pixels) alone."""
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else None)
            for name, tensor in self.inputs.items()
        }
        return replace(self, inputs=moved)

    def __getitem__(self, index: int | slice) -> Batch:
        """Rows of the batch, at their padded length, with their own image tensors."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"row {index} of a batch of {len(self)}")
            index = slice(index % len(self), index % len(self) + 1)
        chosen = list(range(len(self)))[index]
        return Batch(
            {name: self._rows_of(name, tensor, chosen) for name, tensor in self.inputs.items()},
            tuple(self.tokens[i] for i in chosen), tuple(self.images[i] for i in chosen),
            tuple(self.questions[i] for i in chosen), tuple(self.prompts[i] for i in chosen),
            self.padding, self._renumbered(chosen),
        )  # fmt: skip

    def _rows_of(self, name: str, tensor: Tensor, chosen: list[int]) -> Tensor:
        if not any(name in rows for rows in self.image_rows):
            return tensor[chosen]
        bounds = [self.image_rows[i].get(name, (0, 0)) for i in chosen]
        return torch.cat([tensor[start:stop] for start, stop in bounds] or [tensor[:0]])

    def _renumbered(self, chosen: list[int]) -> tuple[dict[str, tuple[int, int]], ...]:
        filled: dict[str, int] = {}
        rows = []
        for i in chosen:
            own = {}
            for name, (start, stop) in self.image_rows[i].items():
                first = filled.get(name, 0)
                own[name] = (first, first + stop - start)
                filled[name] = first + stop - start
            rows.append(own)
        return tuple(rows)

    def _repr_html_(self) -> str:
        from interp_vlm.tokens.token_html import batch_html

        return batch_html(self)

    def __repr__(self) -> str:
        width = len(self.tokens[0].ids) if self.tokens else 0
        images = sum(len(own) for own in self.images)
        counted = ", ".join(
            f"{count} {noun}{'' if count == 1 else 's'}"
            for count, noun in ((len(self), "example"), (images, "picture"), (width, "position"))
        )
        return f"Batch({counted}, {self.padding} padding)"
