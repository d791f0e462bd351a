"""PaliGemma 1 and 2: SigLIP patches, one token each, before a prompt in which everybody sees everybody."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from interp_vlm.models.anatomy import Family
from interp_vlm.models.layout import canvas_of
from interp_vlm.tokens.grid import ImageGrid, grid_from_geometry, tower_rows

__all__ = ["FAMILY"]


def prompt(processor: Any, question: str, n_images: int) -> str:
    """Pictures, then the question; the processor itself adds <bos> between them and a line break at the end."""
    return processor.image_token * n_images + question


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """One token per patch of the picture stretched to the tower's square."""
    patch = model_config.vision_config.patch_size

    def grid(image: Image) -> ImageGrid:
        height, width = inputs["pixel_values"].shape[-2:]
        rows, cols = height // patch, width // patch
        geometry = canvas_of(processor.image_processor, image.size, (width, height))
        found = grid_from_geometry(geometry, rows, cols, patch, vision_rows=tower_rows(rows, cols))
        return replace(found, vision_total=rows * cols)

    return [[grid(image) for image in own] for own in images]


FAMILY = Family(
    name="paligemma",
    architecture="PaliGemmaForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    vision_read=lambda config: config.vision_config.num_hidden_layers - 1,
    prefix="bidirectional",
)
