"""The settings in which every family is tested: attention, precision and padding; models and batches made once."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

import interp_vlm as iv
from tests.engine import reference
from tests.tiny import FAMILIES, build

__all__ = ["SETTINGS", "Setting", "pictures"]

QUESTIONS = ("is there a cat?", "what colour is the big square on the left?", "how many blue dogs?")
EQUAL = ("is there a cat?", "is there a dog?", "is there a cat?")
# Hugging Face's norms compute in single precision, whatever the model's: another order of summation shows.
ROUNDING = 1e-5
SIZES = ((40, 30), (40, 30), (30, 40))


def pictures(seed: int, sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Image.Image]:
    """Noise pictures of the given (width, height)."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (high, wide, 3), dtype=np.uint8)) for wide, high in sizes]


@dataclass(frozen=True)
class Setting:
    """One family in one attention implementation, precision and padding."""

    family: str
    attn: str = "sdpa"
    bits: int = 64
    padding: str = "left"

    @property
    def dtype(self) -> torch.dtype:
        return {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}[self.bits]

    @property
    def tolerance(self) -> float:
        """Largest difference of a logit, relative to the largest logit."""
        if self.bits == 64 and self.eager:  # Hugging Face's eager attention takes its softmax in float32 all the same
            return ROUNDING
        return {16: 5e-2, 32: 1e-4, 64: 1e-10}[self.bits]

    @property
    def eager(self) -> bool:
        return reference.decoder(self.raw).config._attn_implementation == "eager"

    @property
    def vlm(self) -> iv.VLM:
        return _vlm(self.family, self.attn, self.dtype)

    @property
    def raw(self) -> Any:
        return reference.raw(self.family, self.attn, self.dtype)

    @property
    def batch(self) -> iv.Batch:
        """Three examples of mixed length, their pictures of equally many tokens."""
        return _batch(self, 0)

    @property
    def corrupt(self) -> iv.Batch:
        """The same questions about other pictures."""
        return _batch(self, 1)

    @property
    def unpadded(self) -> bool:
        """Whether the examples are of equal length."""
        # In double precision the lowest value overflows to -inf in Hugging Face's float32 softmax: rows that may attend
        # nothing, as left padding has, become NaN and spread. So there the examples need no padding.
        return self.eager and self.bits == 64 and self.padding == "left"

    def __str__(self) -> str:
        return f"{self.family}-{self.attn}-{self.bits}-{self.padding}"


@functools.cache
def _vlm(family: str, attn: str, dtype: torch.dtype) -> iv.VLM:
    model, processor = build(family, attn=attn, dtype=dtype)
    return iv.VLM(model, processor, family)


@functools.cache
def _batch(setting: Setting, seed: int) -> iv.Batch:
    questions, sizes = (EQUAL, SIZES[:1] * 3) if setting.unpadded else (QUESTIONS, SIZES)
    return setting.vlm.encode(pictures(seed, sizes), questions, padding=setting.padding)


SETTINGS = [
    Setting(family, attn, bits, padding)
    for family, attn, bits, padding in itertools.product(FAMILIES, ("sdpa", "eager"), (32, 64), ("left", "right"))
]
