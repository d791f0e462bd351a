"""Qwen2.5-VL: Qwen2-VL whose vision tower works in windows, and keeps its rows in the windows' order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL.Image import Image

from interp_vlm.models import qwen2_vl
from interp_vlm.models.anatomy import Family
from interp_vlm.tokens.grid import ImageGrid

__all__ = ["FAMILY"]


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """Tokens as in Qwen2-VL; the rows that feed them lie window after window."""
    vision = model_config.vision_config
    window = vision.window_size // vision.spatial_merge_size // vision.patch_size

    def windowed(grid: ImageGrid) -> ImageGrid:
        row, col = grid.cells.T
        # the last key is the first to count: windows in raster order, tokens in raster order within them
        order = np.lexsort((col % window, row % window, col // window, row // window))
        place = np.argsort(order)
        assert grid.vision_rows is not None
        return replace(grid, vision_rows=grid.vision_rows[place])

    return [[windowed(grid) for grid in own] for own in qwen2_vl.grids(processor, images, inputs, model_config)]


FAMILY = Family(
    name="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    prompt=qwen2_vl.prompt,
    grids=grids,
    picture_rows=qwen2_vl.picture_rows,
    vision_read=lambda config: config.vision_config.num_hidden_layers - 1,
    vision="model.visual",
    vision_layers="model.visual.blocks",
    projector="model.visual.merger",
)
