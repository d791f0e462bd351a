"""Sweeps: the numbers of one-by-one runs, a tidy table, a figure."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import interp_vlm as iv
from interp_vlm.errors import InterventionError
from tests.engine.settings import QUESTIONS, Setting, pictures

SETTING = Setting("llava", bits=32)


def yes_no(logits, context):
    """A metric of one's own."""
    yes, no = (context.tokenizer.convert_tokens_to_ids(word) for word in ("a", "b"))
    return logits[:, yes] - logits[:, no]


@pytest.fixture(scope="module")
def batches():
    return [SETTING.batch, SETTING.vlm.encode(pictures(5)[:2], list(QUESTIONS[:2]))]


KNOCKOUT = iv.AttentionKnockout(queries="last", keys="image")
MANY = iv.vary(KNOCKOUT, layers=iv.windows(3, 2), keys=["image", "question"])


@pytest.mark.parametrize(
    "metric", [iv.logit_difference, iv.answer_logprob, iv.flipped, yes_no], ids=lambda metric: metric.__name__
)
def test_values_are_those_of_single_runs(batches, metric):
    vlm = SETTING.vlm
    done = []
    sweep = iv.sweep(vlm, batches, MANY, metric, progress=done.append)
    assert sweep.values.shape == (6, 5)
    assert sweep.baseline.shape == (5,)
    assert sum(done) == 30
    from interp_vlm.readouts.metrics import MetricContext

    column = 0
    for batch in batches:
        clean = vlm.run(batch)
        context = MetricContext(clean_logits=clean.logits, batch=batch, tokenizer=vlm.tokenizer)
        assert torch.equal(sweep.baseline[column : column + len(batch)], metric(clean.logits, context))
        for number, knockout in enumerate(MANY):
            run = vlm.run(batch, knockout)
            wanted = metric(run.logits, context)
            torch.testing.assert_close(sweep.values[number, column : column + len(batch)], wanted, rtol=0, atol=1e-5)
            exact = [(each.changed, each.mass_left, each.plan) for each in sweep.receipts[number]]
            assert (run.receipts[0].changed, run.receipts[0].mass_left, run.receipts[0].plan) in exact
        column += len(batch)


def test_the_frame_is_tidy(batches):
    sweep = SETTING.vlm.sweep(batches, MANY)
    frame = sweep.frame()
    assert list(frame.columns) == ["intervention", "keys", "layers", "example", sweep.metric, "baseline"]
    assert len(frame) == 30
    assert not frame.isna().any().any()
    assert not frame.duplicated(["intervention", "example"]).any()
    for _, row in frame.iterrows():
        value = sweep.values[row["intervention"], row["example"]]
        assert row[sweep.metric] == float(value)
        assert row["baseline"] == float(sweep.baseline[row["example"]])
        knockout = MANY[row["intervention"]]
        assert row["keys"] == knockout.keys
        ends = sorted({knockout.layers[0], knockout.layers[-1]})
        assert row["layers"] == "-".join(map(str, ends))
    assert sweep.varied == ["keys", "layers"]
    assert len(sweep) == 6
    assert repr(sweep) == f"Sweep(6 interventions x 5 examples of {sweep.metric} over keys, layers)"
    assert "<table" in sweep._repr_html_()


@pytest.mark.parametrize(
    "many",
    [
        [KNOCKOUT],
        iv.vary(KNOCKOUT, layers=[0, 1, 2]),
        MANY,
        [[KNOCKOUT, iv.Ablation("z", layers=0, to="zero")], KNOCKOUT],
    ],
    ids=["one", "a line", "a heat map", "lists"],
)
def test_plots_are_figures(many, tmp_path):
    sweep = SETTING.vlm.sweep(SETTING.batch, many)
    figure = sweep.plot()
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 0
    own = Figure()
    assert sweep.plot(ax=own.add_subplot()) is own
    values = [number for axes in figure.axes for line in axes.lines for number in line.get_ydata()]
    images = [number for axes in figure.axes for image in axes.images for number in image.get_array().ravel()]
    drawn = values + images
    for mean in sweep.values.double().mean(1):
        assert np.isclose(drawn, float(mean)).any()


def test_a_figure_has_two_axes():
    sweep = SETTING.vlm.sweep(SETTING.batch, iv.vary(KNOCKOUT, layers=[0, 1], keys=["image", "question"], heads=[0, 1]))
    with pytest.raises(InterventionError, match="the sweep varies keys, layers, heads; expected at most two fields"):
        sweep.plot()
    assert len(sweep.frame()) == 24


def test_lists_run_together():
    pair = [KNOCKOUT, iv.Ablation("mlp_out", layers=1, to="zero")]
    sweep = SETTING.vlm.sweep(SETTING.batch, [pair, KNOCKOUT])
    assert sweep.interventions == (tuple(pair), (KNOCKOUT,))
    assert [len(receipts) for receipts in sweep.receipts] == [2, 1]
    together = SETTING.vlm.sweep(SETTING.batch, [pair[::-1]])
    assert torch.equal(together.values[0], sweep.values[0])


def test_of_nothing():
    sweep = SETTING.vlm.sweep(SETTING.batch, [])
    assert sweep.values.shape == (0, 3)
    assert len(sweep.frame()) == 0


def test_plans_say_what_they_do():
    plan = SETTING.vlm.plan(SETTING.batch, KNOCKOUT, engine="full")
    rows = SETTING.batch.inputs["input_ids"].numel()
    assert (plan.name, plan.rows, plan.layers) == ("full", rows, 3)
    working = f"about {plan.working / 2**20:.1f} MiB in a pass"
    assert plan.explain() == f"full: {rows} token rows through 3 layers, {working}, because it was asked for"
    for attempt in (SETTING.vlm.plan, SETTING.vlm.run):
        with pytest.raises(InterventionError, match="engine='fast'; expected 'auto' or 'last_row'"):
            attempt(SETTING.batch, KNOCKOUT, engine="fast")
