"""Where in depth the right answer takes the lead, which parts give it that, and where the image tokens change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from interp_vlm.errors import SelectionError
from interp_vlm.readouts.lens import logit_lens
from interp_vlm.readouts.margin import truth_margin
from interp_vlm.readouts.scores import full_precision
from interp_vlm.readouts.spelling import prompt_ends, spellings
from interp_vlm.stats import Estimate, difference, ratio_of_means
from interp_vlm.stats.inputs import as_groups
from interp_vlm.stats.resampling import RESAMPLES, divide, draws, estimates
from interp_vlm.study.encoding import identity, measured
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import row, tidy

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Shard
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["MARGIN", "PARTS", "last_layers", "middle_layers"]

PARTS = {"attention": "attention layers", "mlp": "MLP layers"}
"""The parts of a layer, in words."""

_MARGINS = ("margin", "attention", "mlp", "between", "embedding", "constant", "rounding", "total")
_WHOLES = ("embedding", "constant", "total")  # of no layer
_LEVEL = 0.95
_BYTES = 2**30  # activations of image tokens held at once
_OWN = ("condition", "kind", "part", "layer")


def middle_layers(n_layers: int) -> list[int]:
    """The layers from 5/32 to 28/32 of depth, where the studied work (arXiv 2605.08200) finds flat updates.

    Its 32 layers count from 1, so that the last one is at depth 1.

    Example:
        >>> middle_layers(32)[0], middle_layers(32)[-1], middle_layers(4)
        (4, 27, [0, 1, 2])
    """
    return [layer for layer in range(n_layers) if 5 / 32 <= (layer + 1) / n_layers <= 28 / 32]


def last_layers(n_layers: int) -> list[int]:
    """The last tenth of the layers, at least one.

    Example:
        >>> last_layers(32), last_layers(4)
        ([29, 30, 31], [3])
    """
    return list(range(n_layers - max(1, round(n_layers / 10)), n_layers))


def measure(bench: Bench, shard: Shard) -> pd.DataFrame:
    """One row per question and layer: margin, its parts, and how much the layer changes the image tokens.

    A question whose right answer is not one token has no margin (NaN).
    """
    vlm = bench.vlm

    def rows_of(examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, Any]]:
        scored = _one_token(vlm, examples, batch)
        margins = _margins(vlm, [example for example, one in zip(examples, scored, strict=True) if one], batch)
        relative, absolute = _updates(vlm, batch)
        for number, (example, one) in enumerate(zip(examples, scored, strict=True)):
            known = {**identity(example, shard.condition), "scored": one}
            own = next(margins) if one else dict.fromkeys(_MARGINS, [math.nan] * vlm.anatomy.n_layers)
            own |= {"relative_update": relative[number], "absolute_update": absolute[number]}
            for layer in range(vlm.anatomy.n_layers):
                yield {**known, "layer": layer, **{name: values[layer] for name, values in own.items()}}

    return pd.DataFrame(measured(vlm, shard.examples, bench.settings.batch_size, rows_of))


def _one_token(vlm: VLM, examples: Sequence[Example], batch: Batch) -> list[bool]:
    """Which right answers are one token after their prompt."""
    found = []
    for example, end in zip(examples, prompt_ends(batch, vlm.tokenizer), strict=True):
        try:
            spellings(vlm.tokenizer, end, example.answer)
            found.append(True)
        except SelectionError:
            found.append(False)
    return found


def _margins(vlm: VLM, examples: Sequence[Example], batch: Batch) -> Iterator[dict[str, list[float]]]:
    """The margin of each example after each layer, and the last one's parts (`_WHOLES`: the same at every layer).

    Args:
        vlm: the model.
        examples: those whose right answer is one token.
        batch: all examples, encoded.
    """
    if not examples:
        return
    right = [example.answer for example in examples]
    if len(examples) < len(batch):
        batch = vlm.encode([example.image for example in examples], [example.question for example in examples])
    lens, split = logit_lens(vlm, batch, correct=right, k=1), truth_margin(vlm, batch, correct=right)
    columns = {
        "margin": lens.margin, "attention": split.attention, "mlp": split.mlp, "between": split.between,
        "embedding": split.embedding, "constant": split.constant, "rounding": split.unexplained, "total": split.total,
    }  # fmt: skip
    wide = {n: v if v.dim() == 3 else v[:, None].expand_as(lens.margin) for n, v in columns.items()}
    for number in range(len(examples)):
        yield {name: values[number, :, 0].tolist() for name, values in wide.items()}


def _updates(vlm: VLM, batch: Batch) -> list[list[list[float]]]:
    """Mean over image tokens of |resid_post - resid_pre|, as a share of |resid_pre| and as it is, (2, batch, layer)."""
    anatomy, sites = vlm.anatomy, ["resid_pre", "resid_post"]
    widest = max(len(tokens.image) for tokens in batch.tokens)
    size = max(1, _BYTES // (len(sites) * anatomy.n_layers * widest * anatomy.d_model * vlm.dtype.itemsize))
    found = []
    # A batch that fits stays whole: its clean run is known.
    parts = [batch] if size >= len(batch) else (batch[start : start + size] for start in range(0, len(batch), size))
    for part in parts:
        cache = vlm.capture(part, sites, positions="image")
        layers = []
        for before, after in zip(*(cache[site].unbind(1) for site in sites), strict=True):
            before = full_precision(before)
            change, length = (full_precision(after) - before).norm(dim=-1), before.norm(dim=-1)
            both = torch.stack([torch.where(cache.mask, change / length, 0.0), torch.where(cache.mask, change, 0.0)])
            layers.append(both.sum(dim=-1) / cache.mask.sum(dim=-1))
        found.append(torch.stack(layers, dim=-1))
    return torch.cat(found, dim=1).tolist()


def summarise(rows: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """The margin by layer, where it peaks, which parts make it, and the update of the image tokens by layer."""
    table: list[dict[str, Any]] = []
    for kind, part in _scopes(rows):
        facts = {"condition": part["condition"].iloc[0], "kind": kind}
        scored = part[part["scored"]]
        if len(scored):
            whole, few = part["example"].nunique(), scored["example"].nunique()
            note = f"{whole - few} of {whole} questions left out: their right answer is not one token"
            found = [*_peak(scored, facts, settings.seed), *_parts(scored, facts, settings.seed)]
            table += [_noted(each, note) for each in found] if few < whole else found
        table += _changes(part, {**facts, "part": "update"}, settings.seed)
    return tidy(table, _OWN)


def _scopes(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """All questions, and each kind where there are several."""
    yield "all", rows
    if rows["kind"].nunique() > 1:
        for kind, part in rows.groupby("kind", sort=True):
            yield str(kind), part


def _noted(found: dict[str, Any], note: str) -> dict[str, Any]:
    return {**found, "note": "; ".join(filter(None, (note, found["note"])))}


class _Curve:
    """A measure by layer: its mean over questions as a function of how often each picture was drawn.

    Args:
        rows: one per question and layer.
        column: the measure.
        seed: of the draws.
    """

    def __init__(self, rows: pd.DataFrame, column: str, seed: int) -> None:
        wide = rows.pivot(index="example", columns="layer", values=column)
        self.values, self.layers, self.seed = wide.to_numpy(dtype=np.float64), [int(at) for at in wide.columns], seed
        self.groups = rows.drop_duplicates("example").set_index("example")["group"].loc[wide.index]
        codes, self.count = as_groups(self.groups, len(wide))
        self._sums = np.zeros((self.count, len(self.layers)))
        np.add.at(self._sums, codes, self.values)
        self._sizes = np.bincount(codes, minlength=self.count).astype(np.float64)

    def __call__(self, drawn: Float[np.ndarray, "resample group"]) -> Float[np.ndarray, "resample layer"]:
        return divide(drawn @ self._sums, (drawn @ self._sizes)[:, None])

    @property
    def largest(self) -> int:
        """Index of the layer with the largest mean."""
        return int(np.argmax(self(np.ones((1, self.count)))[0]))

    def by_layer(self) -> Iterator[tuple[int, Estimate]]:
        """The mean of each layer."""
        return iter(zip(self.layers, estimates(self, *self._how()), strict=True))

    def peak(self) -> Estimate:
        """The layer of the largest mean; its interval holds the middle 95 % of the peaks of resampled curves."""
        value = self.layers[self.largest]
        method = "bootstrap over groups (percentile of layers)"
        found = Estimate(value, math.nan, math.nan, len(self.values), self.count, _LEVEL, method, self.seed)
        if self.count == 1:
            return replace(found, reason="one group: nothing to resample")
        peaks = np.asarray(self.layers)[np.argmax(draws(self, self.count, RESAMPLES, self.seed), axis=1)]
        tail = (1 - _LEVEL) / 2
        low, high = np.quantile(peaks, [tail, 1 - tail], method="inverted_cdf")
        return replace(found, low=float(low), high=float(high))

    def _how(self) -> tuple[int, int, float, int, int]:
        return len(self.values), self.count, _LEVEL, RESAMPLES, self.seed


def _peak(scored: pd.DataFrame, facts: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """The margin by layer, how large it becomes, and where."""
    curve = _Curve(scored, "margin", seed)
    total = {**facts, "part": "total"}
    lead = {"baseline": 0.0, "compared": "the best wrong answer"}
    means = [found for _, found in curve.by_layer()]
    for layer, found in zip(curve.layers, means, strict=True):
        yield row(found, "truth margin", "logits", layer=layer, **total, **lead)
    largest, place = means[curve.largest], curve.peak()
    yield _noted(row(largest, "peak truth margin", "logits", layer=-1, **total, **lead), "the interval of that layer")
    deepest = max(curve.layers[-1], 1)  # of a single layer, which is at depth 0
    end = {"layer": -1, "compared": "the last layer", **total}
    yield row(place, "peak layer", "", baseline=float(curve.layers[-1]), **end)
    yield row(place, "relative depth of the peak", "", scale=1 / deepest, baseline=1.0, **end)


def _parts(scored: pd.DataFrame, facts: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """What each part adds to the last layer's margin, and what share attention and MLP layers have in their sum."""
    nothing = {"baseline": 0.0, "compared": "no part in it", **facts}
    curves = {name: _Curve(scored, name, seed) for name in (*PARTS, "between")}
    for name, curve in curves.items():
        if name == "between" and not curve.values.any():  # most models add nothing between layers
            continue
        for layer, found in curve.by_layer():
            yield row(found, "contribution", "logits", part=name, layer=layer, **nothing)
    once = scored.drop_duplicates("example")
    for name in _WHOLES:
        found = difference(once[name], np.zeros(len(once)), once["group"], seed=seed)
        yield row(found, "contribution", "logits", part=name, layer=-1, **nothing)
    sums = {name: curves[name].values.sum(axis=1) for name in PARTS}
    groups, both = curves["mlp"].groups, sum(sums.values())
    for name, own in sums.items():
        found, equal = ratio_of_means(own, both, groups, seed=seed), {"baseline": 50.0, "compared": "equal shares"}
        yield row(found, "share of the margin", "%", scale=100, part=name, layer=-1, **equal, **facts)


