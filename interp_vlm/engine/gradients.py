"""Gradients: what a number read at the answer would do if one site changed, at every layer and position at once.

One pass forward and one backward, in the model as it is: its weights ask for no gradients and get none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.engine.full import Program, Recording, alone, answer_rows, walk
from interp_vlm.engine.runner import Engine
from interp_vlm.errors import InterventionError, ModelError
from interp_vlm.sites import SITES
from interp_vlm.sites import site as site_named
from interp_vlm.tokens.batch import Batch

__all__ = ["GRADIENT_SITES", "Gradients", "gradients", "refuse_without_gradient"]

GRADIENT_SITES = tuple(row.name for row in SITES.values() if row.part == "decoder" and "k" not in row.axes)
"""The sites that have gradients: activations of the decoder."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """A site's values in one run, and the gradient of a score in them.

    Attributes:
        scores: the score of each example.
        logits: at the answer position.
        values: by layer, in the site's shape.
        slopes: by layer, the gradient of an example's score in its own values.
    """

    scores: Float[Tensor, " batch"]
    logits: Float[Tensor, "batch vocab"]
    values: dict[int, Float[Tensor, "batch pos ..."]]
    slopes: dict[int, Float[Tensor, "batch pos ..."]]


def gradients(
    engine: Engine, batch: Batch, site: str, layers: Sequence[int], score: Callable[[Tensor], Tensor], name: str = ""
) -> Gradients:
    """The gradient of a score in the values of a site, in the run without interventions.

    The sum of the scores is what is differentiated: examples do not see each other, so that each gets its own gradient.

    Args:
        engine: of the model.
        batch: the encoded examples.
        site: one of `GRADIENT_SITES`.
        layers: where; memory is that of a forward pass that can be run backward from the first of them.
        score: from the logits at the answer position, (batch, vocab), to one number for each example.
        name: what errors call the score.

    Raises:
        InterventionError: for a site without gradients, or a score that does not depend smoothly on the logits.
        ModelError: for weights that were loaded in inference mode, through which nothing can be differentiated.
    """
    refuse_without_gradient(site)
    if any(weight.is_inference() for weight in engine.root._module.parameters()):
        raise ModelError("weights made in torch.inference_mode", expected="weights made outside of it")
    recording = _forward(engine, batch, site, layers)
    assert recording.logits is not None
    with torch.enable_grad():
        logits = answer_rows(recording.logits, batch.last)
        scores = score(logits)
    _refuse_unsmooth(scores, len(batch), name or "the score")
    values = [recording.values[site, layer] for layer in layers]
    slopes = torch.autograd.grad(scores.sum(), values)
    return Gradients(
        scores.detach(),
        logits.detach(),
        {layer: value.detach() for layer, value in zip(layers, values, strict=True)},
        dict(zip(layers, slopes, strict=True)),
    )


def refuse_without_gradient(site: str) -> None:
    """Refuse a site that is no activation of the decoder.

    Raises:
        InterventionError: in that case.
    """
    if site_named(site).name not in GRADIENT_SITES:
        raise InterventionError(
            f"site {site!r} has no gradients here",
            expected=f"one of {', '.join(GRADIENT_SITES)}",
            remedy="change it exactly: iv.ActivationPatch or iv.AttentionKnockout in iv.sweep",
        )


def _forward(engine: Engine, batch: Batch, site: str, layers: Sequence[int]) -> Recording:
    access, recording, first = engine.access, Recording(), min(layers)
    program = Program(captures={site: layers})
    stops = program.visits()
    with alone("a backward pass"), torch.enable_grad(), engine.root.trace(**dict[str, Any](batch.inputs)):
        # All that is asked for comes after this tensor, so that nothing before it has to be kept for the way back.
        access.read("resid_pre", first).requires_grad_(True)
        for stop in stops:
            walk(access, program, [stop], recording)
            if site == "z":
                # Heads are a view of the projection's input: the model goes on with it, so that it has a gradient.
                access.write(site, stop[2], recording.values[site, stop[2]])
        recording.logits = access.read_logits()
    return recording


def _refuse_unsmooth(scores: Tensor, examples: int, name: str) -> None:
    if tuple(scores.shape) != (examples,):
        raise InterventionError(
            f"{name} gives a tensor of shape {tuple(scores.shape)}", expected=f"({examples},), one number per example"
        )
    if not scores.requires_grad:
        raise InterventionError(
            f"{name} cannot be differentiated",
            expected="a metric that changes smoothly with the logits",
            remedy="take iv.logit_difference or iv.answer_logprob, or patch exactly with iv.sweep",
        )
