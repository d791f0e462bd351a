"""The plans `last_row` and `suffix`: many interventions as rows of one pass over shared keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from nnsight import NNsight
from torch import Tensor

from interp_vlm.engine import receipts
from interp_vlm.engine.access import Access
from interp_vlm.engine.cone import run_cone
from interp_vlm.engine.devices import Copies
from interp_vlm.engine.memory import out_of_memory
from interp_vlm.engine.place import ResolvedPlace
from interp_vlm.engine.plan import Plan
from interp_vlm.engine.receipts import Receipt
from interp_vlm.engine.trunk import Trunk
from interp_vlm.tokens.batch import Batch

__all__ = ["Packed", "run_packed"]


# Rows of one pass from which on matrix products get no faster, while the masked keys of other blocks cost more.
_WIDE = 256


@dataclass(frozen=True, eq=False)
class Packed:
    """The same rows of each example as often as there are interventions, all over the trunk's keys.

    A block of rows joins at its intervention's first layer. Rows attend the trunk as in the clean run, but not the
    positions that are computed: instead of these they attend the keys of their own block, which lie behind the trunk's.

    Attributes:
        trunk: the clean run.
        starts: the first layer of each block, ascending.
        rows: the positions that a block computes: the last one (`last_row`), or all from one on (`suffix`).
        last: each example's answer position.
    """

    trunk: Trunk
    starts: tuple[int, ...]
    rows: Int[Tensor, "batch row"]
    last: Int[Tensor, " batch"]

    @property
    def layer(self) -> int:
        return self.starts[0]

    @property
    def stop(self) -> int:
        """How many of the trunk's positions are attended: those before the rows, where the rows are all that follow."""
        start = self.trunk.length - self.rows.shape[1]
        return start if bool((self.rows[:, 0] == start).all()) else self.trunk.length

    def blocks(self, layer: int) -> int:
        """Interventions that act up to a layer."""
        return sum(start <= layer for start in self.starts)

    def entering(self, layer: int, hidden: Tensor | None) -> Float[Tensor, "batch row d"]:
        joining = self.starts.count(layer)
        if not joining:
            assert hidden is not None
            return hidden
        value = self.trunk.residuals[layer]
        new = value[self._example(value.device), self._rows.on(value.device)].repeat(1, joining, 1)
        return new if hidden is None else torch.cat([hidden, new.to(hidden.device)], dim=1)

    def call(self, layer: int) -> dict[str, Any]:
        blocks = self.blocks(layer)
        own = {"attention_mask": self._mask(layer), "past_key_values": self.trunk.prefix(self.stop)}
        return {**self.trunk.call(layer, lambda device: self._rows.on(device).repeat(1, blocks)), **own}

    def _mask(self, layer: int) -> Shaped[Tensor, "batch _ row key"]:
        """The rows' mask once for each block, in the kind that the model uses, with the blocks' own keys behind."""
        mask = self.trunk.calls[layer]["attention_mask"]
        mask = self.trunk.keep(layer) if mask is None else mask
        blocked = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        rows = self._rows.on(mask.device)
        mask = mask.expand(len(rows), -1, -1, -1)[self._example(mask.device), :, rows].transpose(1, 2)
        columns = rows[:, None, None].expand(*mask.shape[:3], -1)
        among = mask.gather(3, columns)
        trunk = mask.scatter(3, columns, blocked)[..., : self.stop]
        blocks, (batch, heads, n, _) = self.blocks(layer), mask.shape
        own = torch.full((batch, heads, blocks, n, blocks, n), blocked, dtype=mask.dtype, device=mask.device)
        own.diagonal(dim1=2, dim2=4).copy_(among[..., None])
        return torch.cat([trunk.repeat(1, 1, blocks, 1), own.flatten(4, 5).flatten(2, 3)], dim=-1)

    def answers(self, hidden: Float[Tensor, "batch row d"]) -> Float[Tensor, "batch block d"]:
        at = (self.rows == self.last[:, None]).long().argmax(dim=1).to(hidden.device)
        return hidden.unflatten(1, (-1, self.rows.shape[1]))[self._example(hidden.device)[:, 0], :, at]

    def placed(self, edit: ResolvedPlace, block: int) -> Column:
        """An edit of the rows in one of the blocks."""
        same = ("intervention", "batch", "selected", "keys", "layers", "n_heads", "clean_values")
        facts = {name: getattr(edit, name) for name in same}
        here = edit.selected.gather(1, self.rows)
        return Column(**facts, here=here, block=block, among=self.rows, stop=self.stop)

    def _example(self, device: torch.device) -> Int[Tensor, "batch 1"]:
        return torch.arange(len(self.rows), device=device)[:, None]

    @cached_property
    def _rows(self) -> Copies:
        return Copies(self.rows)


