"""InternVL 2.5 and later: tiles of the best aspect ratio, then a thumbnail, four patches shuffled into one token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL.Image import Image
from torch import Tensor

from interp_vlm.models.anatomy import Family
from interp_vlm.models.llava import layer_read
from interp_vlm.models.tiles import Tower, tiled_grid
from interp_vlm.tokens.grid import ImageGrid

__all__ = ["FAMILY"]


def prompt(processor: Any, question: str, n_images: int) -> str:
    """InternVL's chat format, for processors saved without a chat template."""
    pictures = f"{processor.image_token}\n" * n_images
    return f"<|im_start|>user\n{pictures}{question}<|im_end|>\n<|im_start|>assistant\n"


def picture_rows(inputs: Mapping[str, Tensor], grids: list[ImageGrid]) -> dict[str, list[int]]:
    """`pixel_values` holds the tiles of all pictures one after another."""
    return {"pixel_values": [len(set(grid.views.tolist())) for grid in grids]} if grids else {}


def grids(
    processor: Any, images: list[list[Image]], inputs: Mapping[str, Any], model_config: Any
) -> list[list[ImageGrid]]:
    """Tiles in raster order, then the whole picture; a picture that fits one tile is shown once."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    settings, vision = processor.image_processor, model_config.vision_config
    classes = 1 if model_config.vision_feature_select_strategy == "default" else 0
    merge = round(1 / model_config.downsample_ratio)
    tower = Tower(vision.image_size[0], vision.patch_size[0], merge, classes)

    def grid(image: Image) -> ImageGrid:
        width, height = image.size
        across, down = get_optimal_tiled_canvas(
            (height, width), (tower.pixels, tower.pixels), settings.min_patches, settings.max_patches
        )
        return tiled_grid(image.size, (down, across), tower)

    return [[grid(image) for image in own] for own in images]


FAMILY = Family(
    name="internvl",
    architecture="InternVLForConditionalGeneration",
    prompt=prompt,
    grids=grids,
    picture_rows=picture_rows,
    vision_read=layer_read,
    vision_layers="model.vision_tower.encoder.layer",
)
