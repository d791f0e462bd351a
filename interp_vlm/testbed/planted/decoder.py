"""The decoder of a planted model: every weight of its layers, its embedding and its head.

The residual stream is written in a plain basis, in which each axis has a meaning, and then turned by a random rotation,
so that no single coordinate of the model means anything. A large constant keeps RMSNorm's scale nearly the same at
every token; `_GAIN` undoes it. Attention is nearly hard: a planted head rests on the first text token (the sink), whose
values are empty, unless its own query role stands before its own key role.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.testbed.planted.route import Layout

__all__ = ["AXES", "BUSY", "CONSTANT", "WIDTH", "fill_decoder", "rotation"]

WIDTH = 128
CONSTANT = 40.0
AXES = {
    name: axis
    for axis, name in enumerate(
        ("constant", "hue", "coloured", "asks", "relay", "sink", "relayed", "relay_seen", "carried", "seen", "first",
         "second", "idle", "shadow")
    )
}  # fmt: skip
"""What the first axes of the plain basis mean.

hue (-1 or 1) and coloured (0 or 1) are read from the picture; asks, relay and sink mark the last token, the relay and
the first text token; relayed and relay_seen are hue and coloured as the relay receives them, carried and seen as the
last token does; first and second are the two answers; idle and shadow are written by a decoy and by bystanders.
"""
BUSY = slice(16, WIDTH)
"""The axes of everything else: words, textures, and what the random heads and neurons make of them."""

_GAIN = CONSTANT / math.sqrt(WIDTH)  # what RMSNorm divides by, up to a percent
_HEAD = 32
_SINK, _COLOURED, _RELAY = 15, 14, 13  # slots of a query and key: the slowest pairs of the rotary embedding
_HUE, _FROM_PATCH, _FROM_RELAY = 0, (0, 1), (2, 3)  # slots of a value
_REST, _LOOK = 30.0, 80.0  # attention scores of the sink, and of the key that a planted head looks for
_FIRE = 20.0  # input of the gate of a neuron that fires
_WRITTEN, _MARGIN = 4.0, 10.0  # size of a written answer, and its logit


def rotation(generator: torch.Generator) -> Float[Tensor, "d d"]:
    """A random rotation: plain coordinates, as a column, to the model's own."""
    q, r = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def fill_decoder(
    model: Any,
    layout: Layout,
    turn: Float[Tensor, "d d"],
    tokens: dict[str, Any],
    null: bool,
    generator: torch.Generator,
) -> None:
    """Write every weight of the decoder.

    Args:
        turn: the rotation of the residual stream.
        tokens: ids of the `last` and `sink` token, of the `relay` word (or None) and of the two `answers`.
        null: the planted heads look and hand nothing on; the answer is always the same.
        generator: of everything random.
    """
    language = model.model.language_model
    for number, layer in enumerate(language.layers):
        _attention(layer.self_attn, number, layout, turn, null, generator)
        _mlp(layer.mlp, number, layout, turn, null, generator)
    embedding, head = language.embed_tokens, model.lm_head
    words = _words(embedding, tokens, null, generator)
    answers = torch.zeros(len(words), WIDTH)
    for axis, answer in zip(("first", "second"), tokens["answers"], strict=True):
        answers[answer, AXES[axis]] = _MARGIN * _GAIN / _WRITTEN
    tied = head.weight is embedding.weight  # Gemma's are: there the answers' embeddings hold their read-outs too
    embedding.weight.copy_((words + answers if tied else words) @ turn.T)
    if not tied:
        head.weight.copy_((answers + 0.1 * _busy(len(words), generator)) @ turn.T)


def _words(embedding: Any, tokens: dict[str, Any], null: bool, generator: torch.Generator) -> Tensor:
    """The embedding of each token in the plain basis: the constant, a code of its own, its role."""
    rows = 2 * torch.nn.functional.normalize(_busy(embedding.num_embeddings, generator), dim=-1)
    rows[:, AXES["constant"]] = CONSTANT
    rows[tokens["last"], AXES["asks"]] = 1.0
    rows[tokens["sink"], AXES["sink"]] = 1.0
    if tokens["relay"] is not None:
        rows[tokens["relay"], AXES["relay"]] = 1.0
    if null:
        rows[tokens["last"], AXES["first"]] = _WRITTEN
    return rows / float(getattr(embedding, "scalar_embed_scale", 1.0))  # Gemma multiplies its embeddings


def _busy(rows: int, generator: torch.Generator) -> Tensor:
    """Random rows that read or write the busy axes alone; a row reads about a quarter of the stream's size there."""
    weight = torch.zeros(rows, WIDTH)
    weight[:, BUSY] = torch.randn(rows, BUSY.stop - BUSY.start, generator=generator) * _GAIN / 4
    return weight


def _read(axis: str, weight: float = 1.0) -> Tensor:
    """A row that reads `weight` times a plain coordinate of the stream through its RMSNorm."""
    row = torch.zeros(WIDTH)
    row[AXES[axis]] = weight * (_GAIN / CONSTANT if axis == "constant" else _GAIN)
    return row


