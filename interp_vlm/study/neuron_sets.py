"""Which neurons to ablate: those that a probe of correctness reads, and random sets of the same size and norm.

A neuron is a dimension of the residual stream after a layer, which is what the probe reads. Everything is chosen on
examples of other pictures than those that are ablated afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.engine.batches import batches
from interp_vlm.engine.means import reference_mean
from interp_vlm.errors import DataError
from interp_vlm.probes.layerwise import probe_layers
from interp_vlm.probes.logistic import reduce, solve
from interp_vlm.probes.report import ProbeReport
from interp_vlm.probes.sparse import stable_neurons
from interp_vlm.study.experiment import Bench
from interp_vlm.study.judge import Judge
from interp_vlm.vlm import VLM

if TYPE_CHECKING:
    from interp_vlm.stats import Estimate
    from interp_vlm.tokens.batch import Batch

__all__ = ["SITE", "Chosen", "chosen", "count_of", "equal_norm_sets", "random_sets", "ranking"]

SITE = "resid_post"
DEPTH = 2 / 3
"""The relative depth at which families are compared: layer 21 of LLaVA-1.5's 32 and layer 18 of Qwen2-VL's 28, the
studied work's own best layers."""
STRATUM = 8
"""Neurons of neighbouring norm among which one is exchanged for another."""
FOLDS = ((5, 4), (3, 2), (2, 2))  # outer and inner; fewer where few pictures have errors


@dataclass(frozen=True, eq=False)
class Chosen:
    """What the examples set aside say about a model's neurons.

    Attributes:
        peak: the layer at which the probe tells right answers from wrong ones best, cross-validated by picture.
        depth: the layer at two thirds of the depth.
        aurocs: of each layer's probe.
        order: for those two layers, all neurons, the most important for the probe first.
        stable: for those two layers, how many neurons stability selection is sure of.
        values: for those two layers, the activations that resampling draws from.
        mean: of each neuron at the last position.
        largest: likewise.
        norm: mean absolute activation, likewise.
        everywhere: at the peak layer, the mean of each neuron over all positions.
        examples: how many there are.
        reason: why nothing could be chosen; empty where all went well.
    """

    peak: int = -1
    depth: int = -1
    aurocs: tuple[Estimate, ...] = ()
    order: dict[int, Int[np.ndarray, " unit"]] = field(default_factory=dict)
    stable: dict[int, int] = field(default_factory=dict)
    values: dict[int, Float[Tensor, "example unit"]] = field(default_factory=dict)
    mean: Float[Tensor, "layer unit"] = field(default_factory=lambda: torch.empty(0, 0))
    largest: Float[Tensor, "layer unit"] = field(default_factory=lambda: torch.empty(0, 0))
    norm: Float[np.ndarray, "layer unit"] = field(default_factory=lambda: np.empty((0, 0)))
    everywhere: Float[Tensor, " unit"] = field(default_factory=lambda: torch.empty(0))
    examples: int = 0
    reason: str = ""


_KNOWN: WeakKeyDictionary[VLM, tuple[Any, Chosen]] = WeakKeyDictionary()


def chosen(bench: Bench) -> Chosen:
    """What the fitting examples say about the neurons of the model on the bench; found once, here or elsewhere.

    Errors:
        none where the probe cannot be fitted (one class, too few pictures): the result's `reason` says why.
    """
    if bench.chosen is not None:
        return bench.chosen
    key = bench.settings.seed, bench.settings.batch_size, tuple(id(example) for example in bench.fitting)
    known = _KNOWN.get(bench.vlm)
    if known is None or known[0] != key:
        known = _KNOWN[bench.vlm] = key, _choose(bench)
    return known[1]


def _choose(bench: Bench) -> Chosen:
    vlm, seed = bench.vlm, bench.settings.seed
    depth = round(DEPTH * (vlm.anatomy.n_layers - 1))

    def judged(numbers: Sequence[int], batch: Batch) -> list[tuple[bool, Tensor]]:
        judge = Judge(vlm, batch, [bench.fitting[number] for number in numbers])
        right = [judge.right(number, answer) for number, answer in enumerate(vlm.run(batch).answers)]
        hidden = vlm.capture(batch, SITE, positions="last")[SITE][:, :, 0].float().cpu()
        return list(zip(right, hidden, strict=True))

    found = list(batches(vlm, bench.fitting, bench.settings.batch_size).each(judged))
    if not found:
        return Chosen(reason="no example is set aside on which a probe could be fitted")
    right = [correct for correct, _ in found]
    values, groups = torch.stack([hidden for _, hidden in found]), [example.group for example in bench.fitting]
    report = _report(values, right, groups, seed)
    if isinstance(report, str):
        return Chosen(reason=report)
    peak = int(report.peak.value)
    order, stable = {}, {}
    for layer in {peak, depth}:
        strength = float(np.median(report.C[layer]))
        order[layer], stable[layer] = ranking(values[:, layer], np.asarray(right), groups, strength, seed)
    return Chosen(
        peak, depth, report.auroc, order, stable, {layer: values[:, layer] for layer in order},
        values.double().mean(0), values.amax(0), values.double().abs().mean(0).numpy(),
        _everywhere(bench, peak), len(values),
    )  # fmt: skip


