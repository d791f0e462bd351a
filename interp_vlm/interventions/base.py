"""What every intervention is: a frozen value that says where to act and what to put there.

An intervention knows sites, layers, positions, heads and units; it never knows a model family. The engine resolves its
selectors, hands it the selected rows of one site at one layer, and writes back what it returns.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp_vlm.errors import InterventionError
from interp_vlm.interventions.cache import PLUG_IN, Cache
from interp_vlm.sites import Site, site
from interp_vlm.tokens import select
from interp_vlm.tokens.select import Selector
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["CellIntervention", "Intervention", "Place", "indices"]

Indices = SupportsIndex | Iterable[SupportsIndex] | Literal["all"]
When = Literal["prompt", "generated", "both"]

# Fields without which a repr would not say what an intervention does.
_ALWAYS = ("site", "queries", "keys", "layers", "to")
_INDICES = frozenset({"layers", "heads", "units"})


@runtime_checkable
class Place(Protocol):
    """What the engine tells an intervention about the place where it acts."""

    selected: Bool[Tensor, "batch pos"]
    layers: tuple[int, ...]

    @property
    def tokens(self) -> Sequence[TokenMap]: ...

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of selected rows of each example, in the order of the rows."""
        ...

    @property
    def tower_rows(self) -> Int[Tensor, " row"]:
        """At `vision_post`: the selected rows among all rows of the vision tower, laid end to end."""
        ...

    def clean(self, layer: int, selected: Bool[Tensor, "batch pos"] | None = None) -> Shaped[Tensor, "row ..."]:
        """The same rows (or other ones) of the run without interventions."""
        ...


def indices(spec: Indices | Any, count: int, what: str) -> tuple[int, ...]:
    """Turn an int, a range, a list or "all" into non-negative indices, in the order in which they are named.

    Args:
        spec: the indices asked for; negative ones count from the end.
        count: how many there are.
        what: what is being indexed, for the error ("layer", "head").

    Raises:
        InterventionError: for an index out of range, a repeated one, an empty list or another type.

    Example:
        >>> indices([0, -1], 4, "layer")
        (0, 3)
    """
    if isinstance(spec, str):
        if spec == "all":
            return tuple(range(count))
        raise InterventionError(f"{what}s={spec!r}", expected="an int, a range, a list of ints or 'all'")
    try:
        # The usual types first: to ask for an iterable is slow.
        several = isinstance(spec, list | tuple | range) or (not isinstance(spec, int) and isinstance(spec, Iterable))
        given: list[Any] = list(kept(spec)) if several else [spec]
        wanted = [operator.index(index) for index in given]
        if any(isinstance(index, bool) for index in given):
            raise TypeError("a mask is no list of numbers")
    except TypeError:
        raise InterventionError(
            f"{what}s={spec!r}", expected="an int, a range, a list of ints or 'all'", remedy=f"name {what}s by number"
        ) from None
    found = [index + count if index < 0 else index for index in wanted]
    for asked, index in zip(wanted, found, strict=True):
        if not 0 <= index < count:
            raise InterventionError(
                f"{what} {asked} does not exist",
                expected=f"0 to {count - 1} (or {-count} to -1)",
                remedy=f"this model has {count} {what}s",
            )
    if not found:
        raise InterventionError(
            f"no {what} is named", expected=f"at least one {what}", remedy=f"give {what}s='all' for every {what}"
        )
    if len(set(found)) < len(found):
        raise InterventionError(f"{what}s={spec!r} names one twice", expected="each at most once")
    return tuple(found)


def kept(spec: Any) -> Any:
    """A copy of an index spec that neither runs out, as a generator does, nor changes with the caller's list."""
    if isinstance(spec, str | int | range | tuple) or not isinstance(spec, Iterable) or getattr(spec, "ndim", 1) == 0:
        return spec
    return list(spec.tolist() if hasattr(spec, "tolist") else spec)  # type: ignore[attr-defined]


