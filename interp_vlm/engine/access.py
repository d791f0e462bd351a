"""Where the sites lie in a running model: reading and writing one site at one layer inside an nnsight trace.

This module and `plain`, which does the reading and writing, are the only ones that touch nnsight's envoys. Everything
else sees canonical shapes: activations (batch, pos, ...), masks as True = may attend (batch, 1 or head, query, key).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from nnsight.intervention.envoy import Envoy
from torch import Tensor

from interp_vlm.engine import plain
from interp_vlm.engine.prefix import Prefix
from interp_vlm.errors import InterventionError
from interp_vlm.models.anatomy import Anatomy
from interp_vlm.sites import SITES

__all__ = ["Access", "AttentionInputs", "as_keep", "place_of", "places_of"]


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What one attention module received, and what it computed: enough to rebuild its weights.

    Attributes:
        keep: the mask, True where attention is allowed, or None when the module was left to be causal by itself.
        cos, sin: rotary position embeddings.
        q, k, v: outputs of the projections, before q/k norms and rotary embedding.
        before: keys (rotated) and values that come before those of the rows computed here, or None.
    """

    keep: Bool[Tensor, "#batch heads query key"] | None
    cos: Float[Tensor, "#batch pos d_head"]
    sin: Float[Tensor, "#batch pos d_head"]
    q: Float[Tensor, "batch pos q_width"]
    k: Float[Tensor, "batch pos kv_width"]
    v: Float[Tensor, "batch pos kv_width"]
    before: tuple[Float[Tensor, "batch head prior d_head"], Float[Tensor, "batch head prior d_head"]] | None = None


class Access:
    """The sites of one model, by name and layer, on an nnsight tree.

    Args:
        root: the wrapped Hugging Face model.
        anatomy: the facts of its architecture.
    """

    def __init__(self, root: Envoy, anatomy: Anatomy) -> None:
        self.root, self.anatomy = root, anatomy

    # nnsight's envoys serve `.input` and `.output` through descriptors that type checkers cannot follow: hence Any.

    def layer(self, index: int) -> Any:
        """The envoy of a decoder layer."""
        return self.find(self.anatomy.layers)[index]

    def find(self, path: str, start: Any = None) -> Any:
        """The envoy at a dotted path."""
        envoy: Any = self.root if start is None else start
        for part in path.split("."):
            envoy = envoy[int(part)] if part.isdigit() else getattr(envoy, part)
        return envoy

    def inside(self, layer: int, path: str) -> Any:
        """The envoy at a path relative to a decoder layer."""
        return self.find(path, self.layer(layer))

    def read(self, site: str, layer: int) -> Tensor:
        """The live value of a site in canonical shape; clone it before changing it, or keeping it beside an edit."""
        if site == "attn_mask":
            _, kwargs = self.inside(layer, self.anatomy.attn).inputs
            return as_keep(kwargs["attention_mask"], kwargs["hidden_states"], kwargs.get("past_key_values"), layer)
        return plain.read(self.root, place_of(self.anatomy, site, layer))

    def write(self, site: str, layer: int, value: Tensor) -> None:
        """Make the model go on with `value` at this site."""
        plain.write(self.root, place_of(self.anatomy, site, layer), value)

    def read_attention(self, layer: int) -> AttentionInputs:
        """Everything that attention of one layer read, for rebuilding its weights after the run."""
        a, attn = self.anatomy, self.inside(layer, self.anatomy.attn)
        _, kwargs = attn.inputs
        found, (cos, sin) = kwargs["attention_mask"], kwargs["position_embeddings"]
        keep = None if found is None else as_keep(found, kwargs["hidden_states"], None, layer)
        q, k, v = (self.find(name, attn).output for name in (a.q, a.k, a.v))
        past = kwargs.get("past_key_values")
        return AttentionInputs(keep, cos, sin, q, k, v, past.before(layer) if isinstance(past, Prefix) else None)

    def read_call(self, layer: int) -> dict[str, Any]:
        """The keyword arguments of a decoder layer, without its key-value cache."""
        return _without_cache(self.layer(layer).inputs[1])

    def read_decoder_call(self) -> dict[str, Any]:
        """The keyword arguments of the decoder, without its key-value cache."""
        return _without_cache(self.find(self.anatomy.decoder).inputs[1])

    def read_logits(self) -> Tensor:
        """The logits of the whole forward pass, (batch, pos, vocab)."""
        return self.root.output.logits


def as_keep(found: Tensor | None, hidden: Tensor, past: Any, layer: int) -> Bool[Tensor, "batch heads query key"]:
    """Any attention mask as booleans, True where attention is allowed.

    Args:
        found: the mask that the module received: None (causal by itself), boolean, or additive.
        hidden: the module's input, for the number of rows.
        past: the module's key-value cache, which tells how many keys came before in generation.
        layer: the module's layer, to ask the cache.

    Raises:
        InterventionError: for a mask of another shape (flash attention's, for example).
    """
    if found is None:
        batch, rows = hidden.shape[:2]
        before = int(past.get_seq_length(layer)) if past is not None else 0
        allowed = torch.ones(rows, before + rows, dtype=torch.bool, device=hidden.device).tril(before)
        return allowed[None, None].expand(batch, 1, -1, -1)
    if not isinstance(found, Tensor) or found.dim() != 4:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InterventionError(
            f"attention received a mask of shape {shape}",
            expected="(batch, heads, query, key)",
            remedy="load the model with attn_implementation='sdpa' or 'eager'",
        )
    # An additive mask blocks with the dtype's lowest value or -inf; anything else it adds is a bias that stays allowed.
    return found if found.dtype == torch.bool else found > torch.finfo(found.dtype).min / 2


def _without_cache(call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("past_key_values", "use_cache")}


def place_of(anatomy: Anatomy, site: str, layer: int) -> tuple[str, str, tuple[int, int] | None]:
    """Where a site lies, and how it is read there, as `plain.read` takes it."""
    a = anatomy
    if site == "projector_out":
        return (a.decoder, "embeddings", None)
    if site == "vision_post":
        return (f"{a.vision_layers}.{layer}", "output", None)
    path, how = {
        "resid_pre": ("", "input"),
        "attn_mask": (a.attn, "mask"),
        "z": (f"{a.attn}.{a.o}", "input"),
        "attn_out": (a.attn_out, "output"),
        "resid_mid": (a.resid_mid, "in place"),
        "mlp_post": (f"{a.mlp}.{a.down}", "input"),
        "mlp_out": (a.mlp_out, "output"),
        "resid_post": ("", "output"),
    }[site]
    return (f"{a.layers}.{layer}.{path}".rstrip("."), how, (a.n_heads, a.d_head) if site == "z" else None)


def places_of(anatomy: Anatomy) -> dict[str, list[tuple[str, str, tuple[int, int] | None]]]:
    """The places of every site that a trace can read, by layer."""
    counts = {"decoder": anatomy.n_layers, "vision": anatomy.n_vision_layers, "projector": 1}
    return {
        name: [place_of(anatomy, name, layer) for layer in range(counts[row.part])]
        for name, row in SITES.items()
        if name != "pattern"
    }
