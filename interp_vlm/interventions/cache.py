"""Captured activations: what `vlm.capture` returns, and what `ActivationPatch` reads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp_vlm.errors import InterventionError, ModelError
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    from transformer_lens import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge

__all__ = ["PLUG_IN", "Cache"]

PLUG_IN = "interp_vlm.interop.transformer_lens"
"""Where the doors to TransformerLens are, imported when asked for."""


@dataclass(frozen=True, eq=False)
class Cache(Mapping[str, Tensor]):
    """Activations of one batch by site, padded where examples select different numbers of positions.

    Attributes:
        activations: per site (batch, layer, pos, ...); `pattern` is (batch, layer, head, query, key) with `pos` the
            query rows; `projector_out` has one layer; `vision_post` has the rows of the example's pictures as `pos`.
        layers: per site, the layers captured, in the order of the layer axis.
        positions: (batch, pos) absolute positions in the padded rows, -1 where `mask` is False.
        mask: (batch, pos) False for padding.
        tokens: the batch's token maps.
        model: name of the model that the activations come from.
        origin: gives that model as long as it exists, else None; a cache does not keep it alive.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> pair = iv.data.digit_pairs(n=1)[0]
        >>> batch = vlm.encode([pair.clean.image, pair.corrupt.image], pair.clean.question)
        >>> cache = vlm.capture(batch, sites=["resid_post"], positions="last")
        >>> cache["resid_post"].shape
        torch.Size([2, 4, 1, 128])
    """

    activations: Mapping[str, Shaped[Tensor, "batch _ _ ..."]]
    layers: Mapping[str, tuple[int, ...]]
    positions: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    tokens: tuple[TokenMap, ...]
    model: str = ""
    origin: Callable[[], Any] = field(default=lambda: None, repr=False)

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.activations[name]
        except KeyError:
            raise InterventionError(
                f"site {name!r} was not captured",
                expected="one of " + ", ".join(self.activations),
                remedy=f"capture it: vlm.capture(batch, sites=[{name!r}])",
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.activations)

    def __len__(self) -> int:
        return len(self.activations)

    def layer(self, name: str, layer: int) -> Shaped[Tensor, "batch pos ..."]:
        """The values of one site at one layer.

        Raises:
            InterventionError: when the layer was not captured.
        """
        values = self[name]
        captured = self.layers[name]
        if layer not in captured:
            raise InterventionError(
                f"layer {layer} of {name!r} was not captured",
                expected=f"one of {list(captured)}",
                remedy="capture it too",
            )
        return values[:, captured.index(layer)]

    def rows(
        self, name: str, layer: int, wanted: Sequence[Int[Tensor, " _"]]
    ) -> tuple[Shaped[Tensor, "row ..."], tuple[int, ...]]:
        """The rows at absolute positions, example after example, and how many each example gives.

        Args:
            name: a captured site.
            layer: a captured layer.
            wanted: positions in each example of the captured batch.

        Raises:
            InterventionError: for a position that was not captured.
        """
        values = self.layer(name, layer)
        chosen = []
        for row, positions in enumerate(wanted):
            have = {position: column for column, position in enumerate(self.positions[row].tolist()) if position >= 0}
            asked = positions.tolist()
            missing = [position for position in asked if position not in have]
            if missing:
                raise InterventionError(
                    f"the source holds no {name!r} at position {missing[0]} of example {row}",
                    expected=f"the {len(asked)} positions that are patched",
                    remedy="capture the source at the positions that are patched",
                )
            chosen.append(values[row, [have[position] for position in asked]])
        return torch.cat(chosen), tuple(len(rows) for rows in chosen)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Cache:
        """The same cache with its values on another device or in another dtype."""
        values = {name: value.to(device=device, dtype=dtype or value.dtype) for name, value in self.activations.items()}
        return replace(self, activations=values)

    def to_transformer_lens(self, bridge: TransformerBridge | None = None) -> ActivationCache:
        """These activations as TransformerLens' `ActivationCache`, under its names and with its analyses.

        What they need has to be captured, at every layer: `decompose_resid` "attn_out", "mlp_out" and "resid_pre";
        `stack_head_results` "z" (and "resid_post" for its remainder); `logit_lens` and `accumulated_resid` "resid_pre"
        and "resid_post"; the norms' scales (`apply_ln=True`, `logit_attrs`) "resid_post", or what enters the layer.

        Rows stand at their positions in the padded prompts if all of them were captured, else in the order of
        `positions`. `hook_embed` is what enters the first layer, pictures included, so that `decompose_resid` sums to
        the stream (not in Qwen3-VL, which adds vision features between layers). Results of heads sum to what attention
        adds (in Gemma 2 and 3 before the norm behind it). "attn_mask", "projector_out" and "vision_post" have no place
        there and are left out.

        `logit_attrs` wants the final norm's gain inside the head: after `bridge.enable_compatibility_mode()`, shares of
        the parts sum to differences of logits.

        Args:
            bridge: the same model as a bridge; by default one is made of the model that was captured.

        Raises:
            ModelError: when that model is gone and no bridge is given, or the bridge is of another model.
            InterventionError: when an analysis needs a site that was not captured.

        Example:
            >>> import interp_vlm as iv
            >>> vlm = iv.load("testbed:llava")
            >>> example = iv.data.digit_scenes(n=1)[0]
            >>> cache = vlm.capture(vlm.encode(example.image, example.question), ["resid_pre", "attn_out", "mlp_out"])
            >>> _, labels = cache.to_transformer_lens().decompose_resid(return_labels=True)
            >>> labels[:3]
            ['embed', '0_attn_out', '0_mlp_out']
        """
        # By name: the plug-in's room lies above this one.
        if bridge is None:
            vlm = self.origin()
            if vlm is None:
                raise ModelError(
                    f"the cache's model {self.model!r} is not in memory any more",
                    expected="a bridge of it",
                    remedy="pass one: cache.to_transformer_lens(iv.to_bridge(vlm))",
                )
            bridge = importlib.import_module(f"{PLUG_IN}.bridge").to_bridge(vlm)
        return importlib.import_module(f"{PLUG_IN}.cache").to_activation_cache(self, bridge)

    def __reduce__(self) -> tuple[type[Cache], tuple[Any, ...]]:
        # Copied or sent to another process it is values alone: the model is not there.
        values = self.activations, self.layers, self.positions, self.mask, self.tokens, self.model
        return type(self), values

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.activations.items())
        return f"Cache({shapes})"
