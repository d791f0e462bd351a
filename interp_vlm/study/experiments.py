"""The table of experiments, in the order of the report."""

from interp_vlm.study.accuracy import ACCURACY
from interp_vlm.study.knockout import KNOCKOUT
from interp_vlm.study.masking import MASKING
from interp_vlm.study.patching import PATCHING
from interp_vlm.study.signals import SIGNALS

__all__ = ["EXPERIMENTS"]

EXPERIMENTS = {experiment.name: experiment for experiment in (ACCURACY, SIGNALS, MASKING, KNOCKOUT, PATCHING)}
