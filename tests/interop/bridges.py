"""Bridges over the tiny models of every family, made once, and what they answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import interp_vlm as iv
from interp_vlm.interop.transformer_lens import to_bridge
from tests.engine.settings import Setting

__all__ = ["Hooks", "bridge", "clean", "logits", "setting"]

Hooks = Sequence[tuple[str, Callable[..., Any]]]


def setting(family: str, padding: str = "left") -> Setting:
    """Eager attention in single precision: what TransformerLens computes."""
    return Setting(family, "eager", 32, padding)


@functools.cache
def bridge(family: str) -> Any:
    return to_bridge(setting(family).vlm)


@functools.cache
def clean(family: str) -> Tensor:
    """The logits of a family's batch without hooks."""
    return logits(bridge(family), setting(family).batch)


def logits(over: Any, batch: iv.Batch, hooks: Hooks = ()) -> Tensor:
    """All logits of a bridge, (example, pos, vocab)."""
    inputs = dict(batch.inputs)
    with torch.no_grad():
        return over.run_with_hooks(inputs.pop("input_ids"), fwd_hooks=list(hooks), **inputs)
