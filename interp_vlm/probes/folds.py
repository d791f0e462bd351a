"""Cross-validation by group: a picture is in the training part or in the test part, never in both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from interp_vlm.errors import DataError

__all__ = ["Split", "assign", "permuted", "split", "unmoved"]


@dataclass(frozen=True, eq=False)
class Split:
    """Outer folds, and the inner folds of each outer training part.

    Attributes:
        outer: the fold in which each example is tested.
        inner: per outer fold, the inner fold of each of its training examples, in their order.
    """

    outer: Int[np.ndarray, " example"]
    inner: tuple[Int[np.ndarray, " _"], ...]

    def parts(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the training and of the test part of an outer fold."""
        return np.flatnonzero(self.outer != fold), np.flatnonzero(self.outer == fold)


def split(
    labels: Bool[np.ndarray, " example"], codes: Int[np.ndarray, " example"], folds: int, inner: int, seed: int
) -> Split:
    """Folds that keep groups together and the classes as even as they can be.

    Raises:
        DataError: one class only, fewer groups than folds, or a class found in fewer groups than folds.
    """
    if folds < 2 or inner < 2:
        raise DataError(f"{folds} outer and {inner} inner folds", expected="at least 2 of each")
    if labels.min() == labels.max():
        raise DataError(
            f"labels hold one class only: all {len(labels)} are {bool(labels[0])}",
            expected="right and wrong answers",
            remedy="add examples that the model answers differently",
        )
    groups = len(np.unique(codes))
    if groups < folds:
        raise DataError(
            f"{groups} groups for {folds} folds",
            expected=f"at least {folds} groups",
            remedy=f"add pictures, or pass folds={max(groups, 2)}",
        )
    for value in (True, False):
        holding = len(np.unique(codes[labels == value]))
        if holding <= max(folds - 1, inner):
            raise DataError(
                f"label {value} is found in {holding} groups only",
                expected=f"at least {max(folds, inner + 1)} for {folds} outer and {inner} inner folds",
                remedy="add examples of that class, or ask for fewer folds",
            )
    outer = assign(labels, codes, folds, seed)
    return Split(outer, tuple(_inner(labels, codes, outer != fold, inner, seed) for fold in range(folds)))


def _inner(labels: np.ndarray, codes: np.ndarray, train: np.ndarray, folds: int, seed: int) -> np.ndarray:
    return assign(labels[train], codes[train], folds, seed)


def assign(labels: np.ndarray, codes: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """The fold of each example: groups together, the classes (two or more) as even as they can be.

    Raises:
        DataError: when a part would hold one class at most.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    assigned = np.empty(len(labels), dtype=np.intp)
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for fold, (_, test) in enumerate(splitter.split(labels, labels, codes)):
        assigned[test] = fold
    for fold in range(folds):
        for part, rows in (("test", assigned == fold), ("training", assigned != fold)):
            if not rows.any() or labels[rows].min() == labels[rows].max():
                raise DataError(
                    f"the {part} part of fold {fold} has {int(rows.sum())} examples and one class at most",
                    expected="both classes in every part",
                    remedy="ask for fewer folds, add examples, or try another seed",
                )
    return assigned


def permuted(labels: np.ndarray, codes: Int[np.ndarray, " example"], rng: np.random.Generator) -> np.ndarray:
    """Labels with whole groups exchanged among groups of the same size.

    Questions about one picture share its difficulty, so single labels may not be exchanged; blocks of labels may. A
    group whose size no other has keeps its labels, which makes a test conservative.
    """
    new = labels.copy()
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    for size in np.unique(sizes[sizes > 0]):
        rows = order[starts[sizes == size][:, None] + np.arange(size)]
        new[rows] = labels[rows[rng.permutation(len(rows))]]
    return new


def unmoved(codes: Int[np.ndarray, " example"]) -> int:
    """How many groups have a size that no other has, and so keep their labels in every permutation."""
    sizes = np.bincount(codes)
    return int((np.unique(sizes[sizes > 0], return_counts=True)[1] == 1).sum())
