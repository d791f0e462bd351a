"""The eyes of a planted model: a vision tower that passes each patch through, and a projector that reads it.

The tower's axes come in pairs of opposite sign, so that LayerNorm's mean takes nothing away, and a large constant pair
keeps its scale. Attention and MLPs of the tower work on the texture alone: no patch learns another one's colour.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.testbed.planted.decoder import AXES, BUSY, CONSTANT, WIDTH

__all__ = ["HUES", "fill_vision"]

HUES = {"red": (0.9, 0.15, 0.15), "blue": (0.15, 0.15, 0.9)}
"""The two colours, alike in brightness and saturation."""

_FEATURES = {"hue": (1 / 0.75, 0.0, -1 / 0.75), "coloured": (0.5 / 0.375, -1 / 0.375, 0.5 / 0.375)}
"""What the patch embedding measures: weights of the mean red, green and blue of a patch, in [0, 1]."""

_TOWER = 96
_CONSTANT = 60.0
_PAIRS = {"hue": (0, 1), "coloured": (2, 3), "relay": (4, 5), "constant": (94, 95)}
_TEXTURE = slice(6, 94)
_SCALE = _CONSTANT * math.sqrt(2 / _TOWER)  # what LayerNorm divides by, up to a percent
_LINEAR = 10.0  # a GELU of something this large is the thing itself


def fill_vision(
    model: Any, processor: Any, relay: int | None, turn: Float[Tensor, "d d"], generator: torch.Generator
) -> None:
    """Write the weights that see.

    Args:
        relay: a patch whose place is to be known (PaliGemma's detour), or None.
        turn: the rotation of the residual stream.
        generator: of everything random.
    """
    tower = model.model.visual if hasattr(model.model, "visual") else model.model.vision_tower
    pixels = processor.image_processor
    std, mean = torch.tensor(pixels.image_std), torch.tensor(pixels.image_mean)
    if hasattr(tower, "merger"):
        _qwen2_vl(tower, std, mean, turn, generator)
        return
    tower.embeddings.patch_embedding.weight.copy_(_filters(tower.embeddings.patch_embedding, std, generator))
    if tower.embeddings.patch_embedding.bias is not None:
        tower.embeddings.patch_embedding.bias.zero_()
    places = tower.embeddings.position_embedding.weight.zero_()
    places += _constant()
    if relay is not None:
        places[relay, list(_PAIRS["relay"])] += torch.tensor([1.0, -1.0])
    for layer in tower.encoder.layers:
        attn = layer.self_attn
        _confine([attn.q_proj, attn.k_proj, attn.v_proj, layer.mlp.fc1], [attn.out_proj, layer.mlp.fc2])
    reader, offset = _reader(mean, generator)
    projector = model.model.multi_modal_projector
    if hasattr(projector, "linear"):
        projector.linear.weight.copy_(turn @ reader)
        projector.linear.bias.copy_(turn @ offset)
    else:
        _two_layers(projector.linear_1, projector.linear_2, reader, offset, turn)


def _qwen2_vl(tower: Any, std: Tensor, mean: Tensor, turn: Tensor, generator: torch.Generator) -> None:
    tower.patch_embed.proj.weight.copy_(_filters(tower.patch_embed.proj, std, generator))
    for block in tower.blocks:
        _confine([block.attn.qkv, block.mlp.fc1], [block.attn.proj, block.mlp.fc2])
    # its patches have no learned places and no bias: the first block adds the constant
    tower.blocks[0].attn.proj.bias.copy_(_constant())
    reader, offset = _reader(mean, generator)
    merged = tower.merger.mlp[0].in_features // _TOWER
    _two_layers(tower.merger.mlp[0], tower.merger.mlp[2], reader.repeat(1, merged) / merged, offset, turn)


def _constant() -> Tensor:
    row = torch.zeros(_TOWER)
    row[list(_PAIRS["constant"])] = torch.tensor([_CONSTANT, -_CONSTANT])
    return row


def _filters(convolution: Any, std: Tensor, generator: torch.Generator) -> Tensor:
    """Filters on normalised pixels: hue and saturation of a patch in their pairs, brightness patterns elsewhere."""
    shape = convolution.weight.shape[2:]
    size = math.prod(shape)
    weight = torch.zeros(_TOWER, 3, size)
    for name, colour in _FEATURES.items():
        plus, minus = _PAIRS[name]
        weight[plus] = (torch.tensor(colour) * std)[:, None] / size
        weight[minus] = -weight[plus]
    # alike for all three channels: the texture axes do not tell red from blue
    pattern = torch.randn(_TEXTURE.stop - _TEXTURE.start, 1, size, generator=generator) / math.sqrt(size)
    weight[_TEXTURE] = pattern * std[:, None]
    return weight.view(_TOWER, 3, *shape)


def _confine(readers: list[Any], writers: list[Any]) -> None:
    """Keep a layer's random weights to the texture axes."""
    rest = [axis for pair in _PAIRS.values() for axis in pair]
    for module in readers:
        module.weight[:, rest] = 0
    for module in writers:
        module.weight[rest] = 0
        module.bias.zero_()


def _reader(mean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The affine map from the tower's axes, after LayerNorm, to the plain axes of the decoder."""
    weight, offset = torch.zeros(WIDTH, _TOWER), torch.zeros(WIDTH)
    for name in ("hue", "coloured", "relay"):
        plus, minus = _PAIRS[name]
        weight[AXES[name], plus], weight[AXES[name], minus] = _SCALE / 2, -_SCALE / 2
        if name in _FEATURES:  # the processor has subtracted the mean colour
            offset[AXES[name]] = float(torch.tensor(_FEATURES[name]) @ mean)
    texture = _TEXTURE.stop - _TEXTURE.start
    weight[BUSY, _TEXTURE] = 0.05 * _SCALE * torch.randn(BUSY.stop - BUSY.start, texture, generator=generator)
    offset[AXES["constant"]] = CONSTANT
    return weight, offset


def _two_layers(first: Any, second: Any, reader: Tensor, offset: Tensor, turn: Tensor) -> None:
    """Write an affine map into linear, GELU, linear: the GELU works where it is the identity."""
    first.weight.zero_()
    first.bias.zero_()
    first.weight[:WIDTH] = reader
    first.bias[:WIDTH] = _LINEAR
    second.weight.zero_()
    second.weight[:, :WIDTH] = turn
    second.bias.copy_(turn @ (offset - _LINEAR))
