"""Layerwise probes: what hidden states say about the answer's correctness, with the baselines that keep it honest."""

from interp_vlm.probes.layerwise import probe_layers
from interp_vlm.probes.report import Baseline, ProbeReport
from interp_vlm.probes.sparse import StableNeurons, stable_neurons
from interp_vlm.probes.transfer import TransferReport, probe_transfer

__all__ = [
    "Baseline",
    "ProbeReport",
    "StableNeurons",
    "TransferReport",
    "probe_layers",
    "probe_transfer",
    "stable_neurons",
]
