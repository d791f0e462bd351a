"""Traces that the caller writes: which batch is running, and interventions that act in the middle of a block."""

from __future__ import annotations

from typing import Any

from nnsight.intervention.tracer import InterleavingTracer

from interp_vlm.engine import plain
from interp_vlm.engine.access import places_of
from interp_vlm.engine.clean import CleanRuns
from interp_vlm.engine.full import alone, visit
from interp_vlm.engine.place import ResolvedPlace, resolve
from interp_vlm.engine.receipts import refuse_without_effect
from interp_vlm.engine.remote import Remote, StandIns
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import CellIntervention, Intervention
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.tokens.batch import Batch

__all__ = ["Live", "Tracer"]


class Live:
    """The traces of one model.

    Attributes:
        running: the wrapped model and the batch of each trace whose block is running.
    """

    def __init__(self, clean: CleanRuns) -> None:
        self.clean, self.access, self.anatomy = clean, clean.access, clean.access.anatomy
        self.running: list[tuple[Any, Batch]] = []

    def apply(self, intervention: Intervention) -> None:
        """Act at this point of the block, see `Intervention.apply`."""
        if not self.running:
            raise InterventionError(
                f"{intervention!r}.apply outside a trace",
                expected="a `with vlm.trace(batch):` block",
                remedy="or use vlm.run",
            )
        root, batch = self.running[-1]
        place = self._placed(intervention, batch)
        access, first, *later = self.access, *sorted(place.layers)

        def act(layer: int) -> None:
            if isinstance(intervention, CellIntervention) and intervention.needs_clean:
                place.clean_values[layer] = access.read(place.site.name, layer)
            visit(access, place.site.name, layer, [place])
            if layer == max(place.layers):
                refuse_without_effect([place])

        act(first)
        if later:
            plain.alongside(root, lambda: [act(layer) for layer in later])

    def _placed(self, intervention: Intervention, batch: Batch) -> ResolvedPlace:
        needs = {name for selector in intervention.selectors for name in selector.needs}
        known = self.clean.known(batch)
        evidence = known.evidence if known else {}
        missing = sorted(needs - set(evidence))
        if missing:
            raise InterventionError(
                f"{intervention!r} selects by {', '.join(missing)}, which is measured on the run without interventions",
                expected="a selection that is resolved before the trace",
                remedy="call vlm.positions(batch, selector) before the block",
            )
        return resolve(intervention, batch, self.anatomy, evidence)

    def stand_ins(self, vlm: Any, remote: Remote, batch: Batch) -> StandIns:
        """What goes in the place of the model and of interventions, when a block that names them is sent."""

        def model(found: Any) -> tuple[Any, ...]:
            if found is not vlm:
                raise InterventionError(
                    f"a block that runs {vlm.name!r} elsewhere names the model {found.name!r} too",
                    expected="one model in a block",
                )
            return plain.There, (remote.root, places_of(self.anatomy))

        def intervention(found: Intervention) -> tuple[Any, ...]:
            if isinstance(found, CellIntervention) and found.needs_clean:
                raise InterventionError(
                    f"{found!r} is computed from live values by code that is on this machine alone",
                    expected="an intervention that carries its values, in a block that runs elsewhere",
                    remedy="pass to=iv.reference_mean(...), or use vlm.run(batch, ..., remote=True)",
                )
            steps = remote.acts(self._placed(found, batch))
            return plain.Placed, (steps, repr(found), isinstance(found, AttentionKnockout) and not found.allow_empty)

        kinds = [Intervention]
        for kind in kinds:
            kinds.extend(kind.__subclasses__())
        return {type(vlm): model, Tracer: Tracer.plainly, **dict.fromkeys(kinds, intervention)}


class Tracer(InterleavingTracer):
    """A trace that holds the lock while its block runs, and tells the model which batch is running."""

    live: Live
    batch: Batch

    def begin(self, live: Live, batch: Batch) -> Tracer:
        """Say whose trace this is, before its block is entered."""
        self.live, self.batch = live, batch
        return self

    def execute(self, code: Any) -> None:
        with alone("a trace"):
            self.live.running.append((self.envoy, self.batch))
            try:
                super().execute(code)
            finally:
                self.live.running.pop()

    def plainly(self) -> tuple[Any, ...]:
        """This trace as nnsight's own, for a machine without this package."""
        state = {name: value for name, value in self.__getstate__().items() if name not in ("live", "batch")}
        return object.__new__, (InterleavingTracer,), state
