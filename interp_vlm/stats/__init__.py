"""Statistics fit for claims: group bootstrap, permutation, McNemar, equivalence, multiplicity, abstention."""

from interp_vlm.stats.bootstrap import auroc, auroc_difference, difference, mean, point_biserial, ratio_of_means
from interp_vlm.stats.classical import equivalence, holm, mcnemar, smallest_effect, smallest_margin
from interp_vlm.stats.coverage import RiskCoverage, risk_coverage
from interp_vlm.stats.estimate import Estimate
from interp_vlm.stats.permutation import max_statistic, paired_test

__all__ = [
    "Estimate",
    "RiskCoverage",
    "auroc",
    "auroc_difference",
    "difference",
    "equivalence",
    "holm",
    "max_statistic",
    "mcnemar",
    "mean",
    "paired_test",
    "point_biserial",
    "ratio_of_means",
    "risk_coverage",
    "smallest_effect",
    "smallest_margin",
]
