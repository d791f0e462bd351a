"""The front door: a Hugging Face vision-language model, its processor and its anatomy, ready for interventions."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from nnsight.intervention.tracer import InterleavingTracer
from torch import Tensor, nn

from interp_vlm.engine.batches import in_parts
from interp_vlm.engine.devices import Wrapped, input_device
from interp_vlm.engine.leaks import Leaks, leaks
from interp_vlm.engine.live import Live, Tracer
from interp_vlm.engine.memory import Budget
from interp_vlm.engine.place import selected
from interp_vlm.engine.plan import Plan
from interp_vlm.engine.receipts import Receipt
from interp_vlm.engine.remote import Remote, Where
from interp_vlm.engine.runner import Engine, Outcome
from interp_vlm.engine.sites_of import Sites
from interp_vlm.engine.sweep import Sweep
from interp_vlm.errors import InterventionError, ModelError
from interp_vlm.interventions.base import Intervention
from interp_vlm.interventions.cache import Cache
from interp_vlm.models import loading
from interp_vlm.models.anatomy import Anatomy, describe
from interp_vlm.models.encode import encode
from interp_vlm.models.registry import family_for
from interp_vlm.readouts.answers import read_answers
from interp_vlm.readouts.metrics import Metric, MetricContext, PairDifference, logit_difference
from interp_vlm.readouts.run import Generation, Run
from interp_vlm.readouts.spelling import prompt_ends
from interp_vlm.sites import SITES
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch

__all__ = ["VLM", "load", "sweep"]


class VLM:
    """A Hugging Face vision-language model with its processor, wrapped by nnsight.

    Args:
        model: an image-text model of a registered architecture; it is not copied and never changed.
        processor: its processor.
        name: how results call it; by default the name it was loaded by.
        revision: the one on the hub, for runs on NDIF.
        remote: whether the weights are on NDIF alone, and the model here is an outline on the meta device.

    Raises:
        ModelError: for an architecture that is not in the table, weights on the meta device, or on several devices
            without a device map.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> vlm.anatomy.n_layers
        4
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        name: str | None = None,
        *,
        revision: str | None = None,
        remote: bool = False,
    ) -> None:
        self.model, self.processor = model, processor
        self.name = name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        if not remote:
            loading.check_devices(model)
        self.anatomy: Anatomy = describe(model)
        self.nnsight = Wrapped(model)
        self._outline = remote
        self._here = Engine(self.nnsight, self.anatomy, self.name)
        self._live = Live(self._here.clean)
        self._remote = Remote(model, processor, self.anatomy, revision)
        self._elsewhere: dict[Where, Engine] = {}

    @property
    def _engine(self) -> Engine:
        if self._outline:
            raise ModelError(
                f"the weights of {self.name!r} are not on this machine",
                expected="remote=True in vlm.run, vlm.capture and vlm.trace: nothing else runs elsewhere",
                remedy="or load the model without remote=True",
            )
        return self._here

    def _engine_at(self, where: Where) -> Engine:
        if not where:
            return self._engine
        if where not in self._elsewhere:
            self._elsewhere[where] = Engine(self.nnsight, self.anatomy, self.name, self._remote.forward(where))
        return self._elsewhere[where]

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device("cpu") if self._outline else input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def encode(self, images: Any, questions: str | Sequence[str], *, padding: str = "left") -> Batch:
        """Turn pictures and questions into a batch, through the family's own prompt template.

        Args:
            images: one picture or path, one per question, or a list of pictures for each question.
            questions: one question or several; a single picture serves several questions.
            padding: "left" or "right".

        Raises:
            DataError: for numbers that do not match, or a picture that cannot be read.
        """
        batch = encode(
            self.model.config, family_for(type(self.model).__name__), self.processor, images, questions, padding=padding
        )
        return batch.to(self.device, self.dtype)

    def run(
        self,
        batch: Batch,
        interventions: Intervention | Sequence[Intervention] = (),
        *,
        choices: Sequence[str] | None = None,
        engine: str = "auto",
        remote: Where = False,
    ) -> Run:
        """Run a batch with interventions and read the answers.

        Args:
            batch: encoded examples.
            interventions: applied in the model's own order; two edits of the same cells in the order of the list.
            choices: closed answers to choose between, for example ("yes", "no"); by default the whole vocabulary.
            engine: "auto" takes the smallest plan that is exact; "last_row", "suffix", "resume" and "full" ask for one.
            remote: False runs here, True on NDIF by the plan "full", an address ("https://HOST") on that NDIF server;
                "local" rehearses: everything is packed as for NDIF, unpacked without this package, and run here.

        Raises:
            InterventionError: for an intervention out of range, one that cannot have an effect, or cannot be sent.
            ModelError: when NDIF cannot be reached, wants a key, or does not have the model.

        Example:
            >>> import interp_vlm as iv
            >>> vlm = iv.load("testbed:llava")
            >>> example = iv.data.digit_scenes(n=1)[0]
            >>> batch = vlm.encode(example.image, example.question)
            >>> run = vlm.run(batch, iv.AttentionKnockout(queries="text", keys="image"))
            >>> run.receipts[0].mass_left
            0.0
        """
        if remote and engine not in ("auto", "full"):
            raise InterventionError(
                f"engine={engine!r} with remote={remote!r}", expected="engine='full', the one plan of remote runs"
            )
        outcome = self._engine_at(remote).run(batch, _listed(interventions), "full" if remote else engine)
        return self._read(outcome, batch, choices)

    def _read(self, outcome: Outcome, batch: Batch, choices: Sequence[str] | None) -> Run:
        ends = prompt_ends(batch, self.tokenizer) if choices else None
        answers = read_answers(outcome.logits, self.tokenizer, prompts=ends, choices=choices)
        return Run(outcome.logits, tuple(answers), outcome.receipts, outcome.clean_logits, outcome.plan)

    def capture(
        self,
        batch: Batch,
        sites: Sequence[str] | str,
        positions: Any = "all",
        layers: Any = "all",
        interventions: Intervention | Sequence[Intervention] = (),
        *,
        remote: Where = False,
    ) -> Cache:
        """Record activations of a run.

        Args:
            batch: encoded examples.
            sites: names of the site table; for `pattern` and `attn_mask` the positions are query rows.
            positions: a role, a selector or positions.
            layers: an int, a range, a list or "all".
            interventions: made in the same run; captured values are those after the edits.
            remote: see `run`.

        Returns:
            A cache with (batch, layer, pos, ...) per site, padded where examples select different numbers of positions.
        """
        names = [sites] if isinstance(sites, str) else list(sites)
        cache = self._engine_at(remote).capture(batch, names, positions, layers, _listed(interventions))
        return replace(cache, origin=weakref.ref(self))

    def generate(
        self,
        batch: Batch,
        interventions: Intervention | Sequence[Intervention] = (),
        *,
        max_new_tokens: int = 16,
        **options: Any,
    ) -> Generation:
        """Generate text, with interventions on the prompt or (their `during`) on generated tokens.

        On a generated token an intervention acts on the token being computed, whatever its positions or queries; a
        knockout's keys still name the prompt's positions.

        Args:
            batch: encoded examples, padded on the left.
            interventions: see `run`.
            max_new_tokens: the most tokens to generate.
            options: passed to Hugging Face's `generate` (`do_sample`, `temperature`, ...).

        Raises:
            InterventionError: for a right-padded batch of mixed lengths, after which generation would continue padding.
        """
        if max_new_tokens < 1:
            raise InterventionError(f"max_new_tokens is {max_new_tokens}", expected="at least 1")
        if batch.padding == "right" and not bool(batch.inputs["attention_mask"].all()):
            raise InterventionError(
                "the batch is padded on the right",
                expected="padding on the left to generate",
                remedy="encode with padding='left'",
            )
        ids = self._engine.generate(batch, _listed(interventions), max_new_tokens, **{"do_sample": False, **options})
        return Generation(tuple(self.tokenizer.batch_decode(ids, skip_special_tokens=True)), ids)

    def sweep(
        self,
        batches: Batch | Sequence[Batch],
        many: Sequence[Intervention | Sequence[Intervention]],
        metric: Metric = logit_difference,
        *,
        engine: str = "auto",
        memory: Budget = None,
        progress: Callable[[int], None] | None = None,
    ) -> Sweep:
        """Run many interventions on the same examples; see `interp_vlm.sweep`."""
        groups = tuple(tuple(_listed(item)) for item in many)
        batches = [batches] if isinstance(batches, Batch) else list(batches)
        if not batches:
            raise InterventionError("no batch to sweep over", expected="at least one encoded batch")
        values, baselines = [], []
        receipts: list[list[Receipt]] = [[] for _ in groups]
        whole = _needs_whole(groups, metric)

        def swept(_rows: range, part: Batch) -> tuple[Tensor, Tensor, dict[int, tuple[Receipt, ...]]]:
            column: dict[int, Tensor] = {}
            issued: dict[int, tuple[Receipt, ...]] = {}
            context: MetricContext | None = None
            for number, outcome in self._engine.runs(part, groups, engine, memory):
                context = context or MetricContext(outcome.clean_logits, part, self.tokenizer)
                issued[number] = outcome.receipts
                column[number] = metric(outcome.logits, context)
                if progress is not None:
                    progress(len(part))
            context = context or MetricContext(self._engine.clean.of(part).logits, part, self.tokenizer)
            rows = [column[number] for number in range(len(groups))]
            found = torch.stack(rows) if rows else context.clean_logits.new_empty(0, len(part))
            return found, metric(context.clean_logits, context), issued

        for batch in batches:
            for _, (found, baseline, issued) in in_parts(self, batch, swept, whole=whole):
                values.append(found)
                baselines.append(baseline)
                for number, own in issued.items():
                    receipts[number].extend(own)
        name = getattr(metric, "__name__", type(metric).__name__)
        return Sweep(groups, torch.cat(values, dim=1), torch.cat(baselines), name, tuple(map(tuple, receipts)))

    def plan(self, batch: Batch, interventions: Intervention | Sequence[Intervention], engine: str = "auto") -> Plan:
        """How the engine would run these interventions; `plan(...).explain()` says it in words."""
        return self._engine.plan(batch, _listed(interventions), engine)

    def leaks(
        self, batch: Batch, interventions: Intervention | Sequence[Intervention] = (), *, source: Any = None
    ) -> Leaks:
        """The routes by which blocked information still reaches the answer; see `interp_vlm.leaks`."""
        return leaks(self, batch, _listed(interventions), source=source)

    def positions(self, batch: Batch, selector: Any) -> list[Int[Tensor, " found"]]:
        """The positions that a selector names in each example, measured on the clean run where it needs evidence."""
        wanted = select.of(selector)
        evidence = self._engine.clean.of(batch, wanted.needs).evidence if wanted.needs else {}
        return [row.nonzero().flatten() for row in selected(batch, wanted, evidence)]

    def trace(self, batch: Batch, *, remote: Where = False, **options: Any) -> InterleavingTracer:
        """A real nnsight trace of the model on a batch, for everything that the vocabulary does not say.

        Inside the block, `vlm.site(name, layer)` reads a site and `intervention.apply(vlm)` edits one, in the model's
        own order, next to any nnsight code on `vlm.nnsight`. The block ends before another run can begin.

        Args:
            batch: encoded examples.
            remote: see `run`.
            options: further keyword arguments of the model.

        Example:
            >>> import interp_vlm as iv
            >>> vlm = iv.load("testbed:llava")
            >>> example = iv.data.digit_scenes(n=1)[0]
            >>> batch = vlm.encode(example.image, example.question)
            >>> with vlm.trace(batch):
            ...     hidden = vlm.site("resid_post", 1).save()
            >>> hidden.shape[-1]
            128
        """
        if remote:
            root: Any = self._remote.root
            options["backend"] = self._remote.backend(remote, self._live.stand_ins(self, self._remote, batch))
            options |= self._remote.inputs(batch.inputs)
        else:
            root = self._engine.root
            options |= batch.inputs
        return root.trace(tracer_cls=Tracer, **options).begin(self._live, batch)

    def site(self, name: str, layer: int = 0) -> Tensor:
        """The live value of a site inside a `vlm.trace` block, (batch, pos, ...); masks as True = may attend.

        Clone what you keep beside an edit of the same site, as in every nnsight trace.
        """
        return Sites(self._engine.access, "vlm.trace(batch)", "vlm")[name, layer]

    def __repr__(self) -> str:
        a = self.anatomy
        return (
            f"VLM({self.name!r}: {a.architecture}, {a.n_layers} layers, {a.n_heads} heads ({a.n_kv_heads} key-value), "
            f"width {a.d_model}, {self.dtype} on {self.device})".replace("torch.", "")
        )

    def site_shapes(self) -> dict[str, str]:
        """The shape of one example's value at every site, with this model's sizes in it.

        Example:
            >>> import interp_vlm as iv
            >>> iv.load("testbed:llava").site_shapes()["z"]
            '(pos, 4, 32)'
        """
        a = self.anatomy
        sizes = {"d": a.d_model, "h": a.n_heads, "d_head": a.d_head, "f": a.d_mlp, "d_vision": a.d_vision}
        return {name: f"({', '.join(str(sizes.get(axis, axis)) for axis in row.axes)})" for name, row in SITES.items()}

    def _repr_html_(self) -> str:
        from dataclasses import asdict
        from html import escape

        def table(rows: Iterable[tuple[Any, ...]]) -> str:
            cells = ("".join(f"<td style='text-align:left'>{escape(str(cell))}</td>" for cell in row) for row in rows)
            return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"

        sites = [(name, shape, SITES[name].where) for name, shape in self.site_shapes().items()]
        return (
            f"<p><b>{escape(repr(self))}</b></p>"
            f"<details><summary>anatomy</summary>{table(asdict(self.anatomy).items())}</details>"
            f"<details><summary>sites</summary>{table(sites)}</details>"
        )


