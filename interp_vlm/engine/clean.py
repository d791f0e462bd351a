"""Runs without interventions: made once for each batch, and all that others read from them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from nnsight import NNsight
from torch import Tensor
from transformers import DynamicCache

from interp_vlm.engine.access import Access
from interp_vlm.engine.evidence import evidence, evidence_program
from interp_vlm.engine.full import Forward, answer_rows, forward
from interp_vlm.engine.trunk import Trunk
from interp_vlm.tokens.batch import Batch

__all__ = ["CleanRun", "CleanRuns"]


@dataclass
class CleanRun:
    """A batch's run without interventions: its answer logits, and whatever was asked of it so far.

    Attributes:
        weights: the state of the model's weights at the time.
        evidence: scores per position that selectors need.
        values: whole sites by (site, layer), for means and donors.
        trunk: what cones start from.
        decoder: the keyword arguments with which the model called its decoder.
    """

    logits: Float[Tensor, "batch vocab"]
    weights: object
    evidence: dict[str, Float[Tensor, "batch pos"]] = field(default_factory=dict)
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    trunk: Trunk | None = None
    decoder: Mapping[str, Any] | None = None


class CleanRuns:
    """The clean runs of one model, each kept as long as its batch and the model's weights.

    Args:
        root: the wrapped model.
        access: its sites.
        forward: makes the runs.
    """

    def __init__(self, root: NNsight, access: Access, forward: Forward = forward) -> None:
        self.root, self.access, self.forward = root, access, forward
        self._runs: weakref.WeakKeyDictionary[Batch, CleanRun] = weakref.WeakKeyDictionary()

    def known(self, batch: Batch) -> CleanRun | None:
        """The batch's clean run, if it was made with the weights that the model has now."""
        found = self._runs.get(batch)
        return found if found is not None and found.weights == self._weights() else None

    def of(
        self,
        batch: Batch,
        needs: Iterable[str] = (),
        values: Iterable[tuple[str, int]] = (),
        residuals: Iterable[int] = (),
    ) -> CleanRun:
        """The batch's run without interventions, made once and kept as long as the batch and the model's weights.

        Args:
            batch: the encoded examples.
            needs: evidence that selectors need.
            values: whole sites to keep, as (site, layer).
            residuals: layers from which cones are to start.
        """
        held = self.known(batch)
        trunk = held.trunk if held else None
        missing = [name for name in needs if held is None or name not in held.evidence]
        absent = [cell for cell in values if held is None or cell not in held.values]
        wanted = set(residuals)
        starts = wanted - set(trunk.residuals if trunk else ())
        if held is not None and not missing and not absent and not starts:
            return held
        program = evidence_program(self.access.anatomy, missing)
        captures = {site: set(layers) for site, layers in program.captures.items()}
        for site, layer in [*absent, *(("resid_pre", layer) for layer in starts)]:
            captures.setdefault(site, set()).add(layer)
        calls = frozenset(range(self.access.anatomy.n_layers)) if starts and trunk is None else frozenset[int]()
        inputs: dict[str, Any] = dict(batch.inputs)
        cache: Any = DynamicCache()
        if calls:  # a cache without a configuration keeps every position, in sliding layers too
            inputs["past_key_values"] = cache
        program = replace(program, captures=captures, calls=calls, decoder=True)
        recording = self.forward(self.root, self.access, inputs, program)
        assert recording.logits is not None
        held = held or CleanRun(answer_rows(recording.logits, batch.last), self._weights())
        held.decoder = recording.decoder
        held.evidence.update(evidence(self.access, missing, recording, batch))
        held.values.update({cell: recording.values[cell] for cell in absent})
        if calls:
            listed = [recording.calls[layer] for layer in range(self.access.anatomy.n_layers)]
            trunk = Trunk(listed, {}, [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers])
        if starts:
            assert trunk is not None
            # What other runs started from is not kept: the layers asked for now are those that will be used.
            before = {layer: trunk.residuals[layer] for layer in wanted - starts}
            trunk.residuals = before | {layer: recording.values["resid_pre", layer] for layer in starts}
            held.trunk = trunk
        self._runs[batch] = held
        return held

    def add(self, batch: Batch, logits: Float[Tensor, "batch pos vocab"]) -> None:
        """Note the answers of a run without interventions that was made for another reason."""
        if self.known(batch) is None:
            self._runs[batch] = CleanRun(answer_rows(logits, batch.last), self._weights())

    def forget(self, batch: Batch) -> None:
        """Drop what is known of a batch."""
        self._runs.pop(batch, None)

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """What changes when a weight is replaced or written in place (but not behind autograd's back, by `.data`)."""
        parameters = self.root._module.parameters()
        return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in parameters)
