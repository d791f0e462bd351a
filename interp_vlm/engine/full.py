"""The `full` plan: one nnsight trace of the whole model, visiting the sites in the order in which it computes them.

It is the oracle against which every other plan is tested.
"""

from __future__ import annotations

import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from nnsight import NNsight
from torch import Tensor

from interp_vlm.engine.access import Access, AttentionInputs
from interp_vlm.engine.place import ResolvedPlace
from interp_vlm.errors import InterventionError
from interp_vlm.sites import SITES

__all__ = ["Forward", "Program", "Recording", "alone", "forward", "generate", "visit", "walk"]

# nnsight's interleaver and Python's trace function belong to one run at a time.
_LOCK = threading.RLock()
_running: list[str] = []


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Hold back the runs of other threads, and refuse a run inside a run.

    Raises:
        InterventionError: when this thread is inside a trace already.
    """
    with _LOCK:
        if _running:
            raise InterventionError(
                f"{what} inside {_running[-1]}, which is still running",
                expected="one run after another",
                remedy="make this run before or after the block",
            )
        _running.append(what)
        try:
            yield
        finally:
            _running.pop()


@dataclass
class Program:
    """What to do during one forward pass.

    Attributes:
        edits: interventions resolved in the batch, in the order in which they apply to the same cells.
        captures: layers to record, by site.
        attention: layers whose attention inputs are recorded, for rebuilding weights.
        calls: layers whose keyword arguments are recorded.
        decoder: whether those of the decoder are recorded.
        keep: reduces a captured value to what was asked for, by site and layer.
    """

    edits: Sequence[ResolvedPlace] = ()
    captures: Mapping[str, Iterable[int]] = field(default_factory=dict)
    attention: frozenset[int] = frozenset()
    calls: frozenset[int] = frozenset()
    decoder: bool = False
    keep: Callable[[str, int, Tensor], Tensor] = lambda _site, _layer, value: value

    def visits(self) -> list[tuple[tuple[int, int, int], str, int]]:
        """The sites to stop at, in the model's own order, as (rank, site, layer)."""
        stops = {(edit.site.name, layer) for edit in self.edits for layer in edit.layers}
        stops |= {(site, layer) for site, layers in self.captures.items() for layer in layers}
        stops |= {("pattern", layer) for layer in self.attention}
        stops |= {(_CALL, layer) for layer in self.calls}
        stops |= {(_DECODER, 0)} if self.decoder else set()
        return sorted(((_rank(site, layer), site, layer) for site, layer in stops), key=lambda stop: stop[0])


@dataclass
class Recording:
    """What one forward pass left behind.

    Attributes:
        logits: (batch, pos, vocab).
        values: captured values by (site, layer).
        attention: what each attention layer received and projected.
        calls: the keyword arguments of each decoder layer.
        decoder: those of the decoder.
    """

    logits: Float[Tensor, "batch pos vocab"] | None = None
    values: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    calls: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    decoder: Mapping[str, Any] | None = None


Forward = Callable[[NNsight, Access, Mapping[str, Any], Program], Recording]
"""One pass through the whole model, as `forward` makes it."""

# No sites: how a decoder layer, and the decoder as a whole, were called.
_CALL, _DECODER = "call", "decoder"


def _rank(site: str, layer: int) -> tuple[int, int, int]:
    if site in (_CALL, _DECODER):
        return (2, layer, -1) if site == _CALL else (1, 0, -1)
    part = {"vision": 0, "projector": 1, "decoder": 2}[SITES[site].part]
    return part, layer, SITES[site].order


def forward(root: NNsight, access: Access, inputs: Mapping[str, Any], program: Program) -> Recording:
    """Run the model once on the inputs, with the program's edits and captures.

    Args:
        root: the wrapped model.
        access: its sites.
        inputs: keyword arguments of the model's forward.
        program: what to edit and record.
    """
    recording = Recording()
    stops = program.visits()
    with alone("a run"), torch.no_grad(), root.trace(**dict[str, Any](inputs)):
        walk(access, program, stops, recording)
        recording.logits = access.read_logits()
    return recording


def walk(access: Access, program: Program, stops: Sequence[tuple[Any, str, int]], recording: Recording) -> None:
    edits: dict[tuple[str, int], list[ResolvedPlace]] = defaultdict(list)
    for edit in program.edits:
        for layer in edit.layers:
            edits[edit.site.name, layer].append(edit)
    for _, site, layer in stops:
        if site == _DECODER:
            recording.decoder = access.read_decoder_call()
            continue
        if site == _CALL:
            recording.calls[layer] = access.read_call(layer)
            continue
        if site == "pattern":
            recording.attention[layer] = access.read_attention(layer)
            continue
        value = visit(access, site, layer, edits[site, layer])
        if layer in program.captures.get(site, ()):
            recording.values[site, layer] = program.keep(site, layer, value)
        del value  # or it would lie in memory until the next stop


def visit(access: Access, site: str, layer: int, edits: Sequence[ResolvedPlace]) -> Tensor:
    """Read one site, make the edits in it, write it back, and return what the model goes on with."""
    value = access.read(site, layer)
    if not edits:
        return value
    value = edits[0].prepared(value)
    for edit in edits:
        value = edit.edit(value, layer)
    access.write(site, layer, value)
    return value


def generate(
    root: NNsight,
    access: Access,
    inputs: Mapping[str, Any],
    edits: Sequence[ResolvedPlace],
    steps: int,
    call: Callable[..., Any],
) -> Any:
    """Generate tokens with interventions on the prompt, on generated tokens, or both.

    Args:
        root: the wrapped model.
        access: its sites.
        inputs: keyword arguments of `call`.
        edits: resolved interventions; their `during` says on which steps they act.
        steps: the most forward passes that generation makes.
        call: the model's bound `generate`.

    Returns:
        What `call` returns.
    """
    returned: list[Any] = []

    def capture(**kwargs: Any) -> Any:
        returned.append(call(**kwargs))
        return returned[-1]

    programs = [_during(edits, step) for step in (0, 1)]
    # The first pass is served without a loop; later ones only when something acts there.
    last = steps if programs[1].edits else 1
    with alone("a generation"), torch.no_grad(), warnings.catch_warnings():
        # Generation may end before the last step; that is no fault of the loop.
        warnings.filterwarnings("ignore", message=".*was never reached.*")
        with root.trace(fn=capture, **dict[str, Any](inputs)) as tracer:
            _generation_walk(access, programs, tracer, last)
    return returned[0]


def _generation_walk(access: Access, programs: Sequence[Program], tracer: Any, last: int) -> None:
    stops = [program.visits() for program in programs]
    for step in tracer.iter[0:last]:
        which = min(step, 1)
        if stops[which]:
            walk(access, programs[which], stops[which], Recording())


def _during(edits: Sequence[ResolvedPlace], step: int) -> Program:
    when = ("prompt", "both") if step == 0 else ("generated", "both")
    acting = [edit for edit in edits if edit.intervention.during in when]
    return Program(edits=acting if step == 0 else [_on_new_token(edit) for edit in acting])


def _on_new_token(edit: ResolvedPlace) -> ResolvedPlace:
    """The same intervention on the one row that a generation step computes; keys still name the prompt's positions."""
    row = torch.ones(len(edit.batch), 1, dtype=torch.bool, device=edit.selected.device)
    return replace(edit, here=row)


def answer_rows(logits: Float[Tensor, "batch pos vocab"], last: Int[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
    """The logits at each example's answer position."""
    return logits[torch.arange(len(last), device=logits.device), last.to(logits.device)]
