"""Interventions written out by hand: plain torch hooks on a raw Hugging Face model.

Nothing here knows the package or nnsight. Sites are found by the attribute names of the Hugging Face classes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny import build

__all__ = ["Edit", "Edits", "answers", "captured", "decoder_layers", "forward", "hooked", "raw", "vision_layers"]

Edit = Callable[[Tensor], Tensor]
"""From the value of a site, (batch, pos, ...), to the value that the model goes on with."""

Edits = Mapping[tuple[str, int], Edit]
"""Edits by site and layer."""


@functools.cache
def raw(family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Another build of the same tiny model, which nnsight never touches."""
    return build.__wrapped__(family, attn=attn, dtype=dtype)[0]


def decoder(model: Any) -> nn.Module:
    return getattr(model.model, "language_model", None) or model.model.text_model


def decoder_layers(model: Any) -> nn.ModuleList:
    return decoder(model).layers


def vision_layers(model: Any) -> nn.ModuleList:
    if hasattr(model.model, "visual"):
        return model.model.visual.blocks
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    return getattr(tower.encoder, "layers", None) or tower.encoder.layer


def forward(model: Any, inputs: Mapping[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs, **options)


def answers(model: Any, inputs: Mapping[str, Tensor], edits: Edits | None = None) -> Tensor:
    """Logits at the last position that is not padding."""
    with hooked(model, edits or {}):
        logits = forward(model, inputs).logits
    return torch.stack([row[mask.nonzero().max()] for row, mask in zip(logits, inputs["attention_mask"], strict=True)])


def captured(model: Any, inputs: Mapping[str, Tensor], sites: list[tuple[str, int]]) -> dict[tuple[str, int], Tensor]:
    """The values of sites in a run without edits."""
    found: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Edit:
        def look(value: Tensor) -> Tensor:
            found[key] = value.clone()
            return value

        return look

    with hooked(model, {key: keep(key) for key in sites}):
        forward(model, inputs)
    return found


@contextlib.contextmanager
def hooked(model: Any, edits: Edits) -> Iterator[None]:
    """The model with forward hooks that make the edits."""
    heads = model.config.get_text_config().num_attention_heads
    handles = [handle for (site, layer), edit in edits.items() for handle in _hooks(model, site, layer, edit, heads)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(model: Any, site: str, layer: int, edit: Edit, heads: int) -> list[Any]:
    if site == "projector_out":
        return [_before_keyword(decoder(model), "inputs_embeds", edit)]
    if site == "vision_post":
        return [_after(vision_layers(model)[layer], edit)]
    block: Any = decoder_layers(model)[layer]
    sandwich = hasattr(block, "pre_feedforward_layernorm")
    attn_out = block.post_attention_layernorm if sandwich else block.self_attn
    if site == "resid_pre":
        return [_before(block, edit)]
    if site == "resid_post":
        return [_after(block, edit)]
    if site == "attn_out":
        return [_after(attn_out, edit)]
    if site == "mlp_out":
        return [_after(block.post_feedforward_layernorm if sandwich else block.mlp, edit)]
    if site == "mlp_post":
        return [_before(block.mlp.down_proj, edit)]
    if site == "z":
        return [_before(block.self_attn.o_proj, lambda flat: edit(flat.unflatten(-1, (heads, -1))).flatten(-2))]
    if site == "attn_mask":
        return [_before_keyword(block.self_attn, "attention_mask", edit)]
    assert site == "resid_mid"
    # The stream between attention and MLP is never handed over whole: x + a, edited, is x + (edited - x).
    entering: list[Tensor] = []
    seen = _before(block, lambda value: entering.append(value) or value)
    return [seen, _after(attn_out, lambda out: edit(entering[-1] + out) - entering[-1])]


def _after(module: nn.Module, edit: Edit) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    return module.register_forward_hook(hook)


def _before(module: nn.Module, edit: Edit) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _before_keyword(module: nn.Module, name: str, edit: Edit) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, name: edit(kwargs[name])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)
