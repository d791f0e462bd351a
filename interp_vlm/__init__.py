"""Mechanistic interpretability primitives for vision-language models, on nnsight.

Everything of the public vocabulary is here, imported when first used:

    import interp_vlm as iv
    vlm = iv.load("testbed:llava")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp_vlm import data, stats
    from interp_vlm.engine.batches import Batches, batches
    from interp_vlm.engine.leaks import Leaks, leaks
    from interp_vlm.engine.means import reference_mean
    from interp_vlm.engine.receipts import Receipt
    from interp_vlm.engine.sites_of import sites_of
    from interp_vlm.engine.sweep import Sweep
    from interp_vlm.errors import (
        DataError,
        InterpVLMError,
        InterventionError,
        ModelError,
        SelectionError,
        StudyError,
    )
    from interp_vlm.interop.transformer_lens.bridge import to_bridge
    from interp_vlm.interventions.ablation import Ablation
    from interp_vlm.interventions.cache import Cache
    from interp_vlm.interventions.knockout import AttentionKnockout
    from interp_vlm.interventions.patch import ActivationPatch
    from interp_vlm.interventions.steering import Steering
    from interp_vlm.interventions.vary import vary, windows
    from interp_vlm.models.anatomy import Anatomy
    from interp_vlm.probes.layerwise import probe_layers
    from interp_vlm.probes.monitor import ReliabilityMonitor
    from interp_vlm.probes.report import ProbeReport
    from interp_vlm.probes.sparse import stable_neurons
    from interp_vlm.probes.transfer import probe_transfer
    from interp_vlm.readouts import protocols, store
    from interp_vlm.readouts.answers import Answer
    from interp_vlm.readouts.attribution import Attribution, attribution
    from interp_vlm.readouts.consistency import SelfConsistency, self_consistency
    from interp_vlm.readouts.head_contribution import HeadContributions, head_contributions
    from interp_vlm.readouts.lens import LogitLens, logit_lens
    from interp_vlm.readouts.margin import TruthMargin, truth_margin
    from interp_vlm.readouts.metrics import answer_logprob, answer_probability, flipped, logit_difference
    from interp_vlm.readouts.run import Generation, Run
    from interp_vlm.sites import SITES, Site
    from interp_vlm.tokens import select
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.tokens.token_map import TokenMap
    from interp_vlm.vlm import VLM, load, sweep

__version__ = "0.1.0"

_HOME = {
    "interp_vlm.engine.batches": ("Batches", "batches"),
    "interp_vlm.engine.leaks": ("Leaks", "leaks"),
    "interp_vlm.engine.means": ("reference_mean",),
    "interp_vlm.engine.receipts": ("Receipt",),
    "interp_vlm.engine.sites_of": ("sites_of",),
    "interp_vlm.engine.sweep": ("Sweep",),
    "interp_vlm.errors": (
        "DataError",
        "InterpVLMError",
        "InterventionError",
        "ModelError",
        "SelectionError",
        "StudyError",
    ),
    "interp_vlm.interop.transformer_lens.bridge": ("to_bridge",),
    "interp_vlm.interventions.ablation": ("Ablation",),
    "interp_vlm.interventions.cache": ("Cache",),
    "interp_vlm.interventions.knockout": ("AttentionKnockout",),
    "interp_vlm.interventions.patch": ("ActivationPatch",),
    "interp_vlm.interventions.steering": ("Steering",),
    "interp_vlm.interventions.vary": ("vary", "windows"),
    "interp_vlm.models.anatomy": ("Anatomy",),
    "interp_vlm.probes.layerwise": ("probe_layers",),
    "interp_vlm.probes.monitor": ("ReliabilityMonitor",),
    "interp_vlm.probes.report": ("ProbeReport",),
    "interp_vlm.probes.sparse": ("stable_neurons",),
    "interp_vlm.probes.transfer": ("probe_transfer",),
    "interp_vlm.readouts.answers": ("Answer",),
    "interp_vlm.readouts.attribution": ("Attribution", "attribution"),
    "interp_vlm.readouts.consistency": ("SelfConsistency", "self_consistency"),
    "interp_vlm.readouts.head_contribution": ("HeadContributions", "head_contributions"),
    "interp_vlm.readouts.lens": ("LogitLens", "logit_lens"),
    "interp_vlm.readouts.margin": ("TruthMargin", "truth_margin"),
    "interp_vlm.readouts.metrics": ("answer_logprob", "answer_probability", "flipped", "logit_difference"),
    "interp_vlm.sites": ("SITES", "Site"),
    "interp_vlm.tokens.batch": ("Batch",),
    "interp_vlm.tokens.token_map": ("TokenMap",),
    "interp_vlm.readouts.run": ("Generation", "Run"),
    "interp_vlm.vlm": ("VLM", "load", "sweep"),
}
_MODULES = {
    "data": "interp_vlm.data",
    "protocols": "interp_vlm.readouts.protocols",
    "select": "interp_vlm.tokens.select",
    "stats": "interp_vlm.stats",
    "store": "interp_vlm.readouts.store",
}
_NAMES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "SITES",
    "VLM",
    "Ablation",
    "ActivationPatch",
    "Anatomy",
    "Answer",
    "AttentionKnockout",
    "Attribution",
    "Batch",
    "Batches",
    "Cache",
    "DataError",
    "Generation",
    "HeadContributions",
    "InterpVLMError",
    "InterventionError",
    "Leaks",
    "LogitLens",
    "ModelError",
    "ProbeReport",
    "Receipt",
    "ReliabilityMonitor",
    "Run",
    "SelectionError",
    "SelfConsistency",
    "Site",
    "Steering",
    "StudyError",
    "Sweep",
    "TokenMap",
    "TruthMargin",
    "answer_logprob",
    "answer_probability",
    "attribution",
    "batches",
    "data",
    "flipped",
    "head_contributions",
    "leaks",
    "load",
    "logit_difference",
    "logit_lens",
    "probe_layers",
    "probe_transfer",
    "protocols",
    "reference_mean",
    "select",
    "self_consistency",
    "sites_of",
    "stable_neurons",
    "stats",
    "store",
    "sweep",
    "to_bridge",
    "truth_margin",
    "vary",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
    else:
        raise AttributeError(f"module 'interp_vlm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
