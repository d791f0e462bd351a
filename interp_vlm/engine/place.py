"""Where an intervention acts in one batch: its selectors resolved, its rows found in the value of a site."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp_vlm.engine.devices import Copies
from interp_vlm.errors import InterventionError, SelectionError
from interp_vlm.interventions.base import CellIntervention, Intervention, indices
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.models.anatomy import Anatomy
from interp_vlm.sites import SITES, Site
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.select import Selector
from interp_vlm.tokens.token_map import TokenMap

__all__ = [
    "Evidence",
    "ResolvedPlace",
    "Rows",
    "layers_of",
    "padded_positions",
    "picture_spans",
    "refuse_pictureless",
    "resolve",
    "selected",
]

Evidence = Mapping[str, Tensor]  # (batch, pos) scores by name: what selectors such as `top` and `sinks` read


@dataclass(eq=False)
class ResolvedPlace:
    """One intervention in one batch: what `interventions.base.Place` promises, and the key mask of a knockout.

    Attributes:
        selected: True at the positions acted on (a knockout's queries).
        keys: True at a knockout's keys.
        layers: the layers acted on.
        n_heads: query heads of the model.
        clean_values: values of the run without interventions by layer, where the intervention needs them.
        rows: the rows of the site's value, once it was seen.
        changed: cells or edges changed so far.
        here: `selected` among the rows that are computed, where those are not all rows of the batch.
    """

    intervention: Intervention
    batch: Batch
    selected: Bool[Tensor, "batch pos"]
    keys: Bool[Tensor, "batch pos"] | None
    layers: tuple[int, ...]
    n_heads: int
    clean_values: dict[int, Tensor] = field(default_factory=dict)
    rows: Rows | None = None
    changed: int = 0
    here: Bool[Tensor, "batch row"] | None = None
    _copies: dict[str, Copies] = field(init=False, default_factory=dict)

    @property
    def site(self) -> Site:
        return self.intervention.where

    @property
    def tokens(self) -> Sequence[TokenMap]:
        return self.batch.tokens

    @property
    def counts(self) -> tuple[int, ...]:
        assert self.rows is not None, "the engine calls `edit`, which finds the rows first"
        return self.rows.counts

    @property
    def tower_rows(self) -> Int[Tensor, " row"]:
        assert self.rows is not None, "the engine calls `edit`, which finds the rows first"
        return self.rows.index[0]

    def clean(self, layer: int, selected: Bool[Tensor, "batch pos"] | None = None) -> Shaped[Tensor, "row ..."]:
        value = self.clean_values[layer]
        return Rows.of(self.batch, self.site, self.selected if selected is None else selected, value).take(value)

    def prepared(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The value as the first of several edits takes it."""
        return value

    def edit(self, value: Shaped[Tensor, "..."], layer: int) -> Shaped[Tensor, "..."]:
        """The value of the site with this intervention made in it, and the number of cells that changed noted."""
        self._refuse_other_rows(value)
        if isinstance(self.intervention, AttentionKnockout):
            keys = self.key_mask(value.shape[-1], value.device)
            new = self.intervention.block(value, self._on(self._computed, value.device), keys, self.n_heads)
            removed = int((value != new).sum())
            # One shared row of the mask stands for every head.
            self.changed += removed * (self.n_heads if new.shape[1] == 1 else 1)
            return new
        assert isinstance(self.intervention, CellIntervention)
        self.rows = Rows.of(self.batch, self.site, self._on(self._computed, value.device), value)
        old = self.rows.take(value)
        rows = self.intervention.rewrite(old, layer, self)
        self.changed += int((rows != old).sum())
        return self.rows.put(value, rows)

    def key_mask(self, width: int, device: torch.device) -> Bool[Tensor, "batch key"]:
        """The keys of a knockout among the `width` keys that the computed rows may attend: further ones are new."""
        keys = self._on("keys", device)
        return torch.nn.functional.pad(keys, (0, width - keys.shape[1]))

    def query_rows(self) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
        """The rows acted on among those that are computed, padded to the longest example, and which are real."""
        return padded_positions(getattr(self, self._computed))

    @property
    def _computed(self) -> str:
        """The name of the mask over the rows that are computed."""
        return "selected" if self.here is None else "here"

    def _on(self, name: str, device: torch.device) -> Tensor:
        """A mask by its name, where a value lies."""
        mask: Tensor = getattr(self, name)
        return mask if mask.device == device else self._copies.setdefault(name, Copies(mask)).on(device)

    def _refuse_other_rows(self, value: Shaped[Tensor, "..."]) -> None:
        """A pass over other rows than those of the batch (beams, no key-value cache) must not be edited half."""
        if self.site.part == "vision":
            return
        batch, rows = getattr(self, self._computed).shape
        found = (len(value), value.shape[-2]) if self.site.name == "attn_mask" else tuple(value.shape[:2])
        if found != (batch, rows) and not (self.site.name == "attn_mask" and found == (1, rows)):
            raise InterventionError(
                f"the model computes {found[0]} x {found[1]} rows where {self.intervention!r} acts",
                expected=f"{batch} x {rows}, one row of the batch for each example",
                remedy="generate without beams or several sequences per prompt, and with the key-value cache",
            )


@dataclass(frozen=True, eq=False)
class Rows:
    """Selected positions as rows of a site's value, example after example.

    Attributes:
        index: indices into the value's first two axes, or (vision tower) into its rows laid end to end.
        counts: number of rows of each example.
    """

    index: tuple[Int[Tensor, " row"], ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, site: Site, selected: Bool[Tensor, "batch pos"], value: Shaped[Tensor, "..."]) -> Rows:
        """The rows of `selected` in the value of a site.

        Raises:
            SelectionError: for positions that are no image tokens, at an image-side site.
        """
        if site.part != "decoder":
            _refuse_text(batch, site, selected)
        if site.part != "vision":
            return cls(selected.to(value.device).nonzero(as_tuple=True), tuple(selected.sum(1).tolist()))
        spans = picture_spans(batch, value)
        per_example = [_vision_rows(batch, row, selected[row], spans[row]) for row in range(len(batch))]
        return cls((torch.cat(per_example).to(value.device),), tuple(len(rows) for rows in per_example))

    def take(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "row ..."]:
        """The rows of a value."""
        return value[self.index] if len(self.index) == 2 else _flat(value)[self.index[0].to(value.device)]

    def put(self, value: Shaped[Tensor, "..."], rows: Shaped[Tensor, "row ..."]) -> Shaped[Tensor, "..."]:
        """A copy of a value with the rows replaced."""
        new = value.clone(memory_format=torch.contiguous_format)
        if len(self.index) == 2:
            new[self.index] = rows
        else:
            _flat(new)[self.index[0].to(value.device)] = rows
        return new


def _refuse_text(batch: Batch, site: Site, selected: Tensor) -> None:
    for row, tokens in enumerate(batch.tokens):
        if bool((selected[row].cpu() & (tokens.image_index < 0)).any()):
            raise SelectionError(
                f"site {site.name!r} has image tokens only, and the selection names text in example {row}",
                expected="a selection within select.image",
                remedy="use positions='image' or select.image & ...",
            )


def picture_spans(batch: Batch, value: Shaped[Tensor, "..."]) -> list[list[tuple[int, int]]]:
    """For each example, which rows [start, stop) of the vision tower's output belong to each of its pictures.

    Args:
        batch: the encoded examples; the tower sees their pictures one after another.
        value: the output of a tower layer, (picture or tile, patch, d) or (patch of all pictures, d).

    Raises:
        SelectionError: when the rows of a picture are not known.
    """
    total, pictures = value.shape[:-1].numel(), sum(len(tokens.grids) for tokens in batch.tokens)
    # A grid that does not know has a share only where the tower has one entry for each picture.
    share = total // pictures if value.dim() == 3 and len(value) == pictures else -1
    start, spans = 0, []
    for tokens in batch.tokens:
        widths = [share if grid.vision_total is None else grid.vision_total for grid in tokens.grids]
        ends = list(itertools.accumulate(widths, initial=start))
        spans.append(list(itertools.pairwise(ends)))
        start = ends[-1]
    if start != total or any(stop <= begin for own in spans for begin, stop in own):
        raise SelectionError(
            f"which of the {total} rows of the vision tower belong to which of {pictures} pictures is not known",
            expected="a family whose grids state vision_total",
            remedy="edit or capture 'projector_out' instead, or take one picture at a time",
        )
    return spans


def _vision_rows(batch: Batch, example: int, selected: Tensor, spans: list[tuple[int, int]]) -> Int[Tensor, " row"]:
    """The vision tower's rows that feed the selected image tokens; all rows of a picture selected whole."""
    tokens = batch.tokens[example]
    found = [torch.empty(0, dtype=torch.long)]
    for number, (grid, (start, stop)) in enumerate(zip(tokens.grids, spans, strict=True)):
        chosen = selected.cpu()[tokens.picture_tokens(number)]
        if bool(chosen.all()):
            found.append(torch.arange(start, stop))
        elif grid.vision_rows is not None:
            fed = torch.from_numpy(grid.vision_rows[chosen.numpy()]).flatten()
            found.append(fed[fed >= 0].unique() + start)  # -1: a separator, which no row feeds
        elif bool(chosen.any()):
            raise SelectionError(
                f"which rows of the vision tower feed a single token is not known for example {example}",
                expected="a selection of whole pictures",
                remedy="use positions='image', or edit 'projector_out' instead",
            )
    return torch.cat(found)


def _flat(value: Tensor) -> Tensor:
    # (picture, patch, d) for most towers, (patch of all pictures, d) for Qwen's.
    return value.flatten(0, 1) if value.dim() == 3 else value


def layers_of(site: Site, spec: object, anatomy: Anatomy) -> tuple[int, ...]:
    """A layer spec resolved against the part of the model in which a site lies.

    Raises:
        InterventionError: for a layer out of range.
    """
    if not site.layered:
        return (0,)
    count = anatomy.n_vision_layers if site.part == "vision" else anatomy.n_layers
    return indices(spec, count, "vision layer" if site.part == "vision" else "layer")


def refuse_pictureless(site: Site, batch: Batch) -> None:
    """Refuse a site of the vision tower in a batch without pictures, on which the tower does not run.

    Raises:
        InterventionError: in that case.
    """
    if site.part == "vision" and not any(tokens.grids for tokens in batch.tokens):
        raise InterventionError(
            f"site {site.name!r} in a batch without pictures, on which the vision tower does not run",
            expected="at least one picture in the batch",
            remedy="choose a site of the decoder",
        )


def selected(batch: Batch, selector: Selector, evidence: Evidence) -> Bool[Tensor, "batch pos"]:
    """A selector resolved in every example of a batch, as a mask."""
    mask = torch.zeros(batch.inputs["input_ids"].shape, dtype=torch.bool)
    for row, tokens in enumerate(batch.tokens):
        own = {name: scores[row].cpu() for name, scores in evidence.items()}
        mask[row, selector.positions(tokens, own)] = True
    return mask.to(batch.inputs["input_ids"].device)


@dataclass(frozen=True, eq=False)
class Found:
    """A selector resolved in a batch, for all interventions that name it.

    Attributes:
        mask: the positions.
        empty: examples in which there are none.
        answers: whether every example's answer position is among them.
    """

    mask: Bool[Tensor, "batch pos"]
    empty: list[int]
    answers: bool

    @classmethod
    def of(cls, batch: Batch, mask: Bool[Tensor, "batch pos"]) -> Found:
        example = torch.arange(len(batch), device=mask.device)
        answers = bool(mask[example, batch.last.to(mask.device)].all())
        return cls(mask, (~mask.any(1)).nonzero().flatten().tolist(), answers)


def padded_positions(mask: Bool[Tensor, "batch pos"]) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
    """A mask as positions, padded with -1 to the longest example, and which of them are real."""
    counts = mask.sum(1)
    width = int(counts.max()) if len(counts) else 0
    real = torch.arange(width, device=mask.device)[None] < counts[:, None]
    positions = torch.full((len(mask), width), -1, device=mask.device)
    positions[real] = mask.nonzero()[:, 1]
    return positions, real


def resolve(
    intervention: Intervention,
    batch: Batch,
    anatomy: Anatomy,
    evidence: Evidence,
    *,
    generating: bool = False,
    known: dict[Selector, Found] | None = None,
) -> ResolvedPlace:
    """Find where an intervention acts in a batch, and refuse one that cannot reach the answer.

    Args:
        intervention: the value to resolve.
        batch: the encoded examples.
        anatomy: the model's facts.
        evidence: scores per position for selectors that need them.
        generating: whether tokens are generated after the prompt.
        known: selections made in this batch so far, to share and to add to.

    Raises:
        InterventionError: for layers or heads out of range, a selection that is empty in some example, an edit that
            no later computation carries to the answer position (unless `allow_empty`).
    """
    site = intervention.where
    layers = layers_of(site, getattr(intervention, "layers", 0), anatomy)
    refuse_pictureless(site, batch)
    heads = getattr(intervention, "heads", None)
    if heads is not None:
        indices(heads, anatomy.n_heads, "head")
    if intervention.during == "generated" and not generating:
        raise InterventionError(
            f"{intervention!r} acts on generated tokens, and a single run generates none",
            expected="during='prompt' or 'both'",
            remedy="or use vlm.generate",
        )
    if site.part != "decoder" and intervention.during != "prompt":
        raise InterventionError(
            f"{intervention!r} acts on generated tokens, which have no picture", expected="during='prompt'"
        )
    known = {} if known is None else known
    for selector in intervention.selectors:
        if selector not in known:
            known[selector] = Found.of(batch, selected(batch, selector, evidence))
    found = [known[selector] for selector in intervention.selectors]
    if not intervention.allow_empty:
        for selector, own in zip(intervention.selectors, found, strict=True):
            _refuse_empty(intervention, selector, own, batch)
        _refuse_unreachable(intervention, site, layers, found[0], anatomy)
    keys = found[1].mask if len(found) > 1 else None
    return ResolvedPlace(intervention, batch, found[0].mask, keys, layers, anatomy.n_heads)


def _refuse_empty(intervention: Intervention, selector: Selector, found: Found, batch: Batch) -> None:
    if found.empty:
        first = found.empty[0]
        raise InterventionError(
            f"{selector} selects nothing in example {first} ({batch.questions[first]!r}) for {intervention!r}",
            expected="at least one position in every example",
            remedy="change the selection, or pass allow_empty=True to leave such examples as they are",
        )


def _refuse_unreachable(
    intervention: Intervention, site: Site, layers: tuple[int, ...], found: Found, anatomy: Anatomy
) -> None:
    remedy = "choose an earlier layer, or pass allow_empty=True"
    if site.part == "vision":
        if min(layers) > anatomy.vision_read:
            raise InterventionError(
                f"{intervention!r} edits vision layer {min(layers)}, which the projector does not read",
                expected=f"a layer up to {anatomy.vision_read}",
                remedy=remedy,
            )
        return
    if intervention.during != "prompt" or site.part != "decoder":
        return
    # From the last layer's attention on, nothing moves between positions any more.
    past_attention = site.order > SITES["resid_pre"].order
    if min(layers) == anatomy.n_layers - 1 and past_attention and not found.answers:
        raise InterventionError(
            f"{intervention!r} edits the last layer's {site.name} away from the answer position, which nothing reads",
            expected="a selection with the last position, or an earlier layer",
            remedy=remedy,
        )
