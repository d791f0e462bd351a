"""What a study computes, in forward passes of the decoder: counted in its own code, with the engine and without.

The code of every experiment is run on one question with a narrow model that is as deep as the published one and has as
long a prompt. A hook on each decoder layer counts the rows that it is called with. A forward pass is all rows of the
prompt through all layers.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

import interp_vlm as iv
from experiments.sizing.shapes import MODELS, PICTURE, Published, narrow
from interp_vlm.data.example import Example
from interp_vlm.stats import Estimate
from interp_vlm.study import neurons
from interp_vlm.study.experiment import Bench, Experiment
from interp_vlm.study.experiments import EXPERIMENTS
from interp_vlm.study.material import Material, Shard, load_material
from interp_vlm.study.neuron_sets import DEPTH, Chosen
from interp_vlm.study.settings import Settings

__all__ = [
    "PICTURES",
    "QUESTIONS",
    "Cost",
    "Whole",
    "bench",
    "costs",
    "counted",
    "material",
    "passes",
    "set_aside",
    "table",
]

QUESTIONS, PICTURES = 9000, 500
"""POPE on COCO: three sorts of negatives, each with 3,000 questions about the same 500 pictures."""


@dataclass(frozen=True)
class Cost:
    """What an experiment computes for one question.

    Attributes:
        model: its name.
        experiment: its name.
        with_engine: forward passes, as the study runs.
        without: the same with every intervention as a run of the whole model.
    """

    model: str
    experiment: str
    with_engine: float
    without: float


class Whole(iv.VLM):
    """A model that runs every intervention as a whole forward pass, as a tool without plans would."""

    def run(self, batch: Any, interventions: Any = (), **options: Any) -> Any:
        return super().run(batch, interventions, **{"engine": "full", **options})


@contextmanager
def counted(vlm: iv.VLM) -> Iterator[list[int]]:
    """The rows of each call of a decoder layer, while the block runs."""
    rows: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows.append(hidden.shape[0] * hidden.shape[1])

    layers: Any = vlm.model.get_submodule(vlm.anatomy.layers)
    handles = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in layers]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def material(questions: int = QUESTIONS, pictures: int = PICTURES) -> Material:
    """What a study makes of a file with so many questions: which serve interventions, and which are set aside."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pictures):
            Image.new("RGB", (8, 8)).save(Path(folder) / f"{number}.png")
        with (Path(folder) / "pope.json").open("w") as file:
            for number in range(questions):
                row = {"question_id": number, "image": f"{number % pictures}.png", "text": "is it ?", "label": "yes"}
                file.write(json.dumps(row) + "\n")
        return load_material(Settings(data=f"pope:{folder}/pope.json?images={folder}"))


def costs(family: str, experiments: Sequence[str] = ()) -> Iterator[Cost]:
    """What experiments compute for one question about one picture; by default all that POPE has material for."""
    published, few = MODELS[family], material(20, 10)
    benches = [bench(published, kind) for kind in (iv.VLM, Whole)]
    for name in experiments or [name for name, each in EXPERIMENTS.items() if each.material(few)]:
        yield Cost(published.name, name, *(passes(EXPERIMENTS[name], each) for each in benches))


def passes(experiment: Experiment, bench: Bench) -> float:
    """Forward passes of the decoder that an experiment makes for the bench's own question."""
    vlm, (question,) = bench.vlm, bench.reference
    whole = len(vlm.encode(question.image, question.question).tokens[0].all) * vlm.anatomy.n_layers
    with counted(vlm) as rows, patch.object(neurons, "chosen", _as_published):
        experiment.measure(bench, Shard(0, "as given", (question,)))
    return sum(rows) / whole


def bench(published: Published, kind: type[iv.VLM] = iv.VLM) -> Bench:
    """A narrow model that has done once what is done once for each model."""
    vlm = narrow(published, kind)
    noise = np.random.default_rng(0).integers(0, 256, (*PICTURE[::-1], 3), dtype=np.uint8)
    question = Example("0", Image.fromarray(noise), published.question, "yes")
    batch = vlm.encode(question.image, question.question)
    vlm.run(batch, iv.Ablation("mlp_out", layers=[0], to="zero"))
    vlm.run(batch, iv.Ablation("projector_out", positions="image", to="zero"))
    made = Bench(vlm, Settings(models=(published.family,)), reference=(question,))
    _ = made.image_mean
    return made


def _as_published(bench: Bench) -> Chosen:
    """As if the probe of correctness had been best at two thirds of the depth, as in the studied work.

    Its neurons take part in no count of rows.
    """
    a = bench.vlm.anatomy
    depth, flat = round(DEPTH * (a.n_layers - 1)), torch.zeros(a.n_layers, a.d_model)
    unknown = Estimate(math.nan, math.nan, math.nan, 0, 0, 0.95, "")
    return Chosen(
        depth, depth, (unknown,) * a.n_layers, {depth: np.arange(a.d_model)}, {}, {depth: flat[:1]}, flat, flat,
        np.ones(flat.shape), flat[0], 1,
    )  # fmt: skip


def set_aside(found: Material, settings: Settings) -> int:
    """Forward passes over what is set aside, once for each model: the mean image token, and which neurons to ablate."""
    many = len(found.fitting)
    return len(found.reference) + 2 * many + min(many, 2 * settings.batch_size)


def table(found: Sequence[Cost], made: Material) -> str:
    """Forward passes of a question and of the whole study, by experiment, as Markdown."""
    models = list(dict.fromkeys(cost.model for cost in found))
    by = {(cost.experiment, cost.model): cost for cost in found}
    lines = [["experiment", "questions", *models, "without the engine", "with it", "times fewer"]]
    lines.append(["---", *["---:"] * (len(models) + 4)])
    sums = np.zeros(2)
    for name in dict.fromkeys(cost.experiment for cost in found):
        n = sum(map(len, EXPERIMENTS[name].material(made).values()))
        each = [by[name, model] for model in models]
        whole = n * np.array([[cost.without, cost.with_engine] for cost in each]).sum(axis=0)
        sums += whole
        cells = [f"{cost.without:.3g} → {cost.with_engine:.3g}" for cost in each]
        lines.append([name, f"{n:,}", *cells, *_compared(whole)])
    aside = set_aside(made, Settings())
    sums += len(models) * aside
    lines.append(
        ["once for each model", "", *[f"{aside:,}"] * len(models), *_compared(np.full(2, len(models) * aside))]
    )
    lines.append(["**all**", "", *[""] * len(models), *_compared(sums)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _compared(whole: np.ndarray) -> list[str]:
    return [*(f"{round(number):,}" for number in whole), f"{whole[0] / whole[1]:.1f}"]
