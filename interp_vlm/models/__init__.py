"""What is known about each family of models, and how to load and feed them."""

from interp_vlm.models.anatomy import Anatomy, Decoder, Family, describe
from interp_vlm.models.encode import encode, render
from interp_vlm.models.loading import load
from interp_vlm.models.processors import load_processor
from interp_vlm.models.registry import families, family_for, register

__all__ = [
    "Anatomy",
    "Decoder",
    "Family",
    "describe",
    "encode",
    "families",
    "family_for",
    "load",
    "load_processor",
    "register",
    "render",
]