def real_numbers(value: Tensor, what: str) -> None:
    """Refuse a tensor that would spoil every activation it touches.

    Args:
        value: about to be written or added to activations.
        what: how the intervention calls it, for the error ("direction").

    Raises:
        InterventionError: complex or sparse values, NaN or infinity, or a tensor on the meta device.

    Example:
        >>> real_numbers(torch.tensor([1.0, float("nan")]), "direction")
        Traceback (most recent call last):
        ...
        interp_vlm.errors.InterventionError: direction holds 1 NaN or infinite value of 2; expected finite numbers
    """
    if value.is_complex() or value.is_meta or value.layout != torch.strided:
        kind = "complex" if value.is_complex() else "on the meta device" if value.is_meta else "sparse"
        raise InterventionError(f"{what} is {kind}", expected="a dense tensor of real numbers")
    odd = int((~value.isfinite()).sum())
    if odd:
        values = "value" if odd == 1 else "values"
        raise InterventionError(
            f"{what} holds {odd} NaN or infinite {values} of {value.numel()}", expected="finite numbers"
        )


def fingerprint(value: Any) -> Any:
    """A hashable stand-in for a field, so that interventions that hold tensors still compare as values."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        content = data.flatten().view(torch.uint8).numpy().tobytes()
        return tuple(data.shape), str(data.dtype), hashlib.sha256(content).hexdigest()
    if isinstance(value, np.ndarray):
        return fingerprint(torch.from_numpy(value))
    if isinstance(value, Cache):
        return fingerprint((value.activations, value.layers, value.positions))
    if isinstance(value, Mapping):
        return tuple((key, fingerprint(item)) for key, item in value.items())
    if isinstance(value, list | tuple | range):
        return tuple(fingerprint(item) for item in value)
    return frozenset(value) if isinstance(value, set) else value


def brief(value: Any) -> str:
    """One field in a repr: tensors by shape, ranges and lists as they are."""
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return str(value) if isinstance(value, Selector) else repr(value)


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Intervention(ABC):
    """Base of the four interventions: a value that can be compared, hashed, varied and shown.

    Attributes:
        during: act on the prompt's tokens ("prompt"), on generated ones ("generated"), or on "both".
        allow_empty: accept an intervention that cannot have an effect instead of raising.
    """

    during: When = "prompt"
    allow_empty: bool = False

    def __post_init__(self) -> None:
        for name in _INDICES & self._fields().keys():
            object.__setattr__(self, name, kept(getattr(self, name)))
        if self.during not in ("prompt", "generated", "both"):
            raise InterventionError(f"during={self.during!r}", expected="'prompt', 'generated' or 'both'")

    @property
    @abstractmethod
    def where(self) -> Site:
        """The row of the site table where this intervention acts."""

    @property
    @abstractmethod
    def selectors(self) -> tuple[Selector, ...]:
        """Every selector that has to be resolved before this intervention can act."""

    def apply(self, vlm: VLM) -> None:
        """Act inside a native `with vlm.trace(batch):` block: in the first layer at this point of the forward pass, in
        further layers when the model reaches them, beside the rest of the block.

        Means and donors are then taken from the live values, since no run without interventions exists.
        First layers must come in the model's own order, as nnsight asks of every access.

        Raises:
            InterventionError: outside a trace, or for a selector that needs evidence of an earlier run.
        """
        vlm._live.apply(self)

    def as_hooks(
        self, bridge: TransformerBridge, batch: Batch
    ) -> list[tuple[str, Callable[..., Shaped[Tensor, "..."] | None]]]:
        """This intervention on one batch as `fwd_hooks` for TransformerLens, see
        `interp_vlm.interop.transformer_lens.hooks.as_hooks`.

        Example:
            >>> import interp_vlm as iv
            >>> vlm = iv.load("testbed:llava")
            >>> bridge = iv.to_bridge(vlm)
            >>> example = iv.data.digit_scenes(n=1)[0]
            >>> batch = vlm.encode(example.image, example.question)
            >>> ablation = iv.Ablation("z", layers=[1], heads=[3], to="zero")
            >>> inputs = dict(batch.inputs)
            >>> ids = inputs.pop("input_ids")
            >>> logits = bridge.run_with_hooks(ids, fwd_hooks=ablation.as_hooks(bridge, batch), **inputs)
            >>> bool((logits[0, -1] - vlm.run(batch, ablation).logits[0]).abs().max() < 1e-3)
            True
        """
        # By name: interventions know no plug-in, as models know no testbed.
        return importlib.import_module(f"{PLUG_IN}.hooks").as_hooks(self, bridge, batch)

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _defaults(type(self))}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and fingerprint(self._fields()) == fingerprint(other._fields())  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self).__name__, fingerprint(self._fields())))

    def __repr__(self) -> str:
        defaults = _defaults(type(self))
        shown = [
            f"{name}={brief(value)}"
            for name, value in self._fields().items()
            if name in _ALWAYS or defaults[name] is dataclasses.MISSING or _differs(value, defaults[name])
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def _differs(value: Any, default: Any) -> bool:
    return value is not default and fingerprint(value) != fingerprint(default)


@functools.cache
def _defaults(kind: type[Intervention]) -> dict[str, Any]:
    """The public fields of a kind of intervention, in the order of a call, with their defaults (MISSING for none)."""
    public = [item for item in dataclasses.fields(kind) if not item.name.startswith("_")]
    return {item.name: item.default for item in sorted(public, key=lambda item: bool(item.kw_only))}


@dataclass(frozen=True, repr=False, eq=False)
class CellIntervention(Intervention):
    """An intervention on cells of a site: chosen positions, and there chosen heads or units.

    Attributes:
        site: a name of the site table.
        layers: an int, a range, a list or "all"; ignored for `projector_out`.
        positions: a role, a selector or positions; by default every position that the site has.
        heads: heads to act on, at sites with a head axis.
        units: indices of the last axis to act on (neurons at `mlp_post`, dimensions of the residual stream elsewhere).
    """

    site: str = "resid_post"
    layers: Indices = "all"
    positions: Any = "all"
    heads: Indices | None = None
    units: Indices | None = None
    _selector: Selector = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        row = site(self.site)
        if not row.editable or row.name == "attn_mask":
            remedy = "use AttentionKnockout to block edges" if row.name in ("attn_mask", "pattern") else ""
            raise InterventionError(
                f"{type(self).__name__} cannot write to {row.name!r}", expected="a site of activations", remedy=remedy
            )
        if self.heads is not None and not row.per_head:
            raise InterventionError(
                f"heads={self.heads!r} at site {row.name!r}, which has no head axis",
                expected="site 'z'",
                remedy="drop heads= or use site='z'",
            )
        if self.during != "prompt" and self.reads_prompts:
            raise InterventionError(
                f"{self!r} reads values of prompts, which generated tokens do not have",
                expected="during='prompt'",
                remedy="or give the value itself: Ablation(..., to=iv.reference_mean(...)), Steering",
            )
        positions = self.positions
        if row.part != "decoder" and isinstance(positions, str) and positions == "all":
            positions = "image"
        object.__setattr__(self, "_selector", select.of(positions))

    @property
    def where(self) -> Site:
        return site(self.site)

    @property
    def selectors(self) -> tuple[Selector, ...]:
        return (self._selector,)

    @property
    def needs_clean(self) -> bool:
        """Whether the replacement is computed from the run without interventions."""
        return False

    @property
    def reads_prompts(self) -> bool:
        """Whether the replacement of a position is read at prompt positions of this run or of another."""
        return self.needs_clean

    @abstractmethod
    def replacement(self, rows: Shaped[Tensor, "row ..."], layer: int, place: Place) -> Shaped[Tensor, "..."]:
        """What to put in the place of the selected rows (all heads and units; `rewrite` keeps the others), one for each
        row or one for all."""

    def rewrite(self, rows: Shaped[Tensor, "row ..."], layer: int, place: Place) -> Shaped[Tensor, "row ..."]:
        """The selected rows with the chosen heads and units replaced, everything else untouched."""
        new = self.replacement(rows, layer, place).to(dtype=rows.dtype, device=rows.device).expand_as(rows)
        cells = self.cells(rows)
        return new if cells is None else torch.where(cells, new, rows)

    def cells(self, rows: Shaped[Tensor, "row ..."]) -> Bool[Tensor, "..."] | None:
        """Which cells of a row are acted on, or None for all of them."""
        if self.heads is None and self.units is None:
            return None
        shape = rows.shape[1:]
        chosen = torch.ones(shape, dtype=torch.bool, device=rows.device)
        if self.units is not None:
            unit_mask = torch.zeros(shape[-1], dtype=torch.bool, device=rows.device)
            unit_mask[list(indices(self.units, shape[-1], "unit"))] = True
            chosen &= unit_mask
        if self.heads is not None:
            head_mask = torch.zeros(shape[0], dtype=torch.bool, device=rows.device)
            head_mask[list(indices(self.heads, shape[0], "head"))] = True
            chosen &= head_mask[:, None]
        return chosen
