"""Qwen2-VL: patches of a picture at its own resolution, four merged into one token, with positions in three axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL.Image import Image
from torch import Tensor

from interp_vlm.models.anatomy import Family
from interp_vlm.tokens.grid import Geometry, ImageGrid, grid_from_geometry, tower_rows

__all__ = ["FAMILY", "grids", "picture_rows", "prompt"]


def prompt(processor: Any, question: str, n_images: int) -> str:
    """Qwen's chat format, for processors saved without a chat template."""
    pictures = f"<|vision_start|>{processor.image_token}<|vision_end|>" * n_images
    return f"<|im_start|>user\n{pictures}{question}<|im_end|>\n<|im_start|>assistant\n"


def picture_rows(inputs: Mapping[str, Tensor], grids: list[ImageGrid]) -> dict[str, list[int]]:
    """`pixel_values` holds the patches of all pictures one after another, `image_grid_thw` one row per picture."""
    if "image_grid_thw" not in inputs:
        return {}
    return {"pixel_values": inputs["image_grid_thw"].prod(dim=1).tolist(), "image_grid_thw": [1] * len(grids)}


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """One token per merge x merge patches of the resized picture; the tower keeps those patches next to each other."""
    patch, merge = model_config.vision_config.patch_size, model_config.vision_config.spatial_merge_size
    shapes = iter(inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else [])

    def grid(image: Image) -> ImageGrid:
        _, high, wide = next(shapes)
        geometry = Geometry.resize(image.size, (wide * patch, high * patch))
        rows, cols = high // merge, wide // merge
        feeding = tower_rows(rows, cols, merge, grouped=True)
        found = grid_from_geometry(geometry, rows, cols, patch * merge, vision_rows=feeding)
        return replace(found, vision_total=high * wide)

    return [[grid(image) for image in own] for own in images]


FAMILY = Family(
    name="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    picture_rows=picture_rows,
    vision_read=lambda config: config.vision_config.num_hidden_layers - 1,
    vision="model.visual",
    vision_layers="model.visual.blocks",
    projector="model.visual.merger",
)
