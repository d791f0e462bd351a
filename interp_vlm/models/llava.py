"""LLaVA-1.5: CLIP or SigLIP patches, one token each, through a two-layer projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from PIL.Image import Image

from interp_vlm.models.anatomy import Family
from interp_vlm.models.layout import canvas_of
from interp_vlm.tokens.grid import ImageGrid, grid_from_geometry, join_grids, tower_rows

__all__ = ["FAMILY", "layer_read", "prompt"]


def prompt(processor: Any, question: str, n_images: int) -> str:
    """The prompt of LLaVA-1.5's model card, for processors saved without a chat template."""
    return f"USER: {(processor.image_token + chr(10)) * n_images}{question} ASSISTANT:"


def layer_read(config: Any) -> int:
    """The last vision layer read: `hidden_states` begins with the embeddings, so entry -2 of n + 1 is layer n - 2."""
    read = config.vision_feature_layer
    n = config.vision_config.num_hidden_layers
    return max((n + 1 + entry if entry < 0 else entry) - 1 for entry in ([read] if isinstance(read, int) else read))


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """One token per patch of the resized and cropped picture; with strategy "full" the class token comes first."""
    classes = int(processor.num_additional_image_tokens)  # tokens of the tower before its patches
    whole = model_config.vision_feature_select_strategy == "full" and classes
    patch = model_config.vision_config.patch_size

    def grid(image: Image) -> ImageGrid:
        height, width = inputs["pixel_values"].shape[-2:]
        rows, cols = height // patch, width // patch
        geometry = canvas_of(processor.image_processor, image.size, (width, height))
        feeding = tower_rows(rows, cols, start=classes)
        patches = grid_from_geometry(geometry, rows, cols, patch, vision_rows=feeding)
        found = join_grids([classes, patches]) if whole else patches
        total = classes + rows * cols
        return replace(found, vision_rows=np.arange(total)[:, None] if whole else feeding, vision_total=total)

    return [[grid(image) for image in own] for own in images]


FAMILY = Family(
    name="llava",
    architecture="LlavaForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    vision_read=layer_read,
    fusion="late",
)