def _everywhere(bench: Bench, layer: int) -> Tensor:
    """Mean over all positions; two batches hold thousands of them."""
    few = bench.fitting[: 2 * bench.settings.batch_size]
    encoded = [batch for _, batch in batches(bench.vlm, few, bench.settings.batch_size)]
    return reference_mean(bench.vlm, encoded, SITE, layers=[layer])[0]


def _report(values: Tensor, right: list[bool], groups: list[str], seed: int) -> ProbeReport | str:
    """Probes of every layer, with as many folds as the errors allow, or why there are none."""
    reason = ""
    for folds, inner in FOLDS:
        try:
            return probe_layers(
                values, right, groups, position="before_answer", site=SITE, folds=folds, inner_folds=inner,
                permutations=0, resamples=1000, seed=seed,
            )  # fmt: skip
        except DataError as error:
            reason = f"no probe could be fitted: {error}"
    return reason


def ranking(
    features: Float[Tensor, "example unit"],
    right: Bool[np.ndarray, " example"],
    groups: list[str],
    strength: float,
    seed: int,
) -> tuple[Int[np.ndarray, " unit"], int]:
    """All neurons, the most important first, and how many of them are stable.

    First those that L1 logistic regression keeps choosing (stability selection at the studied work's penalty), then by
    the absolute weight of the L2 probe on standardised features.

    Args:
        features: activations of one layer.
        right: whether each answer is right.
        groups: pictures.
        strength: of the L2 probe, scikit-learn's C.
        seed: of the halves.

    Errors:
        none where stability selection has too few pictures: the L2 probe then ranks all.
    """
    reduced = reduce(features)
    labels = torch.as_tensor(right, dtype=torch.float64)[:, None]
    slopes, _ = solve(reduced, labels, torch.ones_like(labels), torch.tensor([strength], dtype=torch.float64))
    weights = reduced.standard(slopes)[:, 0].abs().cpu().numpy()
    by_weight = np.argsort(-weights, kind="stable")
    try:
        first = stable_neurons(features.numpy(), right, groups, seed=seed).units
    except DataError:
        first = []
    return np.concatenate([np.asarray(first, dtype=np.intp), by_weight[~np.isin(by_weight, first)]]), len(first)


def count_of(size: str, width: int) -> int:
    """How many of `width` neurons a size names.

    Example:
        >>> count_of("5", 128), count_of("25 %", 2048), count_of("10", 8)
        (5, 512, 8)
    """
    share = size.removesuffix(" %")
    return max(1, round(width * int(share) / 100)) if share != size else min(int(size), width)


def random_sets(width: int, count: int, draws: int, seed: int) -> Bool[np.ndarray, "draw unit"]:
    """Random sets of `count` neurons, a row of the mask for each.

    Example:
        >>> random_sets(16, 5, draws=3, seed=0).sum(1).tolist()
        [5, 5, 5]
    """
    rng = np.random.default_rng([seed, count])
    sets = np.zeros((draws, width), dtype=bool)
    for row in sets:
        row[rng.choice(width, count, replace=False)] = True
    return sets


def equal_norm_sets(
    norm: Float[np.ndarray, " unit"], units: Int[np.ndarray, " chosen"], draws: int, seed: int
) -> Bool[np.ndarray, "draw unit"]:
    """Random sets with as many neurons as `units`, of about the same summed norm.

    Neurons are sorted by norm and cut into strata of 8 neighbours; from each stratum as many are drawn as `units` has
    there.

    Args:
        norm: mean absolute activation of each neuron.
        units: the set to match.
        draws: how many sets.
        seed: of the draws.

    Example:
        >>> norm = np.arange(32.0)
        >>> sets = equal_norm_sets(norm, np.array([0, 30, 31]), draws=4, seed=0)
        >>> sets[:, :8].sum(1).tolist(), sets[:, 24:].sum(1).tolist()
        ([1, 1, 1, 1], [2, 2, 2, 2])
    """
    rng = np.random.default_rng([seed, len(units), 1])
    order = np.argsort(norm, kind="stable")
    sets = np.zeros((draws, len(norm)), dtype=bool)
    for start in range(0, len(norm), STRATUM):
        stratum = order[start : start + STRATUM]
        count = int(np.isin(stratum, units).sum())
        for row in sets:
            row[rng.choice(stratum, count, replace=False)] = True
    return sets
