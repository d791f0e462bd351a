"""LLaVA-OneVision: a single picture whole and in tiles, several pictures each whole on a square, with newlines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from interp_vlm.models.anatomy import Family
from interp_vlm.models.anyres import anyres_grid
from interp_vlm.models.layout import squared
from interp_vlm.models.llava import layer_read
from interp_vlm.models.tiles import Tower
from interp_vlm.tokens.grid import ImageGrid, join_grids

__all__ = ["FAMILY"]


def prompt(processor: Any, question: str, n_images: int) -> str:
    """The chat format of the Qwen2 checkpoints, for processors saved without a chat template."""
    pictures = processor.image_token * n_images
    return f"<|im_start|>user {pictures}\n{question}<|im_end|><|im_start|>assistant\n"


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """One picture alone is tiled; of several each is padded to a square and followed by one newline token."""
    vision, pinpoints = model_config.vision_config, model_config.image_grid_pinpoints
    classes = 1 if model_config.vision_feature_select_strategy == "default" else 0
    most_tiles = int(model_config.vision_aspect_ratio.removeprefix("anyres_max_"))
    tower = Tower(vision.image_size, vision.patch_size, classes=classes)

    def square(image: Image) -> ImageGrid:
        found = tower.view(squared(image.size, tower.pixels), 0, 0)
        return replace(join_grids([found, 1]), vision_total=tower.rows)

    def tiled(image: Image) -> ImageGrid:
        return anyres_grid(image.size, pinpoints, tower, most_tiles)

    return [[(tiled if len(own) == 1 else square)(image) for image in own] for own in images]


FAMILY = Family(
    name="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    vision_read=layer_read,
    fusion="late",
)
