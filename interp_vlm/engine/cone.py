"""Running a cone: the decoder's layers from one layer on, for the rows that can change, inside an nnsight trace.

The model's own layers are called, with the rest of the run taken from the trunk; sites, edits and captures are those of
every other run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from nnsight import NNsight
from torch import Tensor, nn

from interp_vlm.engine.access import Access
from interp_vlm.engine.full import Program, Recording, alone, answer_rows, walk
from interp_vlm.engine.trunk import Trunk
from interp_vlm.models.anatomy import Anatomy

__all__ = ["Cone", "Rest", "alike", "run_cone", "run_decoder"]


@runtime_checkable
class Cone(Protocol):
    """Which rows are computed, from which layer on."""

    @property
    def trunk(self) -> Trunk: ...

    @property
    def layer(self) -> int:
        """The first layer computed."""
        ...

    @property
    def last(self) -> Int[Tensor, " batch"]:
        """Each example's answer position, on the device on which the answers are to lie."""
        ...

    def entering(self, layer: int, hidden: Tensor | None) -> Float[Tensor, "batch row d"]:
        """What goes into a layer: what came out of the one before, and rows that begin here."""
        ...

    def call(self, layer: int) -> dict[str, Any]:
        """The keyword arguments for a layer."""
        ...

    def answers(self, hidden: Float[Tensor, "batch row d"]) -> Float[Tensor, "batch answer d"]:
        """The rows from which answers are read."""
        ...


@dataclass(frozen=True, eq=False)
class Rest:
    """All rows through the layers from one on: `resume`.

    Attributes:
        trunk: the clean run.
        layer: the first layer computed.
        last: each example's answer position.
    """

    trunk: Trunk
    layer: int
    last: Int[Tensor, " batch"]

    def entering(self, layer: int, hidden: Tensor | None) -> Float[Tensor, "batch row d"]:
        return self.trunk.residuals[layer].clone() if hidden is None else hidden

    def call(self, layer: int) -> dict[str, Any]:
        return {**self.trunk.calls[layer], "past_key_values": None}

    def answers(self, hidden: Float[Tensor, "batch row d"]) -> Float[Tensor, "batch 1 d"]:
        return answer_rows(hidden, self.last)[:, None]


def run_cone(root: NNsight, access: Access, cone: Cone, program: Program) -> Recording:
    """Run the cone's layers with the program's edits and captures; the recording's logits are those of its answers."""
    anatomy, returned = access.anatomy, []
    model: nn.Module = root._module
    layers = model.get_submodule(anatomy.layers)
    norm, head = model.get_submodule(anatomy.final_norm), model.get_submodule(anatomy.head)

    def through(hidden: Tensor) -> Tensor:
        stream: Tensor | None = None
        for layer in range(cone.layer, anatomy.n_layers):
            out = layers[layer](cone.entering(layer, stream), **cone.call(layer))  # type: ignore[index]
            stream = out[0] if isinstance(out, tuple) else out
        assert stream is not None
        returned.append(capped(head(norm(cone.answers(stream))), anatomy))
        return returned[0]

    recording, stops = Recording(), program.visits()
    with alone("a run"), torch.no_grad(), root.trace(fn=through, hidden=cone.trunk.keys[0]):
        walk(access, program, stops, recording)
    recording.logits = returned[0].to(cone.last.device)
    return recording


def run_decoder(
    root: NNsight, access: Access, call: Mapping[str, Any], last: Int[Tensor, " batch"], program: Program
) -> Recording:
    """Run the decoder as the model called it, the image side taken from the run in which it did.

    Args:
        root: the wrapped model.
        access: its sites.
        call: the decoder's keyword arguments.
        last: each example's answer position, on the device on which the answers are to lie.
        program: what to edit and record; nothing on the image side before the projected tokens.
    """
    returned, model = [], root._module
    decoder, head = model.get_submodule(access.anatomy.decoder), model.get_submodule(access.anatomy.head)

    def through(inputs_embeds: Tensor) -> Tensor:
        hidden = decoder(**{**call, "inputs_embeds": inputs_embeds, "use_cache": False}).last_hidden_state
        returned.append(capped(head(answer_rows(hidden, last)), access.anatomy))
        return returned[0]

    recording, stops = Recording(), program.visits()
    with alone("a run"), torch.no_grad(), root.trace(fn=through, inputs_embeds=call["inputs_embeds"]):
        walk(access, program, stops, recording)
    recording.logits = returned[0].to(last.device)
    return recording


def capped(logits: Tensor, anatomy: Anatomy) -> Tensor:
    """Logits as the model gives them out."""
    cap = anatomy.final_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap


def alike(a: Float[Tensor, "batch vocab"], b: Float[Tensor, "batch vocab"]) -> bool:
    """Whether logits are the same up to rounding: within the root of the type's precision, relative to the largest."""
    return float((a - b).abs().max()) <= torch.finfo(a.dtype).eps ** 0.5 * float(b.abs().max())
