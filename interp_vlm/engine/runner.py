"""The engine: runs a batch with interventions, and records activations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from nnsight import NNsight
from torch import Tensor

from interp_vlm.engine import receipts
from interp_vlm.engine.access import Access
from interp_vlm.engine.attention import rebuild
from interp_vlm.engine.evidence import sink_scores
from interp_vlm.engine.full import Program, Recording, answer_rows, forward, generate
from interp_vlm.engine.place import (
    ResolvedPlace,
    Rows,
    layers_of,
    padded_positions,
    refuse_pictureless,
    resolve,
    selected,
)
from interp_vlm.engine.plan import Plan, plan
from interp_vlm.engine.receipts import Receipt
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import CellIntervention, Intervention, indices
from interp_vlm.interventions.cache import Cache
from interp_vlm.models.anatomy import Anatomy
from interp_vlm.sites import site as site_named
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch

__all__ = ["CleanRun", "Engine", "Outcome"]


@dataclass
class CleanRun:
    """A batch's run without interventions: its answer logits, and scores per position that selectors asked for.

    Attributes:
        weights: the state of the model's weights at the time.
    """

    logits: Float[Tensor, "batch vocab"]
    weights: object
    evidence: dict[str, Float[Tensor, "batch pos"]] = field(default_factory=dict)


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
    """

    def __init__(self, root: NNsight, anatomy: Anatomy, name: str) -> None:
        self.root, self.anatomy, self.name = root, anatomy, name
        self.access = Access(root, anatomy)
        self._clean: weakref.WeakKeyDictionary[Batch, CleanRun] = weakref.WeakKeyDictionary()

    def known(self, batch: Batch) -> CleanRun | None:
        """The batch's clean run, if it was made with the weights that the model has now."""
        found = self._clean.get(batch)
        return found if found is not None and found.weights == self._weights() else None

    def clean(self, batch: Batch, needs: Iterable[str] = ()) -> CleanRun:
        """The batch's run without interventions, made once and kept as long as the batch and the model's weights."""
        known = self.known(batch)
        missing = [name for name in needs if known is None or name not in known.evidence]
        if known is None or missing:
            recording = forward(self.root, self.access, batch.inputs, self._evidence_program(missing))
            assert recording.logits is not None
            known = known or CleanRun(answer_rows(recording.logits, batch.last), self._weights())
            known.evidence.update(self._evidence(missing, recording, batch))
            self._clean[batch] = known
        return known

    def _weights(self) -> tuple[tuple[int, int], ...]:
        """What changes when a weight is replaced or written in place (but not behind autograd's back, by `.data`)."""
        parameters = self.root._module.parameters()
        return tuple((weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in parameters)

    def run(self, batch: Batch, interventions: Sequence[Intervention], engine: str = "auto") -> Outcome:
        """Run a batch with interventions, applied in the model's own order.

        Raises:
            InterventionError: for an intervention that is out of range or cannot have an effect.
        """
        chosen = plan(batch, interventions, self.anatomy.n_layers, engine)
        clean = self.clean(batch, self._needs(interventions))
        if not interventions:
            return Outcome(clean.logits, clean.logits, (), chosen)
        edits = self.resolve(batch, interventions)
        recording = forward(self.root, self.access, batch.inputs, receipts.program(edits))
        receipts.refuse_without_effect(edits)
        assert recording.logits is not None
        logits = answer_rows(recording.logits, batch.last)
        change = float((logits - clean.logits).abs().max())
        issued = receipts.issue(edits, recording, self.access, change, chosen.name)
        return Outcome(logits, clean.logits, issued, chosen)

    def resolve(
        self, batch: Batch, interventions: Sequence[Intervention], *, generating: bool = False
    ) -> list[ResolvedPlace]:
        """Find where interventions act in a batch, with the clean values that they need."""
        evidence = self.clean(batch, self._needs(interventions)).evidence
        edits = [resolve(each, batch, self.anatomy, evidence, generating=generating) for each in interventions]
        needy = [
            edit for edit in edits if isinstance(edit.intervention, CellIntervention) and edit.intervention.needs_clean
        ]
        if needy:
            wanted: dict[str, set[int]] = {}
            for edit in needy:
                wanted.setdefault(edit.site.name, set()).update(edit.layers)
            recording = forward(self.root, self.access, batch.inputs, Program(captures=wanted))
            for edit in needy:
                edit.clean_values = {layer: recording.values[edit.site.name, layer] for layer in edit.layers}
        return edits

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
        evidence = self.clean(batch, selector.needs).evidence if selector.needs else {}
        index, mask = padded_positions(selected(batch, selector, evidence))
        edits = self.resolve(batch, interventions)
        plain = {name: found for name, found in by_site.items() if name != "pattern"}

        def keep(name: str, value: Tensor) -> Tensor:
            if site_named(name).part == "vision":
                return _tower_rows(batch, value)
            if name == "attn_mask":
                value = value.expand(len(batch), self.anatomy.n_heads, -1, -1)
            return _keep(name, value, index, mask)

        program = Program(edits, plain, frozenset(by_site.get("pattern", ())), keep)
        recording = forward(self.root, self.access, batch.inputs, program)
        receipts.refuse_without_effect(edits)
        values = {
            name: torch.stack([recording.values[name, layer] for layer in found], dim=1)
            for name, found in plain.items()
        }
        if "pattern" in by_site:
            values["pattern"] = self._patterns(recording, by_site["pattern"], index, mask)
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

    def _patterns(self, recording: Recording, layers: Sequence[int], index: Tensor, mask: Tensor) -> Tensor:
        found = []
        for layer in layers:
            module = self.access.inside(layer, self.anatomy.attn)._module
            weights = rebuild(module, self.anatomy, recording.attention.pop(layer), index.clamp(min=0))
            found.append(weights.masked_fill(~mask[:, None, :, None], 0))
        return torch.stack(found, dim=1)

    def _needs(self, interventions: Sequence[Intervention]) -> set[str]:
        return {name for value in interventions for selector in value.selectors for name in selector.needs}

    def _evidence_program(self, needs: Sequence[str]) -> Program:
        middle = self.anatomy.n_layers // 2
        attention = frozenset(layer for name in needs for layer in self._attention_layers(name))
        return Program(captures={"resid_post": [middle]} if "sinks" in needs else {}, attention=attention)

    def _attention_layers(self, name: str) -> tuple[int, ...]:
        """The layers whose attention makes up this evidence: all for "attention", one for "attention@LAYER"."""
        kind, _, layer = name.partition("@")
        if kind != "attention":
            return ()
        return indices(int(layer) if layer else "all", self.anatomy.n_layers, "layer")

    def _evidence(self, names: Sequence[str], recording: Recording, batch: Batch) -> dict[str, Tensor]:
        found = {}
        if recording.attention:
            layers = sorted(recording.attention)
            last = batch.last.to(batch.inputs["input_ids"].device)[:, None]
            rows = self._patterns(recording, layers, last, torch.ones_like(last, dtype=torch.bool)).float()
        for name in names:
            if name == "sinks":
                found[name] = sink_scores(recording.values["resid_post", self.anatomy.n_layers // 2])
            elif wanted := self._attention_layers(name):
                found[name] = rows[:, [layers.index(layer) for layer in wanted]].mean(dim=(1, 2, 3))
            else:
                raise InterventionError(
                    f"no evidence named {name!r}", expected="'attention', 'attention@LAYER', 'sinks'"
                )
        return found


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
    return kept.masked_fill(~mask.view(*mask.shape, *[1] * (kept.dim() - 2)), 0)
