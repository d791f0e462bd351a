"""Attribution patching: what patching every single cell would do, estimated by one backward pass for all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp_vlm.engine.devices import Copies
from interp_vlm.engine.gradients import Gradients, gradients, refuse_without_gradient
from interp_vlm.engine.place import ResolvedPlace, padded_positions
from interp_vlm.errors import InterventionError
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.readouts.attribution_audit import Audit, audited
from interp_vlm.readouts.metrics import Metric, MetricContext, logit_difference
from interp_vlm.readouts.scores import full_precision

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.vlm import VLM

__all__ = ["Attribution", "attribution"]

MOST_LABELS = 40  # token texts that fit below a figure


@dataclass(frozen=True, eq=False)
class Attribution:
    """What patching each cell from the clean run into the corrupt one would add to the metric, to first order.

    Attributes:
        site: the site.
        metric: name of the metric.
        layers: the layers, in the order of the layer axis.
        values: (example, layer, pos), at `z` (example, layer, pos, head); NaN where an example has fewer positions.
        positions: (example, pos) absolute positions in the padded rows, -1 where `mask` is False.
        mask: (example, pos) False for padding.
        pieces: per example, the text of its positions ("" for padding).
        pictured: (example, pos) True at image tokens.
        clean: the metric of the clean run, (example,); metrics that compare with a run compare with the corrupt one.
        corrupt: the metric of the corrupt run, (example,).
        audit: some cells patched exactly, or None.
        neurons: at `mlp_post`, (example, layer, pos, unit) of which `values` are the sums.
    """

    site: str
    metric: str
    layers: tuple[int, ...]
    values: Float[Tensor, "example layer pos *head"]
    positions: Int[Tensor, "example pos"]
    mask: Bool[Tensor, "example pos"]
    pieces: tuple[tuple[str, ...], ...]
    pictured: Bool[Tensor, "example pos"]
    clean: Float[Tensor, " example"]
    corrupt: Float[Tensor, " example"]
    audit: Audit | None = None
    neurons: Float[Tensor, "example layer pos unit"] | None = None

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row per example, layer and position (and head)."""
        import pandas as pd

        rows, columns = self.mask.nonzero(as_tuple=True)
        each = self.values.transpose(1, 2)[self.mask]  # (cell, layer) or (cell, layer, head)
        number, layer, *head = torch.meshgrid(*map(torch.arange, each.shape), indexing="ij")
        example, column = rows.cpu()[number].flatten(), columns.cpu()[number].flatten()
        pairs = list(zip(example.tolist(), column.tolist(), strict=True))
        table: dict[str, Any] = {
            "example": example.numpy(),
            "layer": torch.tensor(self.layers)[layer].flatten().numpy(),
            "position": self.positions.cpu()[example, column].numpy(),
            "piece": [self.pieces[row][place] for row, place in pairs],
        }
        if head:
            table["head"] = head[0].flatten().numpy()
        table["value"] = each.flatten().double().cpu().numpy()
        return pd.DataFrame(table)

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k cells whose mean over the examples is largest, whichever way it pushes: one row each, strongest first.

        Positions are those of the padded rows; `n` says how many examples have such a cell.
        """
        keys = ["layer", "position", *(["head"] if self.values.dim() == 4 else [])]
        found: Any = self.frame().groupby(keys, as_index=False).agg(value=("value", "mean"), n=("value", "size"))
        order = found["value"].abs().sort_values(ascending=False, kind="stable").index
        return found.loc[order[:k]].reset_index(drop=True)

    def units(self, layer: int, position: int) -> Float[Tensor, "example unit"]:
        """The single neurons of one cell of `mlp_post`, NaN for examples that do not have it.

        Args:
            layer: number of the layer.
            position: in the padded row.

        Raises:
            InterventionError: at another site, or for a cell that was not asked for.
        """
        if self.neurons is None:
            raise InterventionError(f"single units of {self.site!r}", expected="site 'mlp_post'")
        here = self.positions == position
        if layer not in self.layers or not bool(here.any()):
            raise InterventionError(
                f"layer {layer}, position {position} was not estimated",
                expected=f"a layer of {list(self.layers)} and a position in .positions",
            )
        found = self.neurons.new_full((len(here), self.neurons.shape[-1]), math.nan)
        rows, columns = here.nonzero(as_tuple=True)
        found[rows] = self.neurons[rows, self.layers.index(layer), columns]
        return found

    def plot(self, ax: Any = None) -> Figure:
        """The mean over the examples as a heat map, layer by position (the sum of the heads at `z`).

        At `z` with a single position: layer by head.
        """
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(7.2, 3.6), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        if self.values.dim() == 4 and self.values.shape[2] == 1:
            means = self.values[:, :, 0].double().mean(dim=0).cpu().numpy()
            axes.set_xlabel("head")
            axes.set_xticks(range(means.shape[1]))
        else:
            means = self._by_position(axes)
        reach = float(abs(means[means == means]).max()) or 1.0
        drawn = axes.imshow(means, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        axes.invert_yaxis()
        axes.set_ylabel(f"layer ({self.site})")
        step = max(1, len(self.layers) // 12)
        axes.set_yticks(range(0, len(self.layers), step), list(map(str, self.layers[::step])))
        figure.colorbar(drawn, ax=axes, label="estimated change", pad=0.02)
        axes.set_title(f"{self.metric}, clean patched into corrupt", fontsize="medium")
        if ax is None:
            pyplot.close(figure)
        return figure

    def _by_position(self, axes: Any) -> Any:
        """The means by layer and position, and the labels of the positions."""
        import numpy as np

        places = sorted(set(self.positions[self.mask].tolist()))
        column = {place: number for number, place in enumerate(places)}
        table = self.frame().groupby(["example", "layer", "position"], as_index=False)["value"].sum()
        means = np.full((len(self.layers), len(places)), np.nan)
        averaged: Any = table.groupby(["layer", "position"])["value"].mean()
        for (layer, place), value in averaged.items():
            means[self.layers.index(layer), column[place]] = value
        texts, images = self._texts(places)
        words = [number for number, place in enumerate(places) if place not in images]
        if len(words) <= MOST_LABELS:
            axes.set_xticks(words, [texts[places[number]] for number in words], rotation=90, fontsize=7)
        else:
            step = -(-len(places) // 10)
            axes.set_xticks(range(0, len(places), step), list(map(str, places[::step])))
        named = f"position (image tokens: {min(images)} to {max(images)})" if images else "position"
        axes.set_xlabel(named)
        return means

    def _texts(self, places: list[int]) -> tuple[dict[int, str], set[int]]:
        """What stands at each position where all examples agree (else its number), and which are image tokens."""
        found: dict[int, set[str]] = {place: set() for place in places}
        images = set(self.positions[self.mask & self.pictured].tolist())
        for row, column in self.mask.nonzero().tolist():
            found[int(self.positions[row, column])].add(self.pieces[row][column])
        texts = {place: next(iter(words)) if len(words) == 1 else str(place) for place, words in found.items()}
        # "$" would begin a formula, and a line break would tear the label
        return {place: text.replace("$", r"\$").replace("\n", "\\n") for place, text in texts.items()}, images

    def __repr__(self) -> str:
        examples, depth, width = self.values.shape[:3]
        heads = f", heads {self.values.shape[3]}" if self.values.dim() == 4 else ""
        shape = f"examples {examples}, layers {depth}, positions {width}{heads}"
        runs = f"{self.metric} {float(self.corrupt.mean()):.3g} corrupt, {float(self.clean.mean()):.3g} clean"
        proof = "not audited: pass audit=32 to compare with exact patching" if self.audit is None else str(self.audit)
        return f"Attribution({self.site!r}: {shape}; {runs}; {proof})"


def attribution(
    vlm: VLM,
    clean: Batch,
    corrupt: Batch,
    site: str,
    metric: Metric = logit_difference,
    *,
    positions: Any = "all",
    layers: Any = "all",
    audit: int = 0,
    seed: int = 0,
) -> Attribution:
    """Estimate for every cell what patching it from the clean run into the corrupt run would add to the metric.

    The estimate is (clean - corrupt) . gradient of the metric, taken in the corrupt run: one forward pass of each batch
    and one backward pass, whatever the number of cells. It is exact only where the metric is linear in the cell. Large
    changes of the residual stream in early layers are where it fails, so look at the audit before you believe it.

    Args:
        vlm: the model.
        clean: encoded examples to take activations from, one for each of `corrupt`.
        corrupt: encoded examples to patch.
        site: "resid_pre", "resid_mid", "resid_post", "z" (each head by itself), "mlp_post", "attn_out" or "mlp_out".
        metric: a metric that can be differentiated. As in a sweep, its clean run is the one that is patched.
        positions: a role, a selector or positions in `corrupt`; in `clean` as `iv.ActivationPatch` finds them.
        layers: an int, a range, a list or "all".
        audit: how many cells to patch exactly as well, spread over the ranks of the estimates, half of them at the top.
        seed: of the choice of these cells and of the bootstrap.

    Returns:
        An `Attribution` with `.values`, `.frame()`, `.top(k)`, `.plot()` and `.audit`.

    Raises:
        InterventionError: for batches whose examples or positions do not go together, as `iv.ActivationPatch` says; a
            site without gradients; a metric without.

    Source:
        Nanda 2023, "Attribution patching: activation patching at industrial scale"; Kramar et al. 2024, "AtP*",
        section 2, for its failures and for comparing it with exact patching.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> pair = iv.data.digit_pairs(n=1)[0]
        >>> clean = vlm.encode(pair.clean.image, pair.clean.question)
        >>> corrupt = vlm.encode(pair.corrupt.image, pair.corrupt.question)
        >>> found = iv.attribution(vlm, clean, corrupt, "resid_post", layers=[1, 2])
        >>> found.values.shape[:2]
        torch.Size([1, 2])
    """
    refuse_without_gradient(site)
    if audit < 0:
        raise InterventionError(f"audit={audit}", expected="a number of cells, or 0 for none")
    name = getattr(metric, "__name__", type(metric).__name__)
    patch = ActivationPatch(site, layers, positions, source=vlm.capture(clean, site, layers=layers))
    (place,) = vlm._engine.resolve(corrupt, [patch])
    compared: list[MetricContext] = []

    def score(logits: Tensor) -> Tensor:
        compared.append(MetricContext(clean_logits=logits.detach(), batch=corrupt, tokenizer=vlm.tokenizer))
        return metric(logits, compared[0])

    run = gradients(vlm._engine, corrupt, site, place.layers, score, f"metric {name!r}")
    index, mask = padded_positions(place.selected)
    values, neurons = _products(place, run, index, mask)
    found = Attribution(
        site=site, metric=name, layers=place.layers, values=values, positions=index, mask=mask,
        pieces=tuple(
            tuple(tokens.pieces[at] if at >= 0 else "" for at in row)
            for tokens, row in zip(corrupt.tokens, index.tolist(), strict=True)
        ),
        pictured=torch.stack([tokens.image_index >= 0 for tokens in corrupt.tokens]).to(index.device).gather(
            1, index.clamp(min=0)
        ) & mask,
        clean=metric(vlm.run(clean).logits, compared[0]), corrupt=run.scores, neurons=neurons,
    )  # fmt: skip
    if not audit:
        return found
    return replace(found, audit=audited(vlm, corrupt, patch, place.layers, values, index, metric, audit, seed))


def _products(
    place: ResolvedPlace, run: Gradients, index: Tensor, mask: Tensor
) -> tuple[Float[Tensor, "example layer pos ..."], Float[Tensor, "example layer pos unit"] | None]:
    """Change times slope, summed over the units of each cell; at `mlp_post` unit by unit too. NaN outside the mask."""
    indices = Copies(index.clamp(min=0))
    cells, units = [], []
    for layer in place.layers:
        value = run.values[layer]  # on its layer's device
        at = indices.on(value.device)
        example = torch.arange(len(at), device=at.device)[:, None]
        change = full_precision(place.edit(value, layer)[example, at]) - full_precision(value[example, at])
        product = change * full_precision(run.slopes[layer][example, at])
        product = product.to(mask.device).masked_fill(~mask.view(*mask.shape, *[1] * (product.dim() - 2)), math.nan)
        cells.append(product.sum(dim=-1))
        if place.site.name == "mlp_post":
            units.append(product)
    return torch.stack(cells, dim=1), torch.stack(units, dim=1) if units else None
