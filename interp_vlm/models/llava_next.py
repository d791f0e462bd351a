"""LLaVA-NeXT (1.6): LLaVA that sees the whole picture first, then its tiles, each row ended by a newline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Image

from interp_vlm.models.anatomy import Family
from interp_vlm.models.anyres import anyres_grid
from interp_vlm.models.llava import layer_read, prompt
from interp_vlm.models.tiles import Tower
from interp_vlm.tokens.grid import ImageGrid

__all__ = ["FAMILY"]


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """The whole picture, then the rows of its tiles with a newline token (without a place) after each."""
    vision, pinpoints = model_config.vision_config, model_config.image_grid_pinpoints
    tower = Tower(vision.image_size, vision.patch_size, classes=int(processor.num_additional_image_tokens))
    return [[anyres_grid(image.size, pinpoints, tower) for image in own] for own in images]


FAMILY = Family(
    name="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    vision_read=layer_read,
    fusion="late",
)
