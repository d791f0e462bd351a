"""What a layerwise probe found: curves with intervals, scores of every example, and the baselines beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from interp_vlm.errors import DataError
from interp_vlm.probes import measures
from interp_vlm.probes.logistic import C_PATH
from interp_vlm.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.probes.monitor import ReliabilityMonitor
    from interp_vlm.vlm import VLM

__all__ = ["Baseline", "ProbeReport"]


@dataclass(frozen=True, eq=False)
class Baseline:
    """A signal that is not the probe, measured on the same examples.

    Attributes:
        name: for example "answer only".
        auroc: its AUROC.
        how: how its scores were made, in a few words.
        scores: one an example; out-of-fold where something was fitted.
    """

    name: str
    auroc: Estimate
    how: str
    scores: Float[np.ndarray, " example"]


@dataclass(frozen=True, eq=False)
class ProbeReport:
    """Layerwise probes under nested cross-validation grouped by picture.

    Attributes:
        layers: the layers probed.
        auroc: per layer, with its `p` (largest AUROC over layers, permuted labels) when permutations were asked for.
        average_precision: per layer; its chance level is the share of right answers.
        brier: per layer, mean squared error of the probability.
        headline: AUROC when inner folds choose the layer too: the number to quote.
        headline_scores: logits of each example from the layer chosen for its fold.
        chosen_layers: the layer chosen in each outer fold.
        peak: the layer with the largest AUROC, with the bootstrap interval of that layer. The AUROC at the peak is the
            best of many and flatters; quote `headline`.
        onset: the first layer at least 90 % of the way from 0.5 to the peak's AUROC, with its interval.
        baselines: output confidence, answer only, question only, answer length (those given), shuffled labels, control.
        scores: out-of-fold logits.
        labels: True where the answer is right.
        groups: number of each example's picture.
        folds: outer fold in which each example was tested.
        C: chosen in each layer and outer fold; NaN for the MLP, which has none.
        probe: "l2", "l1" or "mlp".
        site: where the activations were read.
        position: "before_answer" or "after_answer".
        model: the model's name, empty when unknown.
        control_values: AUROC of each layer on the control task, None without one.
        notes: what a reader must know before believing the numbers.
        seed: of folds, permutations and bootstrap.
    """

    layers: tuple[int, ...]
    auroc: tuple[Estimate, ...]
    average_precision: tuple[Estimate, ...]
    brier: tuple[Estimate, ...]
    headline: Estimate
    headline_scores: Float[np.ndarray, " example"]
    chosen_layers: tuple[int, ...]
    peak: Estimate
    onset: Estimate
    baselines: tuple[Baseline, ...]
    scores: Float[np.ndarray, "layer example"]
    labels: Bool[np.ndarray, " example"]
    groups: Int[np.ndarray, " example"]
    folds: Int[np.ndarray, " example"]
    C: Float[np.ndarray, "layer fold"]
    probe: str
    site: str
    position: str
    model: str
    control_values: Float[np.ndarray, " layer"] | None
    notes: tuple[str, ...]
    seed: int

    @property
    def saw_answer(self) -> bool:
        """Whether the activations were read after the first answer token."""
        return self.position == "after_answer"

    @property
    def selectivity(self) -> Float[np.ndarray, " layer"] | None:
        """AUROC on the real labels minus AUROC on the control task, per layer (Hewitt and Liang 2019)."""
        return None if self.control_values is None else self._values("auroc") - self.control_values

    def baseline(self, name: str) -> Baseline:
        """One baseline by its name.

        Raises:
            DataError: when it was not measured.
        """
        for found in self.baselines:
            if found.name == name:
                return found
        raise DataError(
            f"no baseline {name!r}",
            expected="one of " + ", ".join(repr(found.name) for found in self.baselines),
            remedy="give probe_layers what it needs: confidence, answers, questions, answer_lengths or types",
        )

    def layer_scores(self, layer: int) -> Float[np.ndarray, " example"]:
        """Out-of-fold logits of one layer.

        Raises:
            DataError: for a layer that was not probed.
        """
        if layer not in self.layers:
            raise DataError(
                f"layer {layer} was not probed", expected=f"one of {list(self.layers)}", remedy="probe it too"
            )
        return self.scores[self.layers.index(layer)]

    def frame(self) -> pd.DataFrame:
        """A tidy table with one row a layer."""
        import pandas as pd

        columns: dict[str, Any] = {"layer": self.layers}
        for name in ("auroc", "average_precision", "brier"):
            estimates: tuple[Estimate, ...] = getattr(self, name)
            columns[name] = [estimate.value for estimate in estimates]
            columns[f"{name}_low"] = [estimate.low for estimate in estimates]
            columns[f"{name}_high"] = [estimate.high for estimate in estimates]
        if self.auroc[0].p is not None:
            columns["p"] = [estimate.p for estimate in self.auroc]
        if self.control_values is not None:
            columns["control_auroc"], columns["selectivity"] = self.control_values, self.selectivity
        columns["median_C"] = np.median(self.C, axis=1)
        columns["site"], columns["position"] = self.site, self.position
        return pd.DataFrame(columns)

    def baseline_frame(self) -> pd.DataFrame:
        """A tidy table with the headline and every baseline."""
        import pandas as pd

        headline = ("probe, layer chosen on inner folds", self.headline, "")
        rows = [headline, *((found.name, found.auroc, found.how) for found in self.baselines)]
        names = ("signal", "auroc", "low", "high", "how")
        return pd.DataFrame([(n, e.value, e.low, e.high, how) for n, e, how in rows], columns=pd.Index(names))

    def score_frame(self) -> pd.DataFrame:
        """A tidy table with one row an example and layer: the out-of-fold logit."""
        import pandas as pd

        n, count = len(self.labels), len(self.layers)
        return pd.DataFrame(
            {
                "example": np.tile(np.arange(n), count),
                "layer": np.repeat(self.layers, n),
                "group": np.tile(self.groups, count),
                "fold": np.tile(self.folds, count),
                "label": np.tile(self.labels, count),
                "logit": self.scores.ravel(),
            }
        )

    def reliability(self, layer: int | None = None, bins: int = 10) -> pd.DataFrame:
        """Predicted against observed frequency, of one layer or (by default) of the headline's scores."""
        import pandas as pd
        from scipy.special import expit

        scores = self.headline_scores if layer is None else self.layer_scores(layer)
        return pd.DataFrame(measures.reliability(expit(scores), self.labels, bins))

    def monitor(
        self,
        activations: Any,
        vlm: VLM,
        *,
        layer: int | None = None,
        kinds: Sequence[str] | None = None,
        choices: Sequence[str] | None = None,
        C: Sequence[float] = C_PATH,
        standardise: bool = True,
    ) -> ReliabilityMonitor:
        """A monitor to deploy: one layer's probe, fitted on all examples, its scores calibrated to probabilities.

        C is chosen over the report's outer folds, by pictures; the sigmoid that calibrates is fitted on the report's
        scores of unseen pictures (Platt 1999). One fold is fitted again to make sure that these are the activations
        probed.

        Args:
            activations: what the report was made from.
            vlm: the model that they were captured from, at the last prompt token.
            layer: by default the one that most inner folds chose.
            kinds: (n,) kinds of question, kept for the record.
            choices: closed answers, if the labels are about those (as for `vlm.run`).
            C: as for `probe_layers`.
            standardise: likewise.

        Raises:
            DataError: a probe that has seen the answer (it would need a second forward step), another probe than "l2",
                no site, other activations than those probed.
            ModelError: another model than the one probed.
        """
        from interp_vlm.probes.monitor_fit import fit_monitor

        options: dict[str, Any] = {"layer": layer, "kinds": kinds, "choices": choices}
        return fit_monitor(self, activations, vlm, C=C, standardise=standardise, **options)

    def plot(self, ax: Any = None) -> Figure:
        """AUROC by layer with its intervals, the onset, and the baselines as lines."""
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=(6.4, 3.6), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        values = self._values("auroc")
        low, high = (np.array([getattr(estimate, end) for estimate in self.auroc]) for end in ("low", "high"))
        axes.plot(self.layers, values, marker="o", markersize=4, label="probe")
        axes.fill_between(self.layers, low, high, alpha=0.2, linewidth=0)
        axes.axhline(0.5, color="0.6", linewidth=0.8)
        for number, found in enumerate(self.baselines):
            axes.axhline(found.auroc.value, color=f"C{number + 1}", linestyle="--", linewidth=1, label=found.name)
        if np.isfinite(self.onset.value):
            axes.axvline(self.onset.value, color="0.4", linestyle=":", linewidth=1, label="onset")
        axes.set(xlabel=f"layer ({self.site or 'activations'}, {self.position.replace('_', ' ')})", ylabel="AUROC")
        axes.legend(frameon=False, fontsize="small")
        if ax is None:
            pyplot.close(figure)
        return figure

    def _values(self, name: str) -> np.ndarray:
        return np.array([estimate.value for estimate in getattr(self, name)])

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        where = f"{self.site or 'activations'}, {self.position.replace('_', ' ')}"
        return (
            f"ProbeReport({self.probe}, {len(self.layers)} layers of {where}: AUROC {self.headline}, "
            f"peak at layer {self.peak}, onset at {self.onset}, "
            f"n={self.headline.n} in {self.headline.groups} groups{notes})"
        )

    def _repr_html_(self) -> str:
        from html import escape

        tables = (
            table.to_html(index=False, float_format="{:.3g}".format, border=0)
            for table in (self.frame(), self.baseline_frame())
        )
        return f"<p>{escape(repr(self))}</p>{''.join(tables)}"
