"""Runs and traces on NDIF: a model's remote side, the program of a run as plain data, and what cannot be sent.

What travels is text, numbers and tensors: the machine that runs a trace has torch and nnsight, not this package.
"""

from __future__ import annotations

import copy
import json
import re
import sys
import urllib.error
import urllib.request
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from nnsight import register, save
from nnsight.intervention.serialization import CustomCloudPickler
from nnsight.schema.config import CONFIG
from nnsight.tracing.backend import Backend
from nnsight.util import apply
from torch import Tensor, nn

from interp_vlm.engine import plain
from interp_vlm.engine.access import Access, AttentionInputs, place_of
from interp_vlm.engine.full import Forward, Program, Recording, alone
from interp_vlm.engine.place import ResolvedPlace, Rows
from interp_vlm.errors import InterventionError, ModelError
from interp_vlm.interventions.ablation import Ablation
from interp_vlm.interventions.base import CellIntervention
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.interventions.steering import Steering
from interp_vlm.models.anatomy import Anatomy
from interp_vlm.sites import SITES

if TYPE_CHECKING:
    from nnsight.modeling.transformers import TransformersModel

__all__ = ["Remote", "StandIns", "Where"]

StandIns = Mapping[type, Callable[[Any], tuple[Any, ...]]]
"""For objects of these types, what is sent in their place, as `__reduce__` says it."""
Where = bool | str
"""Where a run is made: False here, True on NDIF, an address on that server, "local" here after a dry run of sending."""

_TASK = "image-text-to-text"
_PATIENCE = 10.0
"""Seconds in which a server has to answer at all."""