@dataclass(eq=False, kw_only=True)
class Column(ResolvedPlace):
    """The place of an intervention in one of the packed blocks.

    Attributes:
        block: which one.
        among: the positions that a block computes.
        stop: where the trunk's keys end and the blocks' own begin.
    """

    block: int
    among: Int[Tensor, "batch row"]
    stop: int
    _known: dict[torch.device, Bool[Tensor, "batch key"]] = field(init=False, default_factory=dict)

    def prepared(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        if self.site.name == "attn_mask":
            value = value.expand(-1, self.n_heads, -1, -1)
        return value.clone(memory_format=torch.contiguous_format)

    def edit(self, value: Shaped[Tensor, "..."], layer: int) -> Shaped[Tensor, "..."]:
        """The edit, made in the value itself: of many rows this changes a few."""
        part = value.narrow(2 if self.site.name == "attn_mask" else 1, self._first, self.among.shape[1])
        part.copy_(super().edit(part, layer))
        return value

    def query_rows(self) -> tuple[Int[Tensor, "batch n"], Bool[Tensor, "batch n"]]:
        assert self.here is not None
        if self.among.shape[1] == 1:
            return torch.full_like(self.among, self.block), self.here
        rows, real = super().query_rows()
        return rows + self._first, real

    def key_mask(self, width: int, device: torch.device) -> Bool[Tensor, "batch key"]:
        """Of the blocks' own keys, behind the trunk's, only this block's can be meant."""
        known = self._known.get(device)
        if known is None or known.shape[1] != width:
            keys, own = self._on("keys", device), self.stop + self._first
            known = self._known[device] = torch.zeros(len(keys), width, dtype=torch.bool, device=device)
            known[:, : self.stop] = keys[:, : self.stop]
            known[:, own : own + self.among.shape[1]] = keys.gather(1, self._on("among", device))
        return known

    @property
    def _first(self) -> int:
        return self.block * self.among.shape[1]


Group = tuple[int, Sequence[ResolvedPlace], Plan]


def run_packed(
    root: NNsight,
    access: Access,
    trunk: Trunk | None,
    clean: Float[Tensor, "batch vocab"],
    batch: Batch,
    groups: Sequence[Group],
    memory: int,
) -> Iterator[tuple[int, Float[Tensor, "batch vocab"], tuple[Receipt, ...]]]:
    """Run groups of edits by the plans `last_row` and `suffix`, a block of rows each, in as few passes as is good.

    Args:
        root: the wrapped model.
        access: its sites.
        trunk: the clean run; needed when there are groups.
        clean: its answer logits.
        batch: the encoded examples.
        groups: the number of each group, its edits and its plan.
        memory: bytes that the rows of one pass may take; halved when the device has less.

    Yields:
        Of each group its number, logits and receipts.
    """
    kinds: dict[tuple[str, int], list[Group]] = {}
    for group in sorted(groups, key=lambda group: group[2].layer):
        kinds.setdefault((group[2].name, group[2].start), []).append(group)
    for (name, start), ordered in kinds.items():
        assert trunk is not None
        last = batch.last.to(clean.device)
        rows = last[:, None]
        if name == "suffix":
            rows = torch.arange(start, trunk.length, device=clean.device).expand(len(batch), -1)
        size = max(1, min(_WIDE // rows.shape[1], memory // _bytes(access, trunk, rows, len(ordered))))
        done = 0
        while done < len(ordered):
            part = ordered[done : done + size]
            cone = Packed(trunk, tuple(plan.layer for _, _, plan in part), rows, last)
            try:
                found = _pass(root, access, cone, clean, part)
            except Exception as error:
                if size == 1 or not out_of_memory(error):
                    raise
                size = min(size, len(part)) // 2 or 1
                continue
            yield from found
            done += size


def _bytes(access: Access, trunk: Trunk, rows: Int[Tensor, "batch row"], blocks: int) -> int:
    """What one more block takes: its mask, its scores and weights in receipts, and the widest activations."""
    a, weight, (batch, n) = access.anatomy, trunk.keys[0].element_size(), rows.shape
    keys = trunk.length + n * min(blocks, max(1, _WIDE // n))
    return batch * n * (a.n_heads * keys * (4 + 2 * weight) + weight * (8 * a.d_model + 3 * a.d_mlp + a.d_vocab))


def _pass(
    root: NNsight, access: Access, cone: Packed, clean: Float[Tensor, "batch vocab"], groups: Sequence[Group]
) -> list[tuple[int, Float[Tensor, "batch vocab"], tuple[Receipt, ...]]]:
    """One pass for all groups, which come in the order of their first layers."""
    placed = [[cone.placed(edit, block) for edit in edits] for block, (_, edits, _) in enumerate(groups)]
    everything = [edit for edits in placed for edit in edits]
    recording = run_cone(root, access, cone, receipts.program(everything))
    receipts.refuse_without_effect(everything)
    logits = recording.logits
    assert logits is not None
    idle = torch.tensor([plan.idle for _, _, plan in groups], device=logits.device)
    logits = torch.where(idle[None, :, None], clean[:, None], logits)
    changes = (logits - clean[:, None]).abs().amax(dim=(0, 2)).tolist()
    issued = receipts.issue(placed, recording, access, changes, groups[0][2].name)
    return [(number, logits[:, block], issued[block]) for block, (number, _, _) in enumerate(groups)]
