"""Qwen3-VL: Qwen2-VL with features of earlier vision layers added between the first decoder layers."""

from __future__ import annotations

from interp_vlm.models import qwen2_vl
from interp_vlm.models.anatomy import Family

__all__ = ["FAMILY"]

FAMILY = Family(
    name="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    prompt=qwen2_vl.prompt,
    grids=qwen2_vl.grids,
    picture_rows=qwen2_vl.picture_rows,
    vision_read=lambda config: config.vision_config.num_hidden_layers - 1,
    vision="model.visual",
    vision_layers="model.visual.blocks",
    projector="model.visual.merger",
    between_layers=True,
)
