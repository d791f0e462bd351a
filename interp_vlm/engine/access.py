"""Where the sites lie in a running model: reading and writing one site at one layer inside an nnsight trace.

This is the only module that touches nnsight's envoys. Everything else sees canonical shapes:
activations (batch, pos, ...), masks as True = may attend (batch, 1 or head, query, key).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from nnsight import NNsight
from torch import Tensor

from interp_vlm.engine.prefix import Prefix
from interp_vlm.errors import InterventionError
from interp_vlm.models.anatomy import Anatomy

__all__ = ["Access", "AttentionInputs", "as_additive", "as_keep"]


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

    def __init__(self, root: NNsight, anatomy: Anatomy) -> None:
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
        return getattr(self, f"_read_{site}")(layer)

    def write(self, site: str, layer: int, value: Tensor) -> None:
        """Make the model go on with `value` at this site."""
        getattr(self, f"_write_{site}")(layer, value)

    # -- decoder ---------------------------------------------------------------------------------------------------

    def _read_resid_pre(self, layer: int) -> Tensor:
        return self.layer(layer).input

    def _write_resid_pre(self, layer: int, value: Tensor) -> None:
        self.layer(layer).input = value

    def _read_resid_mid(self, layer: int) -> Tensor:
        return self.inside(layer, self.anatomy.resid_mid).input

    def _write_resid_mid(self, layer: int, value: Tensor) -> None:
        # The layer keeps its own reference to this tensor as the residual, so the edit has to be made in it.
        self.inside(layer, self.anatomy.resid_mid).input.copy_(value)

    def _read_resid_post(self, layer: int) -> Tensor:
        return _first(self.layer(layer).output)

    def _write_resid_post(self, layer: int, value: Tensor) -> None:
        self.layer(layer).output = _with_first(self.layer(layer).output, value)

    def _read_attn_out(self, layer: int) -> Tensor:
        return _first(self.inside(layer, self.anatomy.attn_out).output)

    def _write_attn_out(self, layer: int, value: Tensor) -> None:
        module = self.inside(layer, self.anatomy.attn_out)
        module.output = _with_first(module.output, value)

    def _read_mlp_out(self, layer: int) -> Tensor:
        return _first(self.inside(layer, self.anatomy.mlp_out).output)

    def _write_mlp_out(self, layer: int, value: Tensor) -> None:
        module = self.inside(layer, self.anatomy.mlp_out)
        module.output = _with_first(module.output, value)

    def _read_z(self, layer: int) -> Tensor:
        flat = self._attn(layer, self.anatomy.o).input
        return flat.unflatten(-1, (self.anatomy.n_heads, self.anatomy.d_head))

    def _write_z(self, layer: int, value: Tensor) -> None:
        self._attn(layer, self.anatomy.o).input = value.flatten(-2)

    def _read_mlp_post(self, layer: int) -> Tensor:
        return self.inside(layer, f"{self.anatomy.mlp}.{self.anatomy.down}").input

    def _write_mlp_post(self, layer: int, value: Tensor) -> None:
        self.inside(layer, f"{self.anatomy.mlp}.{self.anatomy.down}").input = value

    # -- attention -------------------------------------------------------------------------------------------------

    def _attn(self, layer: int, path: str = "") -> Any:
        return self.inside(layer, f"{self.anatomy.attn}.{path}" if path else self.anatomy.attn)

    def _read_attn_mask(self, layer: int) -> Tensor:
        _, kwargs = self._attn(layer).inputs
        return as_keep(kwargs["attention_mask"], kwargs["hidden_states"], kwargs.get("past_key_values"), layer)

    def _write_attn_mask(self, layer: int, value: Tensor) -> None:
        args, kwargs = self._attn(layer).inputs
        found = kwargs["attention_mask"]
        # A mask of the caller's own kind: boolean for sdpa, additive for eager.
        mask = value if found is None or found.dtype == torch.bool else as_additive(value, found)
        self._attn(layer).inputs = (args, {**kwargs, "attention_mask": mask})

    def read_attention(self, layer: int) -> AttentionInputs:
        """Everything that attention of one layer read, for rebuilding its weights after the run."""
        _, kwargs = self._attn(layer).inputs
        found, (cos, sin) = kwargs["attention_mask"], kwargs["position_embeddings"]
        keep = None if found is None else as_keep(found, kwargs["hidden_states"], None, layer)
        q, k, v = (self._attn(layer, name).output for name in (self.anatomy.q, self.anatomy.k, self.anatomy.v))
        past = kwargs.get("past_key_values")
        return AttentionInputs(keep, cos, sin, q, k, v, past.before(layer) if isinstance(past, Prefix) else None)

    def read_call(self, layer: int) -> dict[str, Any]:
        """The keyword arguments of a decoder layer, without its key-value cache."""
        return _without_cache(self.layer(layer).inputs[1])

    def read_decoder_call(self) -> dict[str, Any]:
        """The keyword arguments of the decoder, without its key-value cache."""
        return _without_cache(self.find(self.anatomy.decoder).inputs[1])

    # -- image side ------------------------------------------------------------------------------------------------

    def _read_projector_out(self, layer: int) -> Tensor:
        return self.find(self.anatomy.decoder).inputs[1]["inputs_embeds"]

    def _write_projector_out(self, layer: int, value: Tensor) -> None:
        decoder = self.find(self.anatomy.decoder)
        args, kwargs = decoder.inputs
        decoder.inputs = (args, {**kwargs, "inputs_embeds": value})

    def _vision(self, layer: int) -> Any:
        return self.find(self.anatomy.vision_layers)[layer]

    def _read_vision_post(self, layer: int) -> Tensor:
        return _first(self._vision(layer).output)

    def _write_vision_post(self, layer: int, value: Tensor) -> None:
        self._vision(layer).output = _with_first(self._vision(layer).output, value)

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


def as_additive(
    keep: Bool[Tensor, "batch heads query key"], found: Float[Tensor, "#batch _ query key"]
) -> Float[Tensor, "batch heads query key"]:
    """An additive mask with everything outside `keep` blocked by its dtype's lowest value, any bias inside kept."""
    return torch.where(keep, found, torch.finfo(found.dtype).min)


def _without_cache(call: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("past_key_values", "use_cache")}


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def _with_first(old: Any, value: Tensor) -> Any:
    return (value, *old[1:]) if isinstance(old, tuple) else value
