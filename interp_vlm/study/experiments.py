"""The table of experiments, in the order of the report."""

from interp_vlm.study.accuracy import ACCURACY
from interp_vlm.study.bypass import BYPASS
from interp_vlm.study.heads import HEADS
from interp_vlm.study.knockout import KNOCKOUT
from interp_vlm.study.margin import MARGIN
from interp_vlm.study.masking import MASKING
from interp_vlm.study.neurons import NEURONS
from interp_vlm.study.patching import PATCHING
from interp_vlm.study.reliability import RELIABILITY
from interp_vlm.study.signals import SIGNALS

__all__ = ["EXPERIMENTS"]

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        *(ACCURACY, RELIABILITY, SIGNALS, HEADS, MASKING),
        *(KNOCKOUT, MARGIN, PATCHING, NEURONS, BYPASS),
    )
}