class Remote:
    """The remote side of one model, made when it is first asked for.

    Args:
        model: the Hugging Face model, with weights or without.
        processor: its processor.
        anatomy: the facts of its architecture.
        revision: branch, tag or commit on the hub.
    """

    def __init__(self, model: nn.Module, processor: Any, anatomy: Anatomy, revision: str | None = None) -> None:
        self.model, self.anatomy = model, anatomy
        self._processor, self._revision = processor, revision

    @cached_property
    def root(self) -> TransformersModel:
        """The model in the wrapper that nnsight can send; a plain `NNsight` has no remote side."""
        from nnsight.modeling.transformers import TransformersModel

        # The wrapper sets its tokenizer's padding, so it has a processor of its own; and it moves nothing.
        where: dict[str, Any] = (
            {} if hasattr(self.model, "hf_device_map") else {"device": next(self.model.parameters()).device}
        )
        own = copy.deepcopy(self._processor)
        return TransformersModel(self.model, task=_TASK, processor=own, revision=self._revision, **where)

    def backend(self, where: Where, stand_ins: StandIns | None = None) -> Backend:
        """What runs a trace elsewhere, after everything was checked that can be checked from here.

        Args:
            where: True, "local" or an address.
            stand_ins: for objects of these types, what goes in their place, as `__reduce__` says it.

        Raises:
            ModelError: no such server, no key, or a model that it cannot have.
            InterventionError: for another `where`.
        """
        if where is not True and (not isinstance(where, str) or (where != "local" and "://" not in where)):
            raise InterventionError(f"remote={where!r}", expected="True, 'local' or 'https://HOST'")
        if where == "local":
            self._refuse_outline()
            from nnsight.intervention.backends.local import LocalSimulationBackend

            return _Sending(LocalSimulationBackend(self.root), "", stand_ins or {})
        from nnsight.intervention.backends.remote import RemoteBackend

        host = CONFIG.API.HOST if where is True else str(where)
        self._check(host)
        inner = RemoteBackend(self._key(), host=host, env=self.root._remoteable_get_env())
        return _Sending(inner, host, stand_ins or {})

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A batch's inputs as the wrapper hands them on unchanged: text alone it would number without the padding."""
        from nnsight.modeling.processing import ROW_FIELDS

        ids = inputs["input_ids"]
        numbered = {} if set(inputs) - set(ROW_FIELDS) else {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)}
        return _to({**numbered, **inputs}, "cpu")

    def _refuse_outline(self) -> None:
        if next(self.model.parameters()).is_meta:
            raise ModelError(
                f"the weights of {self._name!r} are not in memory",
                expected="a model with weights for remote='local', which runs it here",
                remedy="load it without remote=True, and without weights that wait on the disk",
            )

    def _check(self, host: str) -> None:
        public = (urlsplit(host).hostname or "").endswith("ndif.us")
        name = self._name
        if not name or (public and Path(name).is_dir()):
            raise ModelError(
                f"{name or 'a model without a name'} is a model of this machine, and NDIF cannot have it",
                expected="a model by its Hub name",
                remedy="run it here, rehearse with remote='local', or name your own NDIF server: remote='https://HOST'",
            )
        if public and not CONFIG.API.APIKEY:
            raise ModelError(
                "no NDIF API key",
                expected="a key in the environment variable NDIF_API_KEY, or saved by `nnsight login`",
                remedy="ask for one at https://login.ndif.us, or rehearse with remote='local'",
            )
        try:
            urllib.request.urlopen(host, timeout=_PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # whatever it answered, it is there
        except (OSError, ValueError) as error:
            raise ModelError(
                f"NDIF at {host} cannot be reached ({getattr(error, 'reason', error)})",
                expected="an answer within 10 seconds",
                remedy="check the address and the connection, or run here: remote=False",
            ) from error

    @property
    def _name(self) -> str:
        return self.root.repo_id or ""

    def _key(self) -> str:
        """The name by which a server knows the model."""
        if Path(self._name).is_dir():
            data = {"repo_id": self._name, "revision": self._revision, "task": _TASK}
            return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(data)}"
        try:
            return self.root.to_model_key()
        except Exception as error:  # the hub's client and those below it have no common base
            raise ModelError(
                f"the Hub cannot be asked for {self._name!r} ({_reason(error)})",
                expected="the model's name on the Hugging Face Hub",
                remedy="check the name and the connection",
            ) from error

    def forward(self, where: Where) -> Forward:
        """The forward pass of the plan `full`, made elsewhere."""

        def sent(_: Any, access: Access, inputs: Mapping[str, Any], program: Program) -> Recording:
            self._refuse(program)
            root = self.root
            stops = [stop for stop in program.visits() if stop[1] in SITES]
            steps = _to([self._step(site, layer, program) for _, site, layer in stops], "cpu")
            last = _last(inputs["attention_mask"]).cpu()
            play, backend = plain.play, self.backend(where)
            with alone("a remote run"), torch.no_grad(), root.trace(**self.inputs(inputs), backend=backend):
                found = save(play(root, steps, last))
            logits, left, changes = _to(found, inputs["input_ids"].device)
            return _recorded(program, stops, logits, left, changes, inputs["input_ids"])

        return sent

    def _step(self, site: str, layer: int, program: Program) -> tuple[Any, ...]:
        a = self.anatomy
        if site == "pattern":
            return ("attention", f"{a.layers}.{layer}.{a.attn}", (a.q, a.k, a.v))
        acts = [self._act(edit, layer) for edit in _acting(program, site, layer)]
        return ("edit", place_of(a, site, layer), acts, layer in program.captures.get(site, ()))

    def acts(self, edit: ResolvedPlace) -> list[tuple[Any, tuple[Any, ...]]]:
        """What an intervention does layer by layer, as `plain.Placed` takes it."""
        steps = [(place_of(self.anatomy, edit.site.name, n), self._act(edit, n)) for n in sorted(edit.layers)]
        return _to(steps, "cpu")

    def _act(self, edit: ResolvedPlace, layer: int) -> tuple[Any, ...]:
        """What an intervention does at one layer, as `plain.edited` takes it.

        Raises:
            InterventionError: for an intervention of the user's own making.
        """
        each, a, weight = edit.intervention, self.anatomy, next(self.model.parameters())
        if type(each) is AttentionKnockout:
            heads = None if each.heads is None else each.head_mask(edit.n_heads)
            return ("block", edit.selected, edit.keys, heads, edit.n_heads)
        if type(each) not in (Ablation, ActivationPatch, Steering):
            raise InterventionError(
                f"{type(each).__name__} cannot be sent: its code is on this machine alone",
                expected="AttentionKnockout, Ablation, ActivationPatch or Steering",
                remedy="run it here, or write it with nnsight in a `with vlm.trace(batch, remote=True):` block",
            )
        value = edit.clean_values.get(layer, _outline(edit))
        edit.rows = Rows.of(edit.batch, edit.site, edit.selected, value)
        wide = {"z": (a.n_heads, a.d_head), "mlp_post": (a.d_mlp,), "vision_post": (a.d_vision,)}
        shape = (sum(edit.counts), *wide.get(edit.site.name, (a.d_model,)))
        # A model without weights does not tell the server's dtype: nothing is rounded before it arrives there.
        rows = torch.zeros(shape, dtype=torch.float32 if weight.is_meta else weight.dtype)
        # Only steering adds to what is there; everything else does not look at it, so zeros stand in for it.
        assert isinstance(each, CellIntervention)
        given = each.replacement(rows, layer, edit).to(rows.dtype).clone()
        return ("add" if isinstance(each, Steering) else "put", edit.rows.index, given, each.cells(rows))

    def _refuse(self, program: Program) -> None:
        norms = self.anatomy.q_norm is not None and next(self.model.parameters()).is_meta
        if program.attention and norms:
            raise InterventionError(
                f"attention weights of {self.anatomy.architecture} are rebuilt with norms that are not on this machine",
                expected="a model whose queries and keys are not normed, or one with its weights",
                remedy="load it without remote=True, or leave out knockouts and selections by attention",
            )


