"""Interventions as TransformerLens hooks: the same values, made by `TransformerBridge.run_with_hooks`.

The arithmetic is the interventions' own; here are only the names of the hooks and what a bridge measures for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from interp_vlm.engine.evidence import sink_scores
from interp_vlm.engine.place import ResolvedPlace, resolve
from interp_vlm.engine.receipts import refuse_without_effect
from interp_vlm.errors import InterventionError, ModelError
from interp_vlm.interventions.base import CellIntervention, Intervention, indices
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.models.anatomy import Anatomy, describe
from interp_vlm.sites import site as site_named
from interp_vlm.tokens.batch import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["HOOKS", "Hook", "as_hooks", "hook_name"]

Hook = tuple[str, Callable[..., Tensor | None]]
"""A name of `bridge.hook_dict`, and what runs there: `function(value, hook=...)`."""

HOOKS = {
    # What enters the first layer is what the decoder was handed: no model of the table puts anything between.
    "projector_out": "blocks.0.hook_resid_pre",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "attn_mask": "blocks.{layer}.attn.hook_attn_scores",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "z": "blocks.{layer}.attn.hook_z",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
}
"""TransformerLens' hook for each site outside the vision tower, whose layers its adapters call by different names."""

# What a hook returns here reaches one reader, while another holds the tensor itself: a decoder layer as its residual,
# LLaVA as the features that it takes from an inner layer of its tower. So these edits are made in the tensor.
_SHARED = ("resid_mid", "vision_post")

_TOWERS = ("vision_encoder.encoder_layers.{layer}.hook_out", "vision_encoder.blocks.{layer}.hook_out")


def as_hooks(intervention: Intervention, bridge: TransformerBridge, batch: Batch) -> list[Hook]:
    """An intervention as `fwd_hooks` for `bridge.run_with_hooks` on one batch.

    Several interventions run together as the sum of their lists; two edits of the same cells apply in its order. What
    an intervention needs of a run without any (means, donors, evidence for a selector) is measured here, by the bridge.
    A knockout checks afterwards, at `hook_pattern`, that no attention is left on its edges.

    Args:
        intervention: any intervention on the prompt.
        bridge: the model, as `to_bridge` or `TransformerBridge.boot_transformers` makes it.
        batch: the encoded examples that will be run.

    Returns:
        (name, function) pairs, for this batch alone. The functions raise when a batch of another shape is run, when the
        intervention cannot have an effect, and when a knockout would be ignored, because the bridge leaves attention to
        Hugging Face.

    Raises:
        ModelError: for something that is no bridge, or one in compatibility mode.
        InterventionError: for a site where TransformerLens has no hook, and as in `vlm.run`.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> example = iv.data.digit_scenes(n=1)[0]
        >>> batch = vlm.encode(example.image, example.question)
        >>> knockout = iv.AttentionKnockout(queries="last", keys="image", layers=[2])
        >>> [name for name, _ in as_hooks(knockout, iv.to_bridge(vlm), batch)]
        ['blocks.2.attn.hook_attn_scores', 'blocks.2.attn.hook_pattern']
    """
    anatomy = _anatomy(bridge)
    needs = {name for selector in intervention.selectors for name in selector.needs}
    place = resolve(intervention, batch, anatomy, _evidence(bridge, batch, anatomy, sorted(needs)))
    named = {layer: hook_name(bridge, place.site.name, layer) for layer in place.layers}
    if isinstance(intervention, CellIntervention) and intervention.needs_clean:
        clean = _measured(bridge, batch, named.values())
        place.clean_values = {layer: clean[name] for layer, name in named.items()}
    hooks: list[Hook] = []
    for layer in sorted(named):
        if isinstance(intervention, AttentionKnockout):
            hooks.append((named[layer], _blocking(place, layer)))
            hooks.append((hook_name(bridge, "pattern", layer), _proof(place, layer)))
        else:
            hooks.append((named[layer], _editing(place, layer)))
    return hooks


def hook_name(bridge: TransformerBridge, site: str, layer: int) -> str:
    """TransformerLens' name for a site at one layer, which the bridge has.

    Raises:
        InterventionError: where it has none.
    """
    tower = site_named(site).part == "vision"
    for template in _TOWERS if tower else (HOOKS[site],):
        if (name := template.format(layer=layer)) in bridge.hook_dict:
            return name
    raise InterventionError(
        f"TransformerLens has no hook for site {site!r} of {type(bridge.original_model).__name__}",
        expected="a site with a hook: " + ", ".join(name for name in HOOKS if name != "pattern"),
        remedy="run it with vlm.run instead" + (", or edit 'projector_out'" if tower else ""),
    )


