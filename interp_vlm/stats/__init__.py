"""Statistics fit for claims: group bootstrap, permutation, McNemar, equivalence, multiplicity."""

from interp_vlm.stats.bootstrap import auroc, difference, mean, point_biserial, ratio_of_means
from interp_vlm.stats.classical import equivalence, holm, mcnemar
from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.permutation import max_statistic, paired_test

__all__ = [
    "Estimate",
    "auroc",
    "difference",
    "equivalence",
    "holm",
    "max_statistic",
    "mcnemar",
    "mean",
    "paired_test",
    "point_biserial",
    "ratio_of_means",
]
