"""Attention weights rebuilt from what attention read, so that sdpa stays on."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from interp_vlm.engine.access import Access, AttentionInputs
from interp_vlm.models.anatomy import Anatomy

__all__ = ["mix", "patterns", "rebuild"]


def rebuild(
    module: nn.Module, anatomy: Anatomy, inputs: AttentionInputs, rows: Int[Tensor, "batch row"]
) -> Float[Tensor, "batch head row key"]:
    """Attention weights of the asked query rows, softmax(q k / scale) under the mask that attention received.

    Args:
        module: the attention module, for its scale, q/k norms and soft cap.
        anatomy: the facts of the architecture.
        inputs: what the module received and projected.
        rows: query rows of each example.

    Returns:
        Weights in the model's dtype, where the layer computes, the softmax taken in float32 as Hugging Face does, or in
        float64 for a float64 model (where Hugging Face's eager attention stays in float32). A row that may attend
        nothing is all zero.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017, eq. 1; rotary embedding: Su et al., "RoFormer", 2021, eq. 34.
    """
    q = _heads(module, inputs.q, anatomy.n_heads, anatomy.d_head, anatomy.q_norm)
    k = _heads(module, inputs.k, anatomy.n_kv_heads, anatomy.d_head, anatomy.k_norm)
    q, k = _rotate(q, inputs.cos, inputs.sin), _rotate(k, inputs.cos, inputs.sin)
    rows = rows.to(q.device)
    example = torch.arange(len(rows), device=rows.device)[:, None]
    q = q[example, rows].transpose(1, 2)
    k = k.transpose(1, 2)
    k = k if inputs.before is None else torch.cat([inputs.before[0], k], dim=2)
    k = _shared(k, anatomy)
    scores = q @ k.transpose(-1, -2) * anatomy.scaling
    if anatomy.softcap is not None:
        scores = torch.tanh(scores / anatomy.softcap) * anatomy.softcap
    if inputs.keep is None:
        keys = torch.arange(k.shape[2], device=rows.device)
        keep = (keys[None, None, :] <= rows[:, :, None])[:, None]
    else:
        # The mask may hold one row for the whole batch.
        mask = inputs.keep.expand(len(rows), -1, -1, -1)
        keep = mask[example, :, rows].transpose(1, 2)
    scores = scores.masked_fill(~keep, -torch.inf)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=wide).nan_to_num(0.0).to(scores.dtype)


def patterns(
    access: Access,
    attention: MutableMapping[int, AttentionInputs],
    layers: Sequence[int],
    rows: Int[Tensor, "batch row"],
    real: Bool[Tensor, "batch row"],
) -> Float[Tensor, "batch layer head row key"]:
    """Rebuilt weights of several layers, whose inputs are taken out of `attention`; rows that are not real are zero.

    They lie where `rows` does.
    """
    found = []
    for layer in layers:
        module = access.inside(layer, access.anatomy.attn)._module
        weights = rebuild(module, access.anatomy, attention.pop(layer), rows.clamp(min=0)).to(rows.device)
        found.append(weights.masked_fill(~real[:, None, :, None], 0))
    return torch.stack(found, dim=1)


def mix(
    weights: Float[Tensor, "batch head row key"], inputs: AttentionInputs, anatomy: Anatomy
) -> Float[Tensor, "batch row head d_head"]:
    """What the weights make of the values: the site `z`, as the rebuilt weights explain it."""
    values = inputs.v.unflatten(-1, (anatomy.n_kv_heads, anatomy.d_head)).transpose(1, 2)
    values = values if inputs.before is None else torch.cat([inputs.before[1], values], dim=2)
    values = _shared(values, anatomy)
    return (weights @ values).transpose(1, 2)


def _heads(module: nn.Module, flat: Tensor, heads: int, width: int, norm: str | None) -> Tensor:
    split = flat.unflatten(-1, (heads, width))
    return split if norm is None else getattr(module, norm)(split)


def _shared(x: Float[Tensor, "batch kv_head pos d_head"], anatomy: Anatomy) -> Float[Tensor, "batch head pos d_head"]:
    """Keys or values once for each query head."""
    times = anatomy.n_heads // anatomy.n_kv_heads
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def _rotate(x: Float[Tensor, "batch pos head d_head"], cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]