def _anatomy(bridge: Any) -> Anatomy:
    if not hasattr(bridge, "hook_dict") or not hasattr(bridge, "original_model"):
        raise ModelError(
            f"bridge is a {type(bridge).__name__}", expected="a TransformerBridge", remedy="make one: iv.to_bridge(vlm)"
        )
    if getattr(bridge, "compatibility_mode", False):
        raise ModelError(
            "the bridge is in compatibility mode, whose processed weights have other activations than the model",
            expected="a bridge as it was booted",
            remedy="make one: iv.to_bridge(vlm)",
        )
    return describe(bridge.original_model)


def _editing(place: ResolvedPlace, layer: int) -> Callable[..., Tensor]:
    def edit(value: Shaped[Tensor, "..."], hook: Any = None) -> Shaped[Tensor, "..."]:
        new = place.edit(value, layer)
        if layer == max(place.layers):
            refuse_without_effect([place])
        return value.copy_(new) if place.site.name in _SHARED else new

    return edit


def _blocking(place: ResolvedPlace, layer: int) -> Callable[..., Tensor]:
    def block(scores: Float[Tensor, "batch head query key"], hook: Any = None) -> Float[Tensor, "..."]:
        # The mask is in the scores already: its dtype's lowest value, or -inf, is added where attention is forbidden.
        keep = place.edit(scores > torch.finfo(scores.dtype).min / 2, layer)
        if layer == max(place.layers):
            refuse_without_effect([place])
        return scores.masked_fill(~keep & _edges(place, scores), -torch.inf)

    return block


def _proof(place: ResolvedPlace, layer: int) -> Callable[..., None]:
    def check(pattern: Float[Tensor, "batch head query key"], hook: Any = None) -> None:
        left = float((pattern * _edges(place, pattern)).nan_to_num().amax())
        if left > 0:
            raise InterventionError(
                f"{place.intervention!r} leaves {left:.2g} attention on its edges in layer {layer}: this bridge "
                "computes attention where the hook of its scores cannot reach",
                expected="an adapter whose hook_attn_scores takes edits",
                remedy="make the bridge with iv.to_bridge(vlm), or use vlm.run",
            )

    return check


def _edges(place: ResolvedPlace, like: Float[Tensor, "batch head query key"]) -> Bool[Tensor, "batch head query key"]:
    """The edges that a knockout removes, whether or not the model attends them."""
    assert isinstance(place.intervention, AttentionKnockout)
    everything = torch.ones_like(like, dtype=torch.bool)
    return ~place.intervention.block(
        everything, place.selected, place.key_mask(like.shape[-1], like.device), place.n_heads
    )


def _evidence(
    bridge: Any, batch: Batch, anatomy: Anatomy, needs: Iterable[str]
) -> dict[str, Float[Tensor, "batch pos"]]:
    """The scores per position that selectors need, as the engine measures them, from a run of the bridge."""
    found = {}
    for need in needs:
        kind, _, number = need.partition("@")
        if kind == "sinks":
            name = hook_name(bridge, "resid_post", anatomy.n_layers // 2)
            found[need] = sink_scores(_measured(bridge, batch, [name])[name])
        else:
            layers = indices(int(number) if number else "all", anatomy.n_layers, "layer")
            names = [hook_name(bridge, "pattern", layer) for layer in layers]
            patterns = torch.stack(list(_measured(bridge, batch, names).values()))
            rows = patterns[:, torch.arange(len(batch)), :, batch.last.to(patterns.device)]
            found[need] = rows.float().mean(dim=(1, 2))
    return found


def _measured(bridge: Any, batch: Batch, names: Iterable[str]) -> dict[str, Tensor]:
    """The values at some hooks in a run without interventions."""
    found: dict[str, Tensor] = {}

    def keeping(name: str) -> Callable[..., None]:
        def keep(value: Tensor, hook: Any = None) -> None:
            found[name] = value.detach().clone()

        return keep

    inputs = dict(batch.inputs)
    with torch.no_grad():
        bridge.run_with_hooks(inputs.pop("input_ids"), fwd_hooks=[(name, keeping(name)) for name in names], **inputs)
    return found
