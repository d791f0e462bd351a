"""Captured activations as TransformerLens' `ActivationCache`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from interp_vlm.errors import InterventionError, ModelError
from interp_vlm.interop.transformer_lens.hooks import HOOKS
from interp_vlm.interventions.cache import Cache
from interp_vlm.sites import SITES

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["to_activation_cache"]

# What TransformerLens' caches have no place for: the mask itself, and values with rows of pictures, not of tokens.
_LEFT_OUT = ("attn_mask", "projector_out", "vision_post")


def to_activation_cache(cache: Cache, bridge: TransformerBridge) -> ActivationCache:
    """The captured activations under TransformerLens' names, with its analyses: see `Cache.to_transformer_lens`.

    Args:
        cache: what `vlm.capture` returned.
        bridge: the same model, for its weights.

    Raises:
        ModelError: for a bridge of another model.
    """
    from transformer_lens import ActivationCache

    kept = [site for site in cache if site not in _LEFT_OUT]
    _refuse_other_model(cache, kept, bridge)
    values = _Captured(bridge)
    for site in kept:
        for column, layer in enumerate(cache.layers[site]):
            values[HOOKS[site].format(layer=layer)] = _laid_out(cache, site, cache[site][:, column])
    found = ActivationCache(values, bridge)
    # Else a decomposition would silently lack its first part where it was not captured; now it asks for it.
    found.has_embed = True
    return found


class _Captured(dict[str, Tensor]):
    """Values by hook name, which says what to capture where one is missing, and measures the norms when asked."""

    def __init__(self, bridge: Any) -> None:
        super().__init__()
        layers = range(bridge.cfg.n_layers)
        self.sites = {HOOKS[site].format(layer=layer): (site, layer) for site in HOOKS for layer in layers}
        self.norms = {"ln_final.hook_scale": (bridge.ln_final, HOOKS["resid_post"].format(layer=layers[-1]))}
        for layer, (norm, stream) in itertools.product(layers, (("ln1", "resid_pre"), ("ln2", "resid_mid"))):
            found = getattr(bridge.blocks[layer], norm), HOOKS[stream].format(layer=layer)
            self.norms[f"blocks.{layer}.{norm}.hook_scale"] = found

    def __missing__(self, name: str) -> Tensor:
        if name in self.norms:
            norm, stream = self.norms[name]
            self[name] = _scale(norm, self[stream])
            return self[name]
        if name == "hook_embed":
            # TransformerLens' own is the text's embeddings, before the pictures are put in; this is what enters the
            # first layer, so that the parts of the stream sum to it.
            return self[HOOKS["resid_pre"].format(layer=0)]
        if name not in self.sites:
            raise KeyError(name)
        site, layer = self.sites[name]
        raise InterventionError(
            f"{name!r} is not in the cache: site {site!r} was not captured at layer {layer}",
            expected=f"{site!r} at every layer that is asked for",
            remedy=f"capture it: vlm.capture(batch, sites=[{site!r}, ...])",
        )


def _refuse_other_model(cache: Cache, sites: list[str], bridge: Any) -> None:
    deepest = max((layer for site in sites for layer in cache.layers[site]), default=0)
    widths = {cache[site].shape[-1] for site in sites if SITES[site].axes == ("pos", "d")}
    if deepest >= bridge.cfg.n_layers or widths - {bridge.cfg.d_model}:
        raise ModelError(
            f"the cache holds layer {deepest} and widths {sorted(widths)} of {cache.model!r}",
            expected=f"the bridge's {bridge.cfg.n_layers} layers of width {bridge.cfg.d_model}",
            remedy="pass a bridge of the model that was captured",
        )


def _laid_out(cache: Cache, site: str, value: Shaped[Tensor, "batch ..."]) -> Shaped[Tensor, "batch ..."]:
    """One layer of a site with its rows at their positions in the padded prompts, if all of them were captured."""
    lengths = [tokens.length for tokens in cache.tokens]
    if cache.mask.sum(1).tolist() != lengths:
        return value
    example, column = cache.mask.nonzero(as_tuple=True)
    rows = cache.positions[example, column]
    width = len(cache.tokens[0].ids)
    if site == "pattern":  # (batch, head, query, key)
        new = value.new_zeros(*value.shape[:2], width, value.shape[-1])
        new[example, :, rows] = value[example, :, column]
        return new
    new = value.new_zeros(len(value), width, *value.shape[2:])
    new[example, rows] = value[example, column]
    return new


def _scale(norm: nn.Module, stream: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos 1"]:
    """What a norm divides the stream by, as the bridge computes it."""
    kept: list[Any] = []
    handle = norm.get_submodule("hook_scale").register_forward_hook(lambda _, __, value: kept.append(value))
    try:
        with torch.no_grad():
            norm(stream)
    finally:
        handle.remove()
    return kept[0]
