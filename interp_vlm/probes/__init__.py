"""Layerwise probes: what hidden states say about the answer's correctness, with the baselines that keep it honest."""

from interp_vlm.probes.layerwise import probe_layers
from interp_vlm.probes.report import Baseline, ProbeReport

__all__ = ["Baseline", "ProbeReport", "probe_layers"]
