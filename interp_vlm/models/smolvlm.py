"""SmolVLM: Idefics 3 in small."""

from __future__ import annotations

from dataclasses import replace

from interp_vlm.models import idefics3
from interp_vlm.models.anatomy import Family

__all__ = ["FAMILY"]

FAMILY: Family = replace(idefics3.FAMILY, name="smolvlm", architecture="SmolVLMForConditionalGeneration")
