"""Everything that is computed with a model, for tests that want the same numbers of two copies of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import interp_vlm as iv
from interp_vlm import select
from interp_vlm.probes.scoring import one_pass
from interp_vlm.readouts.identity import identity_of

__all__ = ["READINGS", "encoded", "many", "tensors"]

SCENES = iv.data.digit_scenes(n=2)


def encoded(vlm: iv.VLM, scenes: Sequence[Any] = SCENES) -> iv.Batch:
    """Two examples; the pictures may be other ones."""
    return vlm.encode([scene.image for scene in scenes], [scene.question for scene in SCENES])


def many(vlm: iv.VLM) -> list[Any]:
    """Interventions of every plan, each in one layer or in several that lie far apart."""
    width, top = vlm.anatomy.d_model, vlm.anatomy.n_layers - 1
    return [
        iv.AttentionKnockout("last", "image", layers=[1], heads=[0, 1]),
        iv.AttentionKnockout("last", select.top(0.5, by="attention"), layers="all"),
        iv.AttentionKnockout("question", "image", layers=[1, top]),
        iv.Ablation("mlp_post", layers="all", units=[1, 2], positions="last", to="mean"),
        iv.Ablation("z", layers=[1, top - 1], heads=[1], positions="question", to="zero"),
        iv.Ablation("resid_mid", layers=[1, 2], positions="last", to="resample"),
        iv.Ablation("attn_out", layers=[1, 2], positions="text", to="mean"),
        iv.Steering("resid_post", layers=[1, 2], positions="last", direction=torch.ones(width), scale=2.0),
        iv.Ablation("resid_pre", layers=[2], positions="all", to="mean"),
        iv.Ablation("projector_out", positions=select.random(0.5, seed=0), to="mean"),
        iv.Ablation("vision_post", layers=[0], to="zero"),
        [
            iv.AttentionKnockout("last", "image", layers=[1, top]),
            iv.Ablation("mlp_out", layers=[2], positions="last", to="zero"),
        ],
    ]


def _patched(vlm: iv.VLM, batch: iv.Batch) -> Any:
    sites = ["resid_pre", "z", "vision_post"]
    source = vlm.capture(_other(vlm), sites)
    where = {"resid_pre": [1, 2], "z": "all", "vision_post": [0]}
    patches = [iv.ActivationPatch(site, layers, "image", source=source) for site, layers in where.items()]
    return [vlm.run(batch, patch).logits for patch in patches]


def _other(vlm: iv.VLM) -> iv.Batch:
    return encoded(vlm, SCENES[::-1])


def _generated(vlm: iv.VLM, batch: iv.Batch, during: Any) -> Any:
    edits = [
        iv.AttentionKnockout("last", "image", layers=[1, 2], heads=[0], during=during),
        iv.Steering(
            "resid_post", layers=[1, 2], positions="last", direction=torch.ones(vlm.anatomy.d_model), during=during
        ),
    ]
    return vlm.generate(batch, edits, max_new_tokens=3).ids


def _traced(vlm: iv.VLM, batch: iv.Batch) -> Any:
    knockout = iv.AttentionKnockout("last", "image", layers=[1, 2])
    with vlm.trace(batch):
        knockout.apply(vlm)
        live: Any = vlm.site("resid_post", 2)
        hidden = live.save()
        logits = vlm.nnsight.output.logits.save()
    return hidden.to(vlm.device), logits  # live values lie with their layers


READINGS: Mapping[str, Callable[[iv.VLM, iv.Batch], Any]] = {
    "plain": lambda vlm, batch: vlm.run(batch).logits,
    "sites": lambda vlm, batch: vlm.capture(batch, ["resid_pre", "z", "mlp_post", "resid_post"], "question"),
    "masks": lambda vlm, batch: vlm.capture(batch, ["attn_mask", "pattern"], "text"),
    "tower": lambda vlm, batch: vlm.capture(batch, ["vision_post", "projector_out"]),
    "edited": lambda vlm, batch: vlm.capture(batch, ["resid_post"], interventions=many(vlm)[-1]),
    "patched": _patched,
    "mean": lambda vlm, batch: iv.reference_mean(vlm, batch, "resid_post", positions="image"),
    "sinks": lambda vlm, batch: vlm.positions(batch, select.sinks(threshold=1.0)),
    "lens": lambda vlm, batch: iv.logit_lens(vlm, batch, "question", keep_logits=True),
    "margin": lambda vlm, batch: iv.truth_margin(vlm, batch, correct="0", wrong="1"),
    "heads": lambda vlm, batch: iv.head_contributions(vlm, batch, correct="0", wrong="1"),
    "consistency": lambda vlm, batch: iv.self_consistency(vlm, batch, k=3).samples,
    "scores": lambda vlm, batch: one_pass(vlm, batch, "resid_post", range(vlm.anatomy.n_layers)),
    "traced scores": lambda vlm, batch: one_pass(vlm, batch, "z", range(vlm.anatomy.n_layers)),
    "generation": lambda vlm, batch: vlm.generate(batch, max_new_tokens=3).ids,
    "generation, prompt": lambda vlm, batch: _generated(vlm, batch, "prompt"),
    "generation, both": lambda vlm, batch: _generated(vlm, batch, "both"),
    "trace": _traced,
    "attribution": lambda vlm, batch: iv.attribution(vlm, batch, _other(vlm), "z"),
    "attribution of neurons": lambda vlm, batch: iv.attribution(vlm, batch, _other(vlm), "mlp_post", audit=0),
    "leaks": lambda vlm, batch: vlm.leaks(batch, iv.AttentionKnockout("last", "image", layers=[1, 2])).routes,
    "identity": lambda vlm, batch: identity_of(vlm),
}
"""From a model and a batch to numbers, by name."""


def tensors(result: Any) -> list[Any]:
    """All tensors of a result, in its own order; and what else it is made of, as text."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, iv.Cache):
        return [value for name in result for value in (name, result[name])] + [result.positions, result.mask]
    if isinstance(result, list | tuple):
        return [part for each in result for part in tensors(each)]
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return [value for value in vars(result).values() if isinstance(value, Tensor)] or [str(result)]
    return [str(result)]
