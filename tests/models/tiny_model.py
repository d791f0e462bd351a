"""A tiny model with everything that the tests of the models room ask of it, and noise pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from interp_vlm.models import Anatomy, describe, encode, family_for
from interp_vlm.tokens.batch import Batch
from tests.tiny import build


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


class Tiny:
    """A tiny model with everything that its tests ask of it."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, attn: str = "sdpa") -> None:
        self.name, self.dtype = name, dtype
        self.model, self.processor = build(name, dtype=dtype, attn=attn)
        self.anatomy: Anatomy = describe(self.model)
        self.family = family_for(type(self.model).__name__)

    def encode(self, images: Any, questions: Any, **kwargs: Any) -> Batch:
        batch = encode(self.model.config, self.family, self.processor, images, questions, **kwargs)
        return batch.to("cpu", self.dtype)

    def forward(self, batch: Batch, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(**batch.inputs, **kwargs)

    def layer(self, index: int) -> torch.nn.Module:
        return self.model.get_submodule(f"{self.anatomy.layers}.{index}")

    def image_embeddings(self, batch: Batch) -> list[torch.Tensor]:
        """For each example, what the decoder receives at its image tokens."""
        seen = {}
        decoder = self.model.get_submodule(self.anatomy.decoder)
        hook = decoder.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
        try:
            self.forward(batch)
        finally:
            hook.remove()
        return [row[tokens.image] for row, tokens in zip(seen["inputs_embeds"], batch.tokens, strict=True)]
