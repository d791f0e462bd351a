"""Bad interventions: each is made and run on two examples of a tiny LLaVA of three layers, four heads and width 64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

import interp_vlm as iv
from interp_vlm import Ablation, ActivationPatch, AttentionKnockout, Steering
from interp_vlm.errors import DataError, InterpVLMError, InterventionError, SelectionError
from interp_vlm.tokens import select

__all__ = ["INTERVENTIONS", "WRONG_TYPES", "Bench"]


class Bench:
    """A model, a batch of two questions of different lengths, and what was captured of it."""

    def __init__(self, vlm: iv.VLM) -> None:
        pictures = [Image.new("RGB", (40, 30), (200, 10, 10)), Image.new("RGB", (30, 40), (0, 10, 10))]
        self.vlm = vlm
        self.batch = vlm.encode(pictures, ["is there a big cat on the left?", "how many dogs?"])
        self.single = vlm.encode(pictures[0], "a cat?")
        self.last = vlm.capture(self.batch, "resid_post", positions="last", layers=[0])


@dataclass(frozen=True)
class BadIntervention:
    """What is done with the bench, and the error that it must end with."""

    id: str
    act: Callable[[Bench], Any]
    says: str
    raises: type[InterpVLMError] = InterventionError

    def __repr__(self) -> str:
        return self.id


def run(id: str, make: Callable[[Bench], Any], says: str, raises: type[InterpVLMError] = InterventionError) -> Any:
    """A row whose intervention is made and run on the batch."""
    return BadIntervention(id, lambda bench: bench.vlm.run(bench.batch, make(bench)), says, raises)


def zero(site: str = "resid_post", **where: Any) -> Callable[[Bench], Ablation]:
    return lambda _: Ablation(site, to="zero", **where)


def to(value: Any, **more: Any) -> Callable[[Bench], Ablation]:
    return lambda _: Ablation("resid_post", [0], "last", to=value, **more)


def steer(direction: torch.Tensor, **more: Any) -> Callable[[Bench], Steering]:
    return lambda _: Steering("resid_post", [0], "last", direction=direction, **more)


def block(**where: Any) -> Callable[[Bench], AttentionKnockout]:
    return lambda _: AttentionKnockout(**where)


def patch(site: str = "resid_post", layers: Any = (0,), positions: Any = "last", **more: Any) -> Callable[[Bench], Any]:
    return lambda bench: ActivationPatch(site, layers, positions, source=bench.last, **more)


def nowhere(selector: Any) -> Callable[[Bench], Ablation]:
    return zero(positions=selector)


ONES, NAN = torch.ones(64), float("nan")
SELECTS_NOTHING = r"selects nothing in example 0"

INTERVENTIONS = (
    run("layer-beyond-the-last", zero(layers=[3]), r"layer 3 does not exist; expected 0 to 2"),
    run("layer-before-the-first", zero(layers=-4), r"layer -4 does not exist"),
    run("layer-of-thirty-digits", zero(layers=10**30), r"layer 10{30} does not exist"),
    run("no-layer", zero(layers=[]), r"no layer is named"),
    run("mask-of-layers", zero(layers=[True, False, True]), r"layers=\[True, False, True\]"),
    run("vision-layer-that-nobody-reads", zero("vision_post", layers=[2]), r"vision layer 2, which .* does not read"),
    run("duplicate-heads", zero("z", heads=[1, 1]), r"heads=\[1, 1\] names one twice"),
    run("one-head-by-two-names", block(heads=[3, -1]), r"heads=\[3, -1\] names one twice"),
    run("head-beyond-the-last", block(heads=4), r"head 4 does not exist; expected 0 to 3"),
    run("heads-where-there-are-none", zero(heads=[0]), r"'resid_post', which has no head axis"),
    run("unit-beyond-the-last", zero("mlp_post", units=[96]), r"unit 96 does not exist; expected 0 to 95"),
    run("duplicate-units", zero("mlp_post", units=[5, 5]), r"units=\[5, 5\] names one twice"),
    run("site-mistyped", zero("resid_pots"), r"no site 'resid_pots'; expected one of .*resid_post"),
    run("site-that-cannot-be-written", zero("pattern"), r"cannot write to 'pattern'.*use AttentionKnockout"),
    run("role-mistyped", zero(positions="lats"), r"role 'lats' does not exist; expected one of", SelectionError),
    run("queries-mistyped", block(queries="imgae"), r"role 'imgae' does not exist", SelectionError),
    run("words-that-are-not-there", nowhere(select.words("zebra")), rf"words\('zebra'\) {SELECTS_NOTHING}"),
    run("no-positions", nowhere([]), rf"positions\(\[\]\) {SELECTS_NOTHING}"),
    run("contradiction", nowhere(select.image & select.last), rf"image & last {SELECTS_NOTHING}"),
    run("box-beside-the-picture", nowhere(select.box(900, 900, 901, 901)), SELECTS_NOTHING),
    run("box-upside-down", lambda _: select.box(9, 9, 1, 1), r"has no area", SelectionError),
    run("box-of-nan", lambda _: select.box(NAN, 0, 1, 1), r"corner that is no number", SelectionError),
    run("position-beyond-the-row", nowhere([9999]), r"position 9999 does not exist", SelectionError),
    run("position-in-the-padding", nowhere([0]), r"position 0 is padding", SelectionError),
    run("more-than-there-are", nowhere(select.top(999)), r"finds 36 positions; expected at least 999", SelectionError),
    run("share-above-one", lambda _: select.top(1.5), r"a share of 1\.5", SelectionError),
    run("share-of-nan", lambda _: select.random(NAN), r"a share of nan", SelectionError),
    run("score-mistyped", lambda _: select.top(0.3, by="atention"), r"by='atention'; expected one of", SelectionError),
    run("score-of-no-layer", nowhere(select.top(0.3, by="attention@9")), r"layer 9 does not exist"),
    run("nan-direction", steer(ONES * NAN), r"direction holds 64 NaN or infinite values of 64"),
    run("infinite-direction", steer(torch.cat([ONES[:-1], torch.tensor([float("inf")])])), r"holds 1 NaN or infinite"),
    run("sparse-direction", steer(ONES.to_sparse()), r"direction is sparse"),
    run("direction-without-numbers", steer(ONES.to("meta")), r"direction is on the meta device"),
    run("nan-scale", steer(ONES, scale=NAN), r"scale=nan; expected a finite number"),
    run("scale-that-overflows", steer(ONES, scale=1e39), r"logits of examples \[0, 1\] contain NaN", DataError),
    run("direction-of-another-width", steer(torch.ones(65)), r"shape \(65,\); expected \(64,\)"),
    run("direction-for-other-layers", steer(torch.ones(3, 64)), r"shape \(3, 64\); expected \(64,\) or \(1, 64\)"),
    run("nan-to-write", to(ONES * NAN), r"to= holds 64 NaN"),
    run("one-nan-to-write", to(NAN), r"to= holds 1 NaN"),
    run("row-of-another-width", to(torch.ones(3)), r"to= has shape \(3,\)"),
    run("ablation-to-an-unknown-word", to("median"), r"to='median'; expected 'zero', 'mean'"),
    run("negative-seed", to("resample", seed=-1), r"seed=-1; expected a whole number from 0"),
    BadIntervention(
        "mean-of-one-row", lambda bench: bench.vlm.run(bench.single, to("mean")(bench)), r"averages a single row"
    ),
    BadIntervention("no-donor", lambda bench: bench.vlm.run(bench.single, to("resample")(bench)), r"needs a donor"),
    run("source-of-another-site", patch("mlp_out"), r"site 'mlp_out' was not captured"),
    run("source-of-another-layer", patch(layers=[1]), r"layer 1 of 'resid_post' was not captured"),
    run("source-of-other-positions", patch(positions="image"), r"the source holds no 'resid_post' at position"),
    BadIntervention(
        "source-of-another-batch",
        lambda bench: bench.vlm.run(bench.single, patch()(bench)),
        r"the source has 2 examples; expected 1",
    ),
    run("source-read-at-a-mistyped-role", patch(source_positions="imgae"), r"role 'imgae'", SelectionError),
    run("nothing-left-to-attend", block(keys="all"), r"with no key to attend"),
    run("edges-into-the-future", block(queries="image", keys="last"), r"blocks no edge"),
    run("no-heads", block(heads=()), r"no head is named"),
    BadIntervention(
        "unknown-engine",
        lambda bench: bench.vlm.run(bench.batch, block()(bench), engine="fast"),
        r"engine='fast'; expected 'auto'",
    ),
    BadIntervention(
        "choices-that-are-no-tokens",
        lambda bench: bench.vlm.run(bench.batch, choices=("yes", "zygomorphic")),
        r"'zygomorphic' is no single token",
        SelectionError,
    ),
    BadIntervention(
        "choices-that-are-one",
        lambda bench: bench.vlm.run(bench.batch, choices=("yes", "Yes ")),
        r"are no closed set",
        SelectionError,
    ),
    BadIntervention(
        "a-field-that-is-not-there", lambda _: iv.vary(AttentionKnockout(), layer=[0]), r"no field 'layer'"
    ),
    BadIntervention("a-word-for-values", lambda _: iv.vary(AttentionKnockout(), keys="image"), r"is one value"),
    BadIntervention("window-of-nothing", lambda bench: iv.windows(bench.vlm, 0), r"a window of 0 layers"),
    BadIntervention("sweep-over-no-batch", lambda bench: bench.vlm.sweep([], [block()(bench)]), r"no batch to sweep"),
    BadIntervention(
        "generate-nothing", lambda bench: bench.vlm.generate(bench.batch, max_new_tokens=0), r"max_new_tokens is 0"
    ),
    BadIntervention(
        "capture-of-no-site", lambda bench: bench.vlm.capture(bench.batch, ["residual"]), r"no site 'residual'"
    ),
)

# Annotations forbid these: the tests' type checker would be quicker than the library, so they run without it.
WRONG_TYPES = (
    run("fractional-layer-in-a-list", zero(layers=[0, 1.5]), r"layers=\[0, 1\.5\]; expected an int"),
    run("layer-that-is-nan", zero(layers=[NAN]), r"layers=\[nan\]; expected an int"),
    run("complex-direction", steer(ONES.to(torch.complex64)), r"direction is complex"),
    run("scale-as-text", steer(ONES, scale="4"), r"scale='4'; expected a finite number"),
    run("fractional-seed", to("resample", seed=1.5), r"seed=1\.5; expected a whole number"),
    run("nothing-to-write", to(None), r"to=None; expected 'zero', 'mean'"),
    run("no-source", lambda _: ActivationPatch("z", source={}), r"source is a dict; expected a Cache"),
    run("fractional-position", zero(positions=1.5), r"1\.5 names no positions", SelectionError),
    run("nothing-for-an-intervention", lambda _: None, r"None is a NoneType; expected an intervention"),
    run("a-word-for-an-intervention", lambda _: "AttentionKnockout", r"'AttentionKnockout' is a str"),
    run("one-value-to-vary", lambda _: iv.vary(AttentionKnockout(), layers=3), r"layers=3 is one value"),
    run("window-of-a-layer-and-a-half", lambda bench: iv.windows(bench.vlm, 1.5), r"a window of 1\.5 layers"),
    BadIntervention(
        "a-number-for-a-question",
        lambda bench: bench.vlm.encode(Image.new("RGB", (9, 9)), 7),
        r"a int is not a question",
        DataError,
    ),
    BadIntervention(
        "an-array-for-a-picture",
        lambda bench: bench.vlm.encode(np.zeros((9, 9, 3)), "a cat?"),
        r"a ndarray is not a picture.*PIL\.Image\.fromarray",
        DataError,
    ),
)