def _changes(part: pd.DataFrame, facts: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
    """How much each layer changes the image tokens, and how the last layers compare with the middle."""
    none = {"baseline": 0.0, "compared": "no update", **facts}
    curves = {name: _Curve(part, f"{name}_update", seed) for name in ("relative", "absolute")}
    for name, curve in curves.items():
        for layer, found in curve.by_layer():
            yield row(found, f"{name} update of image tokens", "", layer=layer, **none)
    curve = curves["absolute"]
    n_layers = len(curve.layers)
    middle, last = middle_layers(n_layers), last_layers(n_layers)
    if not middle:
        return
    groups, values = curve.groups, curve.values
    jump = ratio_of_means(values[:, last].mean(axis=1), values[:, middle].mean(axis=1), groups, seed=seed)
    most, least = (middle[int(end(values[:, middle].mean(axis=0)))] for end in (np.argmax, np.argmin))
    flat = ratio_of_means(values[:, most], values[:, least], groups, seed=seed)
    words = f"middle: layers {middle[0]} to {middle[-1]}, last: {last[0]} to {last[-1]} of 0 to {n_layers - 1}"
    same = {"layer": -1, "baseline": 1.0, **facts}
    yield _noted(row(jump, "last layers against the middle", "", compared="the middle", **same), words)
    those = f"layer {most} over layer {least}; {words}"
    yield _noted(row(flat, "flatness of the middle", "", compared="a middle without slope", **same), those)


MARGIN = Experiment("margin", lambda material: material.interventions, measure, summarise, passes=4)
