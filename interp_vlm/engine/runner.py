"""The engine: runs a batch with interventions, and records activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from nnsight import NNsight
from torch import Tensor

from interp_vlm.engine import receipts
from interp_vlm.engine.access import Access
from interp_vlm.engine.attention import patterns
from interp_vlm.engine.clean import CleanRun, CleanRuns
from interp_vlm.engine.cone import Rest, alike, run_cone, run_decoder
from interp_vlm.engine.devices import Copies
from interp_vlm.engine.full import Forward, Program, answer_rows, forward, generate
from interp_vlm.engine.memory import Budget, budget
from interp_vlm.engine.packed import run_packed
from interp_vlm.engine.place import (
    Found,
    ResolvedPlace,
    Rows,
    layers_of,
    padded_positions,
    refuse_pictureless,
    resolve,
    selected,
)
from interp_vlm.engine.plan import Plan, check_engine, choose, working
from interp_vlm.engine.receipts import Receipt
from interp_vlm.engine.trunk import Trunk
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import CellIntervention, Intervention
from interp_vlm.interventions.cache import Cache
from interp_vlm.models.anatomy import Anatomy
from interp_vlm.sites import site as site_named
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.select import Selector

__all__ = ["Engine", "Outcome"]

_NEVER = -1


@dataclass(frozen=True, eq=False)
class Outcome:
    """One run: the answer logits, with and without interventions, the receipts and the plan."""

    logits: Float[Tensor, "batch vocab"]
    clean_logits: Float[Tensor, "batch vocab"]
    receipts: tuple[Receipt, ...]
    plan: Plan


class Engine:
    """Runs one wrapped model.

    Args:
        root: the Hugging Face model, wrapped by nnsight.
        anatomy: the facts of its architecture.
        name: the model's name, kept in caches.
        forward: makes the passes through the whole model.
    """

    def __init__(self, root: NNsight, anatomy: Anatomy, name: str, forward: Forward = forward) -> None:
        self.root, self.anatomy, self.name, self.forward = root, anatomy, name, forward
        self.access = Access(root, anatomy)
        self.clean = CleanRuns(root, self.access, forward)
        # The first layer from which the decoder's layers, called one after another, gave the model's own answer.
        self._proved = anatomy.n_layers
        self._decoder_proved: bool | None = None

    def run(
        self, batch: Batch, interventions: Sequence[Intervention], engine: str = "auto", memory: Budget = None
    ) -> Outcome:
        """Run a batch with interventions, applied in the model's own order.

        Raises:
            InterventionError: for an intervention that is out of range or cannot have an effect.
        """
        ((_, outcome),) = self.runs(batch, [interventions], engine, memory, ahead=True)
        return outcome

    def runs(
        self,
        batch: Batch,
        groups: Sequence[Sequence[Intervention]],
        engine: str = "auto",
        memory: Budget = None,
        *,
        ahead: bool = False,
    ) -> Iterator[tuple[int, Outcome]]:
        """Run a batch once for each group of interventions, on one run without any.

        Args:
            batch: the encoded examples.
            groups: interventions that run together.
            engine: one of `ENGINES`.
            memory: what may be kept, see `budget`.
            ahead: keep what runs from other layers would need too, where it fits.

        Yields:
            The number of a group and its outcome, in the order in which they are computed.
        """
        check_engine(engine)
        allowed = budget(memory, batch.inputs["input_ids"].device)
        cones = engine != "full" and self._has_room(batch, allowed)
        starts = [self._start_of(group) if cones else None for group in groups]
        for chunk in self._chunks(batch, starts, allowed):
            yield from self._chunk(batch, {number: groups[number] for number in chunk}, starts, engine, allowed, ahead)

    def _chunk(
        self,
        batch: Batch,
        groups: Mapping[int, Sequence[Intervention]],
        starts: Sequence[int | None],
        engine: str,
        allowed: int,
        ahead: bool,
    ) -> Iterator[tuple[int, Outcome]]:
        """Groups that share one clean run."""
        wanted = {layer for number in groups if (layer := starts[number]) is not None}
        if wanted and ahead and self._kept(batch, self.anatomy.n_layers) <= allowed:
            wanted = set(range(self.anatomy.n_layers))
        clean, listed = self._prepared(batch, list(groups.values()), wanted)
        resolved = dict(zip(groups, listed, strict=True))
        trunk, why = self._trunk(batch, clean, bool(wanted))
        decoder = self._decoder(batch, clean) if engine == "auto" else None
        plans = {
            number: choose(edits, batch, self.anatomy.n_layers, trunk, engine, why, decoder)
            for number, edits in resolved.items()
        }
        by_rows = [number for number in groups if plans[number].name in ("last_row", "suffix")]
        packed = [(number, resolved[number], plans[number]) for number in by_rows]
        for number, edits in resolved.items():
            if not edits:
                yield number, Outcome(clean.logits, clean.logits, (), plans[number])
            elif number not in by_rows:
                yield number, self._one(batch, edits, plans[number], clean)
        for number, logits, issued in run_packed(self.root, self.access, trunk, clean.logits, batch, packed, allowed):
            yield number, Outcome(logits, clean.logits, issued, plans[number])

    def _one(self, batch: Batch, edits: Sequence[ResolvedPlace], chosen: Plan, clean: CleanRun) -> Outcome:
        """One run by the plan."""
        last = batch.last.to(clean.logits.device)
        if chosen.tower:
            recording = self.forward(self.root, self.access, batch.inputs, receipts.program(edits))
            assert recording.logits is not None
            logits = answer_rows(recording.logits, batch.last)
        elif chosen.name == "full":
            assert clean.decoder is not None
            recording = run_decoder(self.root, self.access, clean.decoder, last, receipts.program(edits))
            assert recording.logits is not None
            logits = recording.logits
        else:
            assert clean.trunk is not None
            cone = Rest(clean.trunk, chosen.layer, last)
            recording = run_cone(self.root, self.access, cone, receipts.program(edits))
            assert recording.logits is not None
            logits = clean.logits if chosen.idle else recording.logits[:, 0]
        receipts.refuse_without_effect(edits)
        change = float((logits - clean.logits).abs().max())
        (issued,) = receipts.issue([edits], recording, self.access, [change], chosen.name)
        return Outcome(logits, clean.logits, issued, chosen)

    def plan(
        self, batch: Batch, interventions: Sequence[Intervention], engine: str = "auto", memory: Budget = None
    ) -> Plan:
        """How these interventions would be run."""
        check_engine(engine)
        cones = engine != "full" and self._has_room(batch, budget(memory, batch.inputs["input_ids"].device))
        start = self._start_of(interventions) if cones else None
        clean, (edits,) = self._prepared(batch, [interventions], set() if start is None else {start})
        trunk, why = self._trunk(batch, clean, start is not None)
        decoder = self._decoder(batch, clean) if engine == "auto" else None
        chosen = choose(edits, batch, self.anatomy.n_layers, trunk, engine, why, decoder)
        return replace(chosen, working=working(chosen, edits, batch, self.anatomy, clean.logits.element_size()))

    def _start_of(self, group: Sequence[Intervention]) -> int | None:
        """The decoder layer from which a group's cone would start; None where it touches the image side or nothing."""
        if not group or any(each.where.part != "decoder" for each in group):
            return None
        return min(layer for each in group for layer in layers_of(each.where, each.layers, self.anatomy))  # type: ignore[attr-defined]

    def _kept(self, batch: Batch, layers: int) -> int:
        """Bytes of a trunk: keys and values of every layer, residuals of some."""
        a, weight = self.anatomy, next(self.root._module.parameters())
        row = 2 * a.n_layers * a.n_kv_heads * a.d_head + layers * a.d_model
        return batch.inputs["input_ids"].numel() * row * weight.element_size()

    def _has_room(self, batch: Batch, allowed: int) -> bool:
        """Whether a trunk with the residuals of one layer is there already, or may be kept."""
        known = self.clean.known(batch)
        return (known is not None and known.trunk is not None) or self._kept(batch, 1) <= allowed

    def _chunks(self, batch: Batch, starts: Sequence[int | None], allowed: int) -> list[list[int]]:
        """Numbers of the groups that one clean run serves, so that what it keeps stays within the budget."""
        layers = sorted({start for start in starts if start is not None})
        one, two = self._kept(batch, 1), self._kept(batch, 2)
        fitting = max(1, 1 + (allowed - one) // max(1, two - one))
        if len(layers) <= fitting:
            return [list(range(len(starts)))]
        parts = [set(layers[at : at + fitting]) for at in range(0, len(layers), fitting)]
        rest = [number for number, start in enumerate(starts) if start is None]
        return [*([rest] if rest else []), *([n for n, start in enumerate(starts) if start in part] for part in parts)]

    def _trunk(self, batch: Batch, clean: CleanRun, wanted: bool) -> tuple[Trunk | None, str]:
        """What cones start from, or why there is nothing in words."""
        if not wanted:
            return None, "it was asked for"
        if clean.trunk is not None and min(clean.trunk.residuals) < self._proved:
            first = min(clean.trunk.residuals)
            cone = Rest(clean.trunk, first, batch.last.to(clean.logits.device))
            again = run_cone(self.root, self.access, cone, Program()).logits
            assert again is not None
            self._proved = first if alike(again[:, 0], clean.logits) else _NEVER
        if self._proved == _NEVER:
            clean.trunk = None
            return None, "the decoder's layers called one after another do not give this model's answer"
        return clean.trunk, ""

    def _decoder(self, batch: Batch, clean: CleanRun) -> Mapping[str, Any] | None:
        """How the model called its decoder, once that call alone has given the model's own answer."""
        if clean.decoder is not None and self._decoder_proved is None:
            last = batch.last.to(clean.logits.device)
            again = run_decoder(self.root, self.access, clean.decoder, last, Program()).logits
            assert again is not None
            self._decoder_proved = alike(again, clean.logits)
        return clean.decoder if self._decoder_proved else None

    def resolve(
        self, batch: Batch, interventions: Sequence[Intervention], *, generating: bool = False
    ) -> list[ResolvedPlace]:
        """Find where interventions act in a batch, with the clean values that they need."""
        _, (edits,) = self._prepared(batch, [interventions], (), generating=generating)
        return edits

    def _prepared(
        self,
        batch: Batch,
        groups: Sequence[Sequence[Intervention]],
        residuals: Iterable[int],
        *,
        generating: bool = False,
    ) -> tuple[CleanRun, list[list[ResolvedPlace]]]:
        """The clean run with all that these interventions need of it, and where they act."""
        everything = [each for group in groups for each in group]
        needy = [each for each in everything if isinstance(each, CellIntervention) and each.needs_clean]
        values = {(each.site, layer) for each in needy for layer in layers_of(each.where, each.layers, self.anatomy)}
        residuals = () if self._proved == _NEVER else residuals
        clean = self.clean.of(batch, sorted(self._needs(everything)), sorted(values), residuals)
        known: dict[Selector, Found] = {}
        resolved = [
            [resolve(each, batch, self.anatomy, clean.evidence, generating=generating, known=known) for each in group]
            for group in groups
        ]
        for edit in (edit for edits in resolved for edit in edits):
            if isinstance(edit.intervention, CellIntervention) and edit.intervention.needs_clean:
                edit.clean_values = {layer: clean.values[edit.site.name, layer] for layer in edit.layers}
        return clean, resolved

    def capture(
        self,
        batch: Batch,
        sites: Sequence[str],
        positions: Any,
        layers: Any,
        interventions: Sequence[Intervention] = (),
    ) -> Cache:
        """Record sites of a run; see `VLM.capture`."""
        by_site = {name: layers_of(site_named(name), layers, self.anatomy) for name in sites}
        for name in sites:
            refuse_pictureless(site_named(name), batch)
        selector = select.of(positions)
        evidence = self.clean.of(batch, selector.needs).evidence if selector.needs else {}
        index, mask = padded_positions(selected(batch, selector, evidence))
        edits = self.resolve(batch, interventions) if interventions else []
        plain = {name: found for name, found in by_site.items() if name != "pattern"}
        at, real, home = Copies(index), Copies(mask), index.device  # values may lie elsewhere

        everything = bool(mask.all()) and index.shape == batch.inputs["input_ids"].shape
        values: dict[str, Tensor] = {}

        def keep(name: str, layer: int, value: Tensor) -> Tensor:
            if site_named(name).part == "vision":
                value = _tower_rows(batch, value)
            elif name == "attn_mask":
                value = value.expand(len(batch), self.anatomy.n_heads, -1, -1)
                value = _keep(name, value, at.on(value.device), real.on(value.device))
            elif not everything:
                value = _keep(name, value, at.on(value.device), real.on(value.device))
            # Straight into its place, so that what may be much is copied once.
            if name not in values:
                values[name] = value.new_empty(len(batch), len(plain[name]), *value.shape[1:], device=home)
            return values[name][:, plain[name].index(layer)].copy_(value)

        program = Program(edits, plain, frozenset(by_site.get("pattern", ())), keep=keep)
        recording = self.forward(self.root, self.access, batch.inputs, program)
        receipts.refuse_without_effect(edits)
        if not edits:  # whoever needs the answers has them
            assert recording.logits is not None
            self.clean.add(batch, recording.logits)
        if "pattern" in by_site:
            values["pattern"] = patterns(self.access, recording.attention, by_site["pattern"], index, mask)
        return Cache({name: values[name] for name in sites}, by_site, index, mask, batch.tokens, self.name)

    def generate(self, batch: Batch, interventions: Sequence[Intervention], steps: int, **options: Any) -> Tensor:
        """Token ids that the model generates after the prompt."""
        edits = self.resolve(batch, interventions, generating=True)
        prompt = batch.inputs["input_ids"].shape[1]
        receipts.refuse_sliding(edits, self.anatomy, prompt + steps)
        call: Any = self.root._module.generate
        out = generate(self.root, self.access, {**batch.inputs, "max_new_tokens": steps, **options}, edits, steps, call)
        receipts.refuse_without_effect(edits)
        return getattr(out, "sequences", out)[:, prompt:]

    def _needs(self, interventions: Sequence[Intervention]) -> set[str]:
        return {name for value in interventions for selector in value.selectors for name in selector.needs}


def _tower_rows(batch: Batch, value: Tensor) -> Tensor:
    """The vision tower's rows of each example, whole."""
    everything = selected(batch, select.image, {})
    rows = Rows.of(batch, site_named("vision_post"), everything, value)
    if len(set(rows.counts)) > 1:
        raise InterventionError(
            f"the vision tower gives {', '.join(map(str, rows.counts))} rows for the examples",
            expected="equally many for each example",
            remedy="capture examples with pictures of different sizes one at a time",
        )
    return rows.take(value).unflatten(0, (len(batch), -1))


def _keep(name: str, value: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """The asked positions of a value."""
    example = torch.arange(len(index), device=index.device)[:, None]
    if name == "attn_mask":
        return value[example, :, index.clamp(min=0)].transpose(1, 2) & mask[:, None, :, None]
    kept = value[example, index.clamp(min=0)]
    return kept if bool(mask.all()) else kept.masked_fill_(~mask.view(*mask.shape, *[1] * (kept.dim() - 2)), 0)
