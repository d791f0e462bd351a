"""Which neurons carry the label: L1 logistic regression, kept only where it keeps choosing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from interp_vlm.errors import DataError
from interp_vlm.stats.inputs import Groups, as_classes, as_column, as_groups

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["StableNeurons", "l1_logistic", "stable_neurons"]


@dataclass(frozen=True, eq=False)
class StableNeurons:
    """Neurons by how often L1 logistic regression chooses them on random halves of the pictures.

    Attributes:
        frequency: share of the halves in which each feature has a coefficient that is not 0.
        coefficient: mean coefficient of each feature over the halves, for standardised features.
        threshold: frequency from which a feature counts as stable.
        chosen: mean number of features chosen in a half.
        expected_false: bound on the expected number of stable features that carry nothing, chosen**2 / ((2 threshold -
            1) features) (Meinshausen and Buhlmann 2010, theorem 1); it assumes that noise features are exchangeable.
        penalty: strength of the L1 penalty on the mean loss.
        draws: number of halves.
        seed: of the halves.
    """

    frequency: Float[np.ndarray, " feature"]
    coefficient: Float[np.ndarray, " feature"]
    threshold: float
    chosen: float
    expected_false: float
    penalty: float
    draws: int
    seed: int

    @property
    def units(self) -> list[int]:
        """The stable features, most frequent first, the larger coefficient first among equals."""
        stable = np.flatnonzero(self.frequency >= self.threshold)
        order = np.lexsort((-np.abs(self.coefficient[stable]), -self.frequency[stable]))
        return stable[order].tolist()

    def top(self, k: int) -> list[int]:
        """The k most frequent features, stable or not.

        Raises:
            DataError: when fewer than k features were ever chosen.
        """
        ever = int((self.frequency > 0.0).sum())
        if k > ever:
            raise DataError(
                f"{k} neurons asked for, {ever} were ever chosen",
                expected=f"at most {ever}",
                remedy=f"lower the penalty, which is {self.penalty:g}",
            )
        return np.lexsort((-np.abs(self.coefficient), -self.frequency))[:k].tolist()

    def frame(self) -> pd.DataFrame:
        """A tidy table of the features that were ever chosen, most frequent first."""
        import pandas as pd

        order = np.lexsort((-np.abs(self.coefficient), -self.frequency))
        order = order[self.frequency[order] > 0.0]
        return pd.DataFrame(
            {
                "unit": order,
                "frequency": self.frequency[order],
                "coefficient": self.coefficient[order],
                "stable": self.frequency[order] >= self.threshold,
            }
        )

    def __repr__(self) -> str:
        return (
            f"StableNeurons({len(self.units)} of {len(self.frequency)} chosen in at least {self.threshold:.0%} of "
            f"{self.draws} halves, at most {self.expected_false:.2g} of them expected by chance)"
        )


def stable_neurons(
    features: ArrayLike,
    labels: ArrayLike,
    groups: Groups = None,
    *,
    penalty: float = 0.1,
    draws: int = 100,
    threshold: float = 0.75,
    seed: int = 0,
) -> StableNeurons:
    """Stability selection: L1 logistic regression on random halves of the pictures.

    Among correlated neurons L1 picks one nearly at random, so that a single fit says little about which neuron matters.

    Args:
        features: (n, d) activations of one layer.
        labels: (n,) booleans.
        groups: (n,) pictures; a half holds half of them.
        penalty: strength of the penalty: mean loss + penalty * |w|_1 on standardised features.
        draws: number of halves.
        threshold: share of halves in which a stable neuron is chosen, above one half.
        seed: of the halves.

    Raises:
        DataError: columns of another length, one class, NaN, or a threshold that bounds nothing.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> right = rng.random(200) < 0.5
        >>> hidden = rng.normal(size=(200, 20))
        >>> hidden[:, 7] += 2.0 * right
        >>> stable_neurons(hidden, right, draws=20).units
        [7]
    """
    values = as_column(features, "features", ndim=2)
    right = as_classes(labels, "labels", len(values))
    codes, count = as_groups(groups, len(values))
    if not 0.5 < threshold <= 1.0 or penalty <= 0.0 or draws < 2:
        raise DataError(
            f"threshold {threshold:g}, penalty {penalty:g}, {draws} draws",
            expected="a threshold above 0.5 and at most 1, a positive penalty, at least 2 draws",
        )
    if count < 4 or right.min() == right.max():
        raise DataError(
            f"{count} groups, {int(right.sum())} of {len(right)} labels True",
            expected="both classes in at least 4 groups",
            remedy="add examples",
        )
    rng = np.random.default_rng(seed)
    found = np.stack([_half(values, right, codes, count, penalty, rng) for _ in range(draws)])
    chosen = float((found != 0.0).sum(1).mean())
    bound = chosen**2 / ((2.0 * threshold - 1.0) * values.shape[1])
    return StableNeurons((found != 0.0).mean(0), found.mean(0), threshold, chosen, bound, penalty, draws, seed)


def _half(
    values: np.ndarray, right: np.ndarray, codes: np.ndarray, count: int, penalty: float, rng: np.random.Generator
) -> np.ndarray:
    """Coefficients on a random half of the groups that holds both classes."""
    for _ in range(100):
        rows = np.isin(codes, rng.permutation(count)[: count // 2])
        if right[rows].min() != right[rows].max():
            break
    else:
        raise DataError(
            "100 random halves of the groups hold one class only",
            expected="a class that occurs in several groups",
            remedy="add examples of the rarer class",
        )
    half = values[rows]
    spread = half.std(0)
    standard = (half - half.mean(0)) / np.where(spread > 1e-12 * (np.abs(half.mean(0)) + 1e-300), spread, np.inf)
    model = l1_logistic(1.0 / (penalty * len(half)))
    return model.fit(standard, right[rows]).coef_[0]


def l1_logistic(C: float) -> Any:
    """scikit-learn's L1 logistic regression, with an intercept that is hardly penalised."""
    from sklearn.linear_model import LogisticRegression

    # scikit-learn 1.8 replaced penalty="l1" by l1_ratio=1; on older ones l1_ratio alone would silently be L2
    old = LogisticRegression().get_params().get("penalty") == "l2"
    rule: dict[str, Any] = {"penalty": "l1"} if old else {"l1_ratio": 1.0}
    # liblinear penalises the intercept divided by its scaling
    options: dict[str, Any] = {"solver": "liblinear", "intercept_scaling": 100.0, "tol": 1e-5, "max_iter": 2000}
    return LogisticRegression(C=C, random_state=0, **options, **rule)