def load(name_or_path: str, **options: Any) -> VLM:
    """Load a model by hub id, local folder or scheme ("testbed:llava").

    Args:
        name_or_path: what to load.
        options: `revision`, `dtype`, `device_map` with `max_memory` and `offload_folder`, `attn_implementation`
            ("sdpa"), `trust_remote_code` (False), and `remote` (False): load everything but the weights, for runs on
            NDIF.

    Raises:
        ModelError: when it is not there, is no image-text model, or its architecture is not in the table.

    Example:
        >>> import interp_vlm as iv
        >>> iv.load("testbed:paligemma").anatomy.prefix
        'bidirectional'
    """
    model, processor = loading.load(name_or_path, **options)
    there = {name: options[name] for name in ("revision", "remote") if name in options}
    return VLM(model, processor, name=name_or_path, **there)


def sweep(
    vlm: VLM,
    batches: Batch | Sequence[Batch],
    many: Sequence[Intervention | Sequence[Intervention]],
    metric: Metric = logit_difference,
    **options: Any,
) -> Sweep:
    """Run many interventions on the same examples and read one number of each.

    Args:
        vlm: the model.
        batches: one batch, or several whose examples are laid end to end.
        many: interventions, or lists of interventions to run together (`iv.vary` makes them).
        metric: `metric(logits, context) -> (batch,)`, for example `iv.logit_difference`.
        options: `engine` as in `vlm.run`; `memory`, what may be kept of the run without interventions and taken by the
            rows of one pass: bytes, a size such as "4GiB", or a share of the device's free memory (a quarter by
            default); `progress`, called with the number of examples done.

    Returns:
        A `Sweep` with `.values` (intervention, example), `.frame()` and `.plot()`.
    """
    return vlm.sweep(batches, many, metric, **options)


def _needs_whole(groups: Sequence[Sequence[Intervention]], metric: Metric) -> str:
    """Why a sweep needs each batch as it is: what belongs to its rows; empty where any of them will do."""
    bound = next((each for group in groups for each in group if getattr(each, "reads_prompts", False)), None)
    if bound is not None:
        return f"{bound!r} takes its values from the whole batch"
    listed = isinstance(metric, PairDifference) and any(isinstance(side, tuple) for side in metric._sides)
    return f"{metric!r} names an answer for each" if listed else ""


def _listed(interventions: Intervention | Sequence[Intervention]) -> list[Intervention]:
    several = isinstance(interventions, Iterable) and not isinstance(interventions, str)
    found: list[Any] = list(interventions) if several else [interventions]  # type: ignore[arg-type]
    for item in found:
        if not isinstance(item, Intervention):
            raise InterventionError(
                f"{item!r} is a {type(item).__name__}",
                expected="an intervention, or a list of them",
                remedy="see interp_vlm.interventions",
            )
    return found
