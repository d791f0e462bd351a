"""A planted model on the bench: its pairs of pictures, what interventions do to them, and the truth to hold it against.

An effect is always a change of one quantity, in nats: the score of the clean picture's answer minus that of the corrupt
picture's answer. What counts as an effect was fixed before any method was scored; see `counts`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

import interp_vlm as iv

__all__ = ["FLOOR", "LEVEL", "NOTHING", "SHARE", "WHAT", "Bench", "Found", "counts", "truth_of"]

LEVEL = 0.95
"""Coverage of the interval over pictures that must exclude 0."""
SHARE = 0.10
"""An effect must be at least this share of what exchanging the pictures does."""
FLOOR = 0.01
"""And at least this many nats: rounding is no effect."""

PROBED = 16
"""Pairs of pictures that probes and L1 neurons learn from."""
WHAT = {"layers": ("layers",), "heads": ("heads",), "positions": ("ends", "stream"), "neurons": ("neurons",)}
"""What methods are scored on. Positions are ends of edges where edges are cut, cells of the stream elsewhere."""
Names = frozenset[Hashable]


@dataclass(frozen=True)
class Found:
    """What a method names, or what was planted; None where it does not speak of such things.

    Attributes:
        layers: layers in which attention carries the answer.
        heads: (layer, head) that carry it.
        ends: (layer, "query" or "key", position) of the edges that they carry it along.
        stream: (layer, position) of the residual stream that hold it.
        neurons: (layer, unit).
        ranking: a score of every head, for methods that rank them; the sign says which way it pushes.
    """

    layers: Names | None = None
    heads: Names | None = None
    ends: Names | None = None
    stream: Names | None = None
    neurons: Names | None = None
    ranking: dict[tuple[int, int], float] | None = field(default=None, compare=False)


NOTHING = Found(frozenset(), frozenset(), frozenset(), frozenset(), frozenset())


def truth_of(planted: Any, backups: bool = False) -> Found:
    """The planted route, with its backups when asked for; nothing at all in a null model."""
    routes = [] if planted.null else [planted.route, *(planted.backups if backups else ())]
    edges = [edge for route in routes for edge in route.edges]
    return Found(
        layers=frozenset(edge.layer for edge in edges),
        heads=frozenset((edge.layer, head) for edge in edges for head in edge.heads),
        ends=frozenset(
            (edge.layer, side, place)
            for edge in edges
            for side, places in (("query", edge.queries), ("key", edge.keys))
            for place in places
        ),
        stream=frozenset(cell for route in routes for cell in route.positions),
        neurons=frozenset(cell for route in routes for cell in route.neurons),
    )


def counts(
    effects: Float[np.ndarray, "cell picture"], whole: Float[np.ndarray, " picture"]
) -> Bool[np.ndarray, " cell"]:
    """Which effects count: the 95 % t interval over pictures excludes 0, and the mean is a tenth of the whole or more.

    Args:
        effects: in nats.
        whole: what exchanging the pictures does.

    Example:
        >>> counts(np.array([[4.0, 5.0, 6.0], [4.0, -5.0, 6.0], [0.1, 0.1, 0.1]]), np.array([9.0, 9.0, 9.0])).tolist()
        [True, False, False]
    """
    mean = effects.mean(axis=-1)
    error = effects.std(axis=-1, ddof=1) / np.sqrt(effects.shape[-1])
    reach = stats.t.ppf((1.0 + LEVEL) / 2.0, effects.shape[-1] - 1) * error
    return (abs(mean) > reach) & (abs(mean) >= max(FLOOR, SHARE * abs(whole.mean())))


class Bench:
    """A planted model with pairs of pictures, clean and corrupt.

    Args:
        planted: the model and its truth.
        pictures: number of pairs.
        differ: the pictures of a pair differ in the colour of the patch that carries the answer; otherwise they show
            the same colour before other backgrounds, so that there is nothing to find.

    Attributes:
        whole: (picture,) what exchanging the pictures does to the score of the clean picture's answer minus that of
            the other answer.
    """

    def __init__(self, planted: Any, pictures: int, differ: bool = True) -> None:
        self.planted, self.vlm, self.pictures = planted, planted.vlm, pictures
        self.clean, corrupt, self.right, self.wrong = planted.pairs(pictures)
        self.corrupt = corrupt if differ else planted.pairs(pictures, seed=2)[0]
        both = [*self.clean.images, *self.corrupt.images]
        self.both = self.vlm.encode([row[0] for row in both], [planted.question] * len(both))
        # for methods that learn from labels: pictures that no other method sees
        *self.probed, right, wrong = planted.pairs(PROBED, seed=1)
        self.labels = np.array([answer == planted.answers[0] for answer in (*right, *wrong)])
        self.metric = iv.logit_difference(self.right, self.wrong)
        self._metric_of_both = iv.logit_difference(self.right * 2, self.wrong * 2)
        self.whole = self._difference(self.vlm.sweep(self.both, [], self._metric_of_both).baseline[None])[0]

    @property
    def layers(self) -> range:
        return range(self.vlm.anatomy.n_layers)

    @property
    def heads(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer in self.layers for head in range(self.vlm.anatomy.n_heads)]

    @cached_property
    def places(self) -> list[int]:
        """The positions of the prompt, the same in every example."""
        return self.clean.tokens[0].all.tolist()

    def blocked(self, many: Sequence[Any]) -> Float[np.ndarray, "intervention picture"]:
        """How much of the pictures' difference is gone when both are run with the interventions."""
        return self.whole - self._difference(self.vlm.sweep(self.both, many, self._metric_of_both).values)

    def restored(self, many: Sequence[Any]) -> Float[np.ndarray, "intervention picture"]:
        """What patches from the clean run add to the corrupt one (denoising)."""
        return self._change(self.corrupt, many)

    def removed(self, many: Sequence[Any]) -> Float[np.ndarray, "intervention picture"]:
        """What patches from the corrupt run take from the clean one (noising)."""
        return -self._change(self.clean, many)

    def counts(self, effects: Float[np.ndarray, "cell picture"]) -> Bool[np.ndarray, " cell"]:
        return counts(effects, self.whole)

    def _change(self, batch: iv.Batch, many: Sequence[Any]) -> np.ndarray:
        sweep = self.vlm.sweep(batch, many, self.metric)
        return (sweep.values - sweep.baseline).double().cpu().numpy()

    def _difference(self, values: Any) -> np.ndarray:
        return (values[:, : self.pictures] - values[:, self.pictures :]).double().cpu().numpy()
