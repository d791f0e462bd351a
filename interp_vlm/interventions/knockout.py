"""Attention knockout: forbid chosen edges of attention, before the softmax, through the mask."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.base import Indices, Intervention, indices
from interp_vlm.sites import SITES, Site
from interp_vlm.tokens import select
from interp_vlm.tokens.select import Selector

if TYPE_CHECKING:
    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["AttentionKnockout"]


@dataclass(frozen=True, repr=False, eq=False)
class AttentionKnockout(Intervention):
    """Block attention from query positions to key positions, in chosen layers and heads.

    The edges are removed from the mask that attention receives, so the remaining weights renormalise; nothing is done
    after the softmax. Under grouped-query attention `heads` are query heads.

    Attributes:
        queries: a role, a selector or positions: who may no longer look.
        keys: what they may no longer look at.
        layers: an int, a range, a list or "all".
        heads: query heads, or None for all.

    Source:
        Geva et al., "Dissecting Recall of Factual Associations in Auto-Regressive Language Models", 2023, section 5.

    Example:
        >>> AttentionKnockout(queries="last", keys="image", layers=range(8, 17))
        AttentionKnockout(queries='last', keys='image', layers=range(8, 17))
    """

    queries: Any = "last"
    keys: Any = "image"
    layers: Indices = "all"
    heads: Indices | None = None
    _queries: Selector = field(init=False, repr=False)
    _keys: Selector = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_queries", select.of(self.queries))
        object.__setattr__(self, "_keys", select.of(self.keys))

    @property
    def where(self) -> Site:
        return SITES["attn_mask"]

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return (self._queries, self._keys)

    def head_mask(self, n_heads: int) -> Bool[Tensor, " head"]:
        """The heads acted on, of `n_heads`."""
        return _mask(indices("all" if self.heads is None else self.heads, n_heads, "head"), n_heads)

    def block(
        self,
        keep: Bool[Tensor, "#batch heads query key"],
        queries: Bool[Tensor, "batch query"],
        keys: Bool[Tensor, "batch key"],
        n_heads: int,
    ) -> Bool[Tensor, "batch _ query key"]:
        """The mask with the edges from `queries` to `keys` removed.

        Args:
            keep: True where attention is allowed; the head axis may be 1 (shared) or `n_heads`.
            queries: the blocked query rows.
            keys: the blocked key columns.
            n_heads: number of query heads.

        Returns:
            A new mask; its head axis is `n_heads` when `heads` names a subset.

        Raises:
            InterventionError: when a query row is left with nothing to attend (its output would be undefined: zero
                under sdpa, uniform over the future under eager).
        """
        edges = queries[:, None, :, None] & keys[:, None, None, :]
        if self.heads is not None:
            edges = edges & self.head_mask(n_heads).to(keep.device)[:, None, None]
        blocked = keep & ~edges
        attending = blocked.any(-1)
        if not attending.all() and (emptied := ~attending & queries[:, None, :]).any():
            example, _, row = (int(index) for index in emptied.nonzero()[0])
            raise InterventionError(
                f"{self!r} leaves position {row} of example {example} with no key to attend",
                expected="at least one allowed key for every blocked query",
                remedy="leave the position itself out of keys, for example keys=... - select.last",
            )
        return blocked

    def closing(self, vlm: VLM, batch: Batch, *, edges: str = "source") -> list[AttentionKnockout]:
        """This knockout and the smallest others that leave its keys no route to the answer; `vlm.run` takes the list.

        Args:
            vlm: the model.
            batch: the examples in which the routes are closed.
            edges: "source" removes only edges from the blocked keys; "any" the fewest of all; see `Leaks.closing`.

        Example:
            >>> import interp_vlm as iv
            >>> vlm = iv.load("testbed:llava")
            >>> scene = iv.data.digit_scenes(n=1)[0]
            >>> batch = vlm.encode(scene.image, scene.question)
            >>> for each in AttentionKnockout("last", "image", layers=[2, 3]).closing(vlm, batch):
            ...     print(each)
            AttentionKnockout(queries='last', keys='image', layers=[2, 3])
            AttentionKnockout(queries=text - last, keys='image', layers=range(0, 3))
            AttentionKnockout(queries='last', keys='image', layers=range(0, 2))
        """
        return [self, *vlm.leaks(batch, self).closing(edges)]


@functools.lru_cache(maxsize=1024)
@functools.lru_cache(maxsize=1024)
def _mask(chosen: tuple[int, ...], count: int) -> Bool[Tensor, " count"]:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(chosen)] = True
    return mask
