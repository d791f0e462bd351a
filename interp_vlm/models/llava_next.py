"""LLaVA-NeXT (1.6): LLaVA that sees the whole picture first then its tiles, each row ended by a newline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL.Image import Image

from interp_vlm.models.anatomy import Family
from interp_vlm.models.anyres import tiles_grid, whole_grid
from interp_vlm.models.llava import layer_read, prompt
from interp_vlm.tokens.grid import ImageGrid, join_grids

__all__ = ["FAMILY"]


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """The whole picture, then the rows of its tiles with a newline token (without a place) after each."""
    classes = int(processor.num_additional_image_tokens)
    patch, pixels = model_config.vision_config.patch_size, model_config.vision_config.image_size
    pinpoints = processor.image_processor.image_grid_pinpoints

    def grid(image: Image) -> ImageGrid:
        tiles = tiles_grid(image.size, pinpoints, pixels, patch, classes)
        lines = np.arange(tiles.n).reshape(tiles.rows, tiles.cols)
        ended = np.concatenate([lines, np.full((tiles.rows, 1), -1)], axis=1)
        return join_grids([whole_grid(image.size, pixels, patch, classes), tiles.take(ended.ravel())])

    return [[grid(image) for image in own] for own in images]


FAMILY = Family(
    name="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    vision_read=layer_read,
    projector_is_tokens=False,
)
