"""Gemma 3: SigLIP patches averaged in squares, pictures that see themselves, sliding and full attention in turn."""

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
    """Gemma's turns, for processors saved without a chat template."""
    pictures = processor.boi_token * n_images
    return f"<bos><start_of_turn>user\n{pictures}{question}<end_of_turn>\n<start_of_turn>model\n"


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """One token per square of patches of the picture stretched to the tower's square (no pan and scan)."""
    vision = model_config.vision_config
    side = round(model_config.mm_tokens_per_image**0.5)
    pool = vision.image_size // vision.patch_size // side

    def grid(image: Image) -> ImageGrid:
        height, width = inputs["pixel_values"].shape[-2:]
        geometry = canvas_of(processor.image_processor, image.size, (width, height))
        feeding = tower_rows(side, side, pool)
        found = grid_from_geometry(geometry, side, side, vision.patch_size * pool, vision_rows=feeding)
        return replace(found, vision_total=feeding.size)

    return [[grid(image) for image in own] for own in images]


FAMILY = Family(
    name="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    vision_read=lambda config: config.vision_config.num_hidden_layers - 1,
    prefix="image_blocks",
)
