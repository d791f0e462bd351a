"""Idefics 3 and SmolVLM: tiles with a text marker each, then the whole picture, patches shuffled into fewer tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL.Image import Image
from torch import Tensor

from interp_vlm.models.anatomy import Family
from interp_vlm.models.layout import edges
from interp_vlm.models.tiles import Tower, tiled_grid
from interp_vlm.tokens.grid import ImageGrid

__all__ = ["FAMILY", "grids", "picture_rows", "prompt"]

_LARGEST = 4096  # no edge is resized beyond this


def prompt(processor: Any, question: str, n_images: int) -> str:
    """The chat format of Idefics 3, for processors saved without a chat template."""
    pictures = processor.image_token * n_images
    return f"User:{pictures}{question}<end_of_utterance>\nAssistant:"


def picture_rows(inputs: Mapping[str, Tensor], grids: list[ImageGrid]) -> dict[str, list[int]]:
    """All image tensors have one row per example, with as many entries as the example with the most tiles."""
    return {}


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """Tiles in raster order, then the whole picture; without image splitting the whole picture alone."""
    settings, vision = processor.image_processor, model_config.vision_config
    tile = edges(settings.max_image_size)["longest_edge"]
    tower = Tower(tile, vision.patch_size, model_config.scale_factor)

    def grid(image: Image) -> ImageGrid:
        tiles = _tiles(image.size, edges(settings.size), tile) if settings.do_image_splitting else (0, 0)
        return tiled_grid(image.size, tiles, tower)

    return [[grid(image) for image in own] for own in images]


def _tiles(size: tuple[int, int], wanted: dict[str, int], tile: int) -> tuple[int, int]:
    """Rows and columns of tiles, by the roundings of the image processor's two resizes."""
    width, height = size
    ratio = width / height
    if "longest_edge" in wanted:
        longest = wanted["longest_edge"]
        short = int(longest / ratio if ratio >= 1 else longest * ratio)
        width, height = _oriented(longest, max(short + short % 2, 1), ratio)
        if longest > _LARGEST:
            ratio = width / height
            short = int(_LARGEST / ratio if ratio >= 1 else _LARGEST * ratio)
            width, height = _oriented(_LARGEST, max(short, 1), ratio)
    else:
        width, height = wanted["width"], wanted["height"]
    ratio = width / height
    if width >= height:
        across = math.ceil(width / tile)
        down = math.ceil(int(across * tile / ratio) / tile)
    else:
        down = math.ceil(height / tile)
        across = math.ceil(int(down * tile * ratio) / tile)
    return down, across


def _oriented(longest: int, shortest: int, ratio: float) -> tuple[int, int]:
    return (longest, shortest) if ratio >= 1 else (shortest, longest)


FAMILY = Family(
    name="idefics3",
    architecture="Idefics3ForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    picture_rows=picture_rows,
    vision_read=lambda config: config.vision_config.num_hidden_layers - 1,
    decoder="model.text_model",
    layers="model.text_model.layers",
    final_norm="model.text_model.norm",
    vision="model.vision_model",
    vision_layers="model.vision_model.encoder.layers",
    projector="model.connector",
    fusion="late",
)
