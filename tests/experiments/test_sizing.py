"""The tables of docs/scale.md: sizes, memory and passes against slow and obvious references, and the page."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

import interp_vlm as iv
from experiments.benchmarks.engine import peak
from experiments.sizing import cost, memory
from experiments.sizing.__main__ import filled, main
from experiments.sizing.shapes import MODELS, Zeros, asked, narrow, weightless
from interp_vlm.data import digit_scenes
from interp_vlm.study.experiment import Bench
from interp_vlm.study.experiments import EXPERIMENTS
from interp_vlm.study.knockout import knockouts
from interp_vlm.study.neuron_sets import chosen
from interp_vlm.study.settings import Settings

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
PARAMETERS = {"llava": 7_063_427_072, "paligemma": 2_923_466_480, "qwen2_vl": 8_291_375_616}
"""As the hub counts them."""
SHALLOW = {
    family: replace(
        each,
        small=({**each.small[0], "num_hidden_layers": 4}, each.small[1]),
        text={**each.text, **each.small[0], "num_hidden_layers": 4, "vocab_size": 100},
        tower={**each.tower, **each.small[1]},
    )
    for family, each in MODELS.items()
}  # fmt: skip
INTERVENTIONS = {
    "knockout of the last row": iv.AttentionKnockout("last", "image", layers=[1, 2]),
    "knockout of the question": iv.AttentionKnockout("question", "image", layers=[1], heads=[0]),
    "bypass": iv.Ablation("mlp_out", layers=[2], to="zero"),
    "masked": iv.Ablation("projector_out", positions="image", to="zero"),
    "none": (),
}


def block(name):
    """The cells of a table on the page, line by line, without its header."""
    found = re.search(rf"<!-- {name}: .*?-->\n(.*?)\n<!-- end of {name} -->", PAGE, re.DOTALL)
    assert found, f"the page has no table {name}"
    return cells(found[1])


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


# models without weights


@pytest.mark.parametrize("family", MODELS)
def test_published_sizes_are_the_hubs_and_take_no_memory(family):
    model = weightless(MODELS[family]).model
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[family]
    assert sum(weight.untyped_storage().nbytes() for weight in model.parameters()) < 4096
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("family", MODELS)
def test_products_with_zeros_are_what_computing_gives(family):
    vlm = weightless(SHALLOW[family], torch.float32)
    batch = asked(vlm, SHALLOW[family])
    computed = vlm.model(**batch.inputs).logits
    with Zeros():
        assert torch.equal(vlm.model(**batch.inputs).logits, computed)
        other = narrow(SHALLOW[family])  # weights that are numbers are used
        assert other.model(**asked(other, SHALLOW[family]).inputs).logits.abs().max() > 1e-3


@pytest.mark.parametrize("family", MODELS)
def test_plans_do_not_depend_on_the_numbers_in_the_weights(family):
    published = SHALLOW[family]
    random = narrow(published)
    zero = weightless(replace(published, text={**published.text, "vocab_size": random.anatomy.d_vocab}), torch.float32)
    assert zero.anatomy == random.anatomy
    for name, intervention in INTERVENTIONS.items():
        with Zeros():
            found = zero.plan(asked(zero, published), intervention)
        assert found == random.plan(asked(random, published), intervention), name


# memory


@pytest.mark.parametrize("family", MODELS)
def test_memory_is_what_the_kept_tensors_hold(family):
    vlm = narrow(SHALLOW[family])
    for n in (1, 3):
        batch = asked(vlm, SHALLOW[family], n)
        plan = vlm.plan(batch, INTERVENTIONS["bypass"])
        trunk: Any = vlm._engine.clean.of(batch).trunk
        kept = [*trunk.residuals.values(), *trunk.keys, *trunk.values]
        # whole storages: a kept view of something larger would show
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in kept}
        assert plan.memory == sum(storages.values())
        sizes = [plan.memory, plan.working]
        one = sizes if n == 1 else one
        assert sizes == [n * size for size in one], "memory grows with the batch"
        vlm.run(batch, INTERVENTIONS["bypass"])  # a run keeps the other layers' residuals as well
        assert vlm.plan(batch, INTERVENTIONS["bypass"]).memory > plan.memory


def test_the_estimate_of_a_pass_is_near_what_is_measured():
    """At a published size: on tiny models what is left out of the estimate is not small."""
    published, knockout = MODELS["paligemma"], iv.AttentionKnockout("question", "image")
    with Zeros():
        vlm = weightless(published)
        batch = asked(vlm, published)
        vlm.run(batch, knockout)
        measured = peak(lambda: vlm.run(batch, knockout))
        plan = vlm.plan(batch, knockout)
    assert plan.working == pytest.approx(measured, rel=0.05)
    assert f"about {plan.working / 2**20:.1f} MiB in a pass" in plan.explain()


def test_the_page_has_the_memory_that_plans_say_now():
    page = block("memory")
    wanted = [row for row in page if row[0].startswith(MODELS["paligemma"].name)]
    start = page.index(wanted[0])
    made = cells(memory.table(list(memory.needed("paligemma"))))
    measured = 5
    for found, row in zip(made, page[start:], strict=False):
        assert found[:measured] + found[measured + 1 :] == row[:measured] + row[measured + 1 :]


def test_the_estimates_on_the_page_are_near_what_was_measured():
    for *_, name, plan, _, working, measured, _, _, _ in block("memory"):
        gap = abs(float(working) - float(measured))
        assert gap <= max(2.0, 0.1 * float(measured)), (name, plan)


def test_the_largest_batch_fits_and_one_more_does_not():
    row = memory.Needed("m", "", "suffix", 600, 13 * 2**30, kept=300 * 2**20, working=50 * 2**20, clean=70 * 2**20)
    n = row.batch(40)
    for batch, fits in ((n, True), (n + 1, False)):
        free = 40 * 10**9 - memory.SPARE - row.weights - batch * (row.kept + row.clean)
        assert (batch * row.kept <= free / 4) == fits
    assert replace(row, plan="full", kept=0).batch(40) > n
    assert row.batch(10) == 0


# passes


@pytest.mark.parametrize("family", MODELS)
def test_counted_passes_are_the_sum_of_the_plans(family):
    published = SHALLOW[family]
    bench = cost.bench(published)
    vlm, (question,) = bench.vlm, bench.reference
    batch = vlm.encode(question.image, question.question)
    whole = batch.inputs["input_ids"].numel() * vlm.anatomy.n_layers
    plans = [vlm.plan(batch, knockout) for knockout in knockouts(bench).values()]
    # the answers without interventions, and once more to keep what cones start from
    wanted = 2 + sum(plan.rows * plan.layers for plan in plans) / whole
    assert cost.passes(EXPERIMENTS["knockout"], bench) == pytest.approx(wanted)
    assert cost.passes(EXPERIMENTS["knockout"], cost.bench(published, cost.Whole)) == 1 + len(plans)


def test_the_page_has_the_passes_that_are_counted_now():
    rows = {row[0]: row for row in block("cost")}
    column = 2 + list(MODELS).index("paligemma")
    for found in cost.costs("paligemma", ["accuracy", "bypass"]):
        assert rows[found.experiment][column] == f"{found.without:.3g} → {found.with_engine:.3g}"
    n = MODELS["paligemma"].text["num_hidden_layers"]
    assert found.without == 1 + 2 * n
    assert found.with_engine == pytest.approx(2 + 2 * sum(range(1, n + 1)) / n)


def test_the_totals_on_the_page_are_those_of_its_rows():
    *rows, last = [[int(cell.replace(",", "")) for cell in row[-3:-1]] for row in block("cost")]
    np.testing.assert_allclose(np.sum(rows, axis=0), last, atol=len(rows))


def test_what_is_set_aside_is_run_as_often_as_is_said():
    vlm = iv.load("testbed:llava")
    scenes = digit_scenes("validation", 60, 3, "hard", kinds=["colour"])
    lengths = [len(vlm.encode(scene.image, scene.question).tokens[0].all) for scene in scenes]
    fitting = tuple(scene for scene, length in zip(scenes, lengths, strict=True) if length == lengths[0])
    settings = Settings(models=("testbed:llava",), batch_size=10)
    vlm.run(vlm.encode(scenes[0].image, scenes[0].question))  # what the engine does once for a model
    with cost.counted(vlm) as rows:
        found = chosen(Bench(vlm, settings, fitting=fitting))
    assert not found.reason
    made = replace(cost.material(20, 10), fitting=fitting, reference=())
    assert sum(rows) / (lengths[0] * vlm.anatomy.n_layers) == cost.set_aside(made, settings)


# the command


def test_only_the_marked_part_of_a_page_is_made_anew():
    page = "a\n<!-- cost: made by python -m experiments.sizing --write -->\nold\n<!-- end of cost -->\nb\n"
    assert filled(page, {"cost": "new"}) == page.replace("old", "new")
    with pytest.raises(ValueError, match="no table between"):
        filled(page, {"memory": "new"})


def test_the_command_refuses_what_it_does_not_know():
    app = typer.Typer()
    app.command()(main)
    wrong = {
        "expected some of llava": ["--models", "gpt"],
        "memory or cost": ["--only", "time"],
        "the page has all models": ["--models", "llava", "--write"],
    }
    for words, arguments in wrong.items():
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2
        assert words in " ".join(done.output.replace("│", " ").split())
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    assert "Example" in shown.output