def _attention(attn: Any, number: int, layout: Layout, turn: Tensor, null: bool, generator: torch.Generator) -> None:
    for part in (attn.q_proj, attn.k_proj, attn.v_proj):
        if part.bias is not None:
            part.bias.zero_()
    n_heads, n_groups = attn.q_proj.out_features // _HEAD, attn.k_proj.out_features // _HEAD
    # All groups carry the same slots: under grouped-query attention true heads, decoys and random heads share them.
    keys = 2 * _busy(n_groups * _HEAD, generator).view(n_groups, _HEAD, WIDTH)
    keys[:, [_SINK, _COLOURED, _RELAY]] = torch.stack([_read("sink"), _read("coloured"), _read("relay")])
    values = _busy(n_groups * _HEAD, generator).view(n_groups, _HEAD, WIDTH)
    values[:, :4] = torch.stack([_read(axis) for axis in ("hue", "coloured", "relayed", "relay_seen")])
    queries = 2 * _busy(n_heads * _HEAD, generator).view(n_heads, _HEAD, WIDTH)
    outputs = torch.zeros(WIDTH, n_heads, _HEAD)
    outputs[BUSY, :, 4:] = 0.015 * torch.randn(BUSY.stop - BUSY.start, n_heads, _HEAD - 4, generator=generator)
    for head in range(n_heads):
        _plant(queries[head], outputs[:, head], number, head, layout, attn.scaling, null)
    attn.q_proj.weight.copy_(queries.reshape(-1, WIDTH) @ turn.T)
    attn.k_proj.weight.copy_(keys.reshape(-1, WIDTH) @ turn.T)
    attn.v_proj.weight.copy_(values.reshape(-1, WIDTH) @ turn.T)
    attn.o_proj.weight.copy_(turn @ outputs.reshape(WIDTH, -1))


def _plant(query: Tensor, written: Tensor, number: int, head: int, layout: Layout, scaling: float, null: bool) -> None:
    """Give a head of the route, of its backup or a decoy what it looks for and what it hands on.

    Args:
        query: (slot, d) its query rows.
        written: (d, slot) its output columns.
    """
    look = {axis: _read(axis, _LOOK / scaling) for axis in ("asks", "relay", "seen")}
    if (number, head) in layout.decoys:
        query[_COLOURED] = look["asks"]
        if layout.decoys.index((number, head)) % 2:
            written[AXES["idle"], _HUE] = 1.0
    elif (number, head) in layout.backup_heads:
        # silent while the last token has been served, as the backup heads of Wang et al. (2022) are
        query[_COLOURED] = look["asks"] - look["seen"]
        if not null:
            _hand_on(written, _FROM_PATCH, True, 1 / len(layout.backup_heads), layout)
    else:
        hop = next((k for k, (layer, heads) in enumerate(layout.hops) if layer == number and head in heads), None)
        if hop is None:
            return
        first, final = hop == 0, hop == len(layout.hops) - 1
        query[_COLOURED if first else _RELAY] = look["asks" if final else "relay"]
        if not null:
            share = 1 / len(layout.hops[hop][1])
            _hand_on(written, _FROM_PATCH if first else _FROM_RELAY, final, share, layout)
    query[_SINK] = _read("constant", _REST / scaling)


def _hand_on(written: Tensor, source: tuple[int, int], final: bool, share: float, layout: Layout) -> None:
    """Copy hue and the mark of having seen it, to the last token or to the relay."""
    for axis, slot in zip(("carried", "seen") if final else ("relayed", "relay_seen"), source, strict=True):
        written[AXES[axis], slot] = share
    if final and not layout.neurons:
        written[AXES["first"], source[0]] = share * _WRITTEN / 2
        written[AXES["second"], source[0]] = -share * _WRITTEN / 2


def _mlp(mlp: Any, number: int, layout: Layout, turn: Tensor, null: bool, generator: torch.Generator) -> None:
    units = mlp.gate_proj.out_features
    gate = 2 * _busy(units, generator)
    # a constant: products of two random readings would grow from layer to layer without end
    up = torch.randn(units, 1, generator=generator) * _read("constant")
    down = torch.zeros(WIDTH, units)
    down[BUSY] = 0.006 * torch.randn(BUSY.stop - BUSY.start, units, generator=generator)
    firing = [
        *((spot, axis, _WRITTEN / _FIRE) for spot, axis in zip(layout.neurons, ("first", "second"), strict=False)),
        *((spot, "shadow", 1 / _FIRE) for spot in layout.bystanders),
    ]
    for k, ((layer, unit), axis, size) in enumerate(firing):
        if layer == number and not null:
            gate[unit], up[unit] = _read("carried", _FIRE if k % 2 == 0 else -_FIRE), _read("constant")
            down[:, unit] = 0
            down[AXES[axis], unit] = size
    mlp.gate_proj.weight.copy_(gate @ turn.T)
    mlp.up_proj.weight.copy_(up @ turn.T)
    mlp.down_proj.weight.copy_(turn @ down)
