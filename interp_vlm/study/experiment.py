"""What an experiment is: rows from a shard of examples, and a tidy table from one model's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from interp_vlm.engine.batches import batches
from interp_vlm.study.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from interp_vlm.data.example import Example
    from interp_vlm.study.material import Material, Shard
    from interp_vlm.study.neuron_sets import Chosen
    from interp_vlm.vlm import VLM

__all__ = ["Bench", "Experiment"]


@dataclass(frozen=True, eq=False)
class Bench:
    """A model on the bench: what an experiment needs to measure a shard.

    Attributes:
        vlm: the model.
        settings: of the study.
        reference: examples of other pictures, for means.
        fitting: examples of other pictures again, on which probes choose what to ablate.
        chosen: what they chose; found where it is needed when None.
    """

    vlm: VLM
    settings: Settings
    reference: tuple[Example, ...] = ()
    fitting: tuple[Example, ...] = ()
    chosen: Chosen | None = None

    @cached_property
    def image_mean(self) -> Tensor:
        """The mean projected image token of the reference pictures, (d,)."""
        from interp_vlm.engine.means import reference_mean

        encoded = [batch for _, batch in batches(self.vlm, self.reference, self.settings.batch_size)]
        return reference_mean(self.vlm, encoded, "projector_out")


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: of its files.
        material: the examples or pairs it works on, by condition.
        measure: rows of one shard, one per example and what was done to it.
        summarise: the tidy table of one model's rows.
        passes: forward passes for one item, roughly: what its progress counts.
        closing: the same for its table (passes of an embedded model): what ends with long work is begun first.
        absent: why the report lacks the experiment where it has no material.
        needs: which of the material's examples that are set aside it needs, "reference" or "fitting".
        prepare: what all shards of a model have in common and takes long: found once, from the examples set aside,
            which no shard then needs itself. Fields of the bench.
    """

    name: str
    material: Callable[[Material], Mapping[str, Sequence[Any]]]
    measure: Callable[[Bench, Shard], pd.DataFrame]
    summarise: Callable[[pd.DataFrame, Settings], pd.DataFrame]
    passes: int
    closing: int = 1
    absent: str = ""
    needs: tuple[str, ...] = ()
    prepare: Callable[[Bench], Mapping[str, Any]] | None = None