class _Sending(Backend):
    """nnsight's backend, with stand-ins for what cannot travel, and with errors that say what to do."""

    def __init__(self, inner: Any, host: str, stand_ins: StandIns) -> None:
        self.inner, self.host, self.stand_ins = inner, host, stand_ins

    def __call__(self, tracer: Any) -> Any:
        register(plain.__name__)
        with _travelling(self.stand_ins), _explained(self.host):
            return self.inner(tracer)


@contextmanager
def _travelling(stand_ins: StandIns) -> Iterator[None]:
    """Let nnsight's pickler take stand-ins, and undo what its dry run leaves."""
    before, paths = CustomCloudPickler.dispatch_table, list(sys.path)
    CustomCloudPickler.dispatch_table = ChainMap(dict(stand_ins), before)  # type: ignore[arg-type]
    try:
        yield
    finally:
        CustomCloudPickler.dispatch_table = before
        sys.path[:] = paths  # the dry run puts the folders that it hid back at the end


@contextmanager
def _explained(host: str) -> Iterator[None]:
    """What went wrong on the way or on the server, in one line."""
    if not host:
        yield
        return
    import httpx
    from nnsight.intervention.backends.remote import RemoteError
    from websocket import WebSocketException

    try:
        yield
    except (RemoteError, WebSocketException, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"NDIF at {host} did not run this: {_reason(error)}",
            expected="a model that it serves (nnsight.status() lists them), and a block that runs there",
            remedy="rehearse with remote='local'",
        ) from error


def _reason(error: BaseException) -> str:
    """What an error says; of a traceback that a server sent, what its last line names and all behind it."""
    *_, reason = re.split(r"^(?=[\w.]+(?:Error|Exception)\b)", str(error).strip(), flags=re.MULTILINE)
    return reason or type(error).__name__


def _outline(edit: ResolvedPlace) -> Tensor:
    """A value without numbers that has as many rows as the site's."""
    if edit.site.part != "vision":
        return torch.empty(0)
    totals = [grid.vision_total or 0 for tokens in edit.batch.tokens for grid in tokens.grids]
    return torch.empty(sum(totals), 0)


def _acting(program: Program, site: str, layer: int) -> list[ResolvedPlace]:
    return [edit for edit in program.edits if edit.site.name == site and layer in edit.layers]


def _to(value: Any, device: torch.device | str) -> Any:
    """Every tensor in tuples, lists and dictionaries on a device: what travels lies on the CPU."""
    return apply(value, lambda tensor: tensor.to(device), Tensor)


def _last(mask: Tensor) -> Tensor:
    """The last real position of each row."""
    return mask.shape[1] - 1 - mask.flip(1).argmax(1)


def _recorded(
    program: Program,
    stops: Sequence[tuple[Any, str, int]],
    logits: Tensor,
    left: Sequence[Any],
    changes: Sequence[tuple[int, list[list[int]]]],
    ids: Tensor,
) -> Recording:
    """What a run left elsewhere, as a run here would have left it."""
    # Only the answers' logits travel: each stands at every position of its row, of which the last alone is read.
    recording = Recording(logits[:, None].expand(-1, ids.shape[1], -1))
    counted = iter(changes)
    for (_, site, layer), value in zip(stops, left, strict=True):
        if site == "pattern":
            recording.attention[layer] = AttentionInputs(*value)
            continue
        for edit in _acting(program, site, layer):
            count, empty = next(counted)
            edit.changed += count
            if empty:
                example, _, row = empty[0]
                raise InterventionError(
                    f"{edit.intervention!r} leaves position {row} of example {example} with no key to attend",
                    expected="at least one allowed key for every blocked query",
                    remedy="leave the position itself out of keys, for example keys=... - select.last",
                )
        if value is not None:
            recording.values[site, layer] = program.keep(site, layer, value)
    return recording
