"""The margin experiment against the raw Hugging Face model with plain hooks, and slow bootstraps of its summaries."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import interp_vlm as iv
from interp_vlm.data.digits import digit_scenes
from interp_vlm.models.loading import load
from interp_vlm.study import margin
from interp_vlm.study.experiment import Bench
from interp_vlm.study.margin import MARGIN, last_layers, middle_layers
from interp_vlm.study.material import Shard
from interp_vlm.study.sections.margin import section
from interp_vlm.study.settings import EMBEDDED, Settings
from interp_vlm.study.tables import COLUMNS, where
from interp_vlm.testbed.build import question_inputs

SETTINGS = Settings(limit=24, batch_size=16)
EXAMPLES = tuple(digit_scenes(n=24, questions_per_image=3))


@pytest.fixture(scope="module", params=EMBEDDED)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def bench(model):
    return Bench(iv.load(model), SETTINGS)


@pytest.fixture(scope="module")
def rows(bench):
    return MARGIN.measure(bench, Shard(0, "standard", EXAMPLES))


@pytest.fixture(scope="module")
def table(rows):
    return MARGIN.summarise(rows, SETTINGS)


@pytest.fixture(scope="module")
def raw(model):
    return load(model)


def _layers(raw, example):
    """What enters and leaves each decoder layer, by hooks on the model of Hugging Face alone, and its logits."""
    model, processor = raw
    inputs = question_inputs(processor, example.image, example.question)
    decoder, seen, handles = model.model.language_model, [], []
    for layer in decoder.layers:
        handles.append(
            layer.register_forward_hook(
                lambda _, args, kwargs, out: seen.append(
                    (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)
                ),
                with_kwargs=True,
            )
        )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    for handle in handles:
        handle.remove()
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
    with torch.no_grad():
        read = [model.lm_head(decoder.norm(after[0, -1])) for _, after in seen]
    return [(before[0, image], after[0, image]) for before, after in seen], read, logits, processor.tokenizer


def test_margins_and_updates_are_those_of_the_models_own_layers(raw, rows):
    for example in EXAMPLES[:4]:
        own = rows[rows["example"] == example.id].set_index("layer")
        image, read, final, tokenizer = _layers(raw, example)
        torch.testing.assert_close(read[-1], final)
        text = [tokenizer.decode([token]).strip().lower() for token in range(len(final))]
        for layer, (logits, (before, after)) in enumerate(zip(read, image, strict=True)):
            scores = {}
            for token, word in enumerate(text):
                scores.setdefault(word, []).append(float(logits[token]))
            right = np.logaddexp.reduce(scores[example.answer])
            rival = text[max((t for t in range(len(text)) if text[t] != example.answer), key=lambda t: logits[t])]
            assert own.loc[layer, "margin"] == pytest.approx(right - np.logaddexp.reduce(scores[rival]), abs=2e-3)
            step, length = (after - before).norm(dim=-1), before.norm(dim=-1)
            assert own.loc[layer, "absolute_update"] == pytest.approx(float(step.mean()), rel=1e-3)
            assert own.loc[layer, "relative_update"] == pytest.approx(float((step / length).mean()), rel=1e-3)


def test_the_parts_add_up_to_the_margin(rows, table):
    for _, own in rows.groupby("example"):
        once, last = own.iloc[0], own.sort_values("layer").iloc[-1]
        layers = own[["attention", "mlp", "between"]].to_numpy().sum()
        assert layers + once["embedding"] + once["constant"] + once["rounding"] == pytest.approx(once["total"])
        assert abs(once["rounding"]) < 1e-3
        assert last["margin"] == pytest.approx(once["total"], abs=1e-3)
    for kind in set(table["kind"]):
        parts = where(table, kind=kind, quantity="contribution")
        total = where(parts, part="total")["value"].iloc[0]
        assert parts[parts["part"] != "total"]["value"].sum() == pytest.approx(total, abs=1e-3)
        shares = where(table, kind=kind, quantity="share of the margin").set_index("part")["value"]
        assert shares.sum() == pytest.approx(100)
        sums = parts.groupby("part")["value"].sum()
        assert shares["mlp"] == pytest.approx(100 * sums["mlp"] / (sums["mlp"] + sums["attention"]))


def test_updates_do_not_depend_on_how_many_are_held_at_once(bench, monkeypatch):
    batch = bench.vlm.encode([e.image for e in EXAMPLES[:5]], [e.question for e in EXAMPLES[:5]])
    whole = margin._updates(bench.vlm, batch)
    monkeypatch.setattr(margin, "_BYTES", 1)
    assert np.allclose(whole, margin._updates(bench.vlm, batch), rtol=1e-4)


def test_each_row_says_how_it_came_about(rows, table):
    assert not table.duplicated(["kind", "part", "layer", "quantity"]).any()
    assert (table[["value", "baseline", "level"]].notna()).all(axis=None)
    assert (table[["compared", "method"]] != "").all(axis=None)
    assert list(table.columns) == ["condition", "kind", "part", "layer", *COLUMNS]
    assert set(table["kind"]) == {"all", *set(rows["kind"])}
    for kind, some in [("all", rows), *rows.groupby("kind")]:
        found = where(table, kind=kind)
        assert set(found["n"]) == {some["example"].nunique()}
        assert set(found["groups"]) == {some["group"].nunique()}
        for layer, at in some.groupby("layer"):
            for quantity, column in (
                ("truth margin", "margin"),
                ("relative update of image tokens", "relative_update"),
                ("absolute update of image tokens", "absolute_update"),
            ):
                assert where(found, quantity=quantity, layer=layer)["value"].tolist() == [
                    pytest.approx(at[column].mean())
                ]
    exact = table[table["low"].isna()]
    assert exact["note"].str.contains("no variance|one group|denominator").all()
    assert set(exact[exact["kind"] == "all"]["part"]) <= {"constant"}


def _planted(shift):
    """Rows of 36 pictures whose margins peak at layer 3 or, in some pictures, at layer 6 of 0 to 9."""
    rng, rows = np.random.default_rng(4), []
    for picture in range(36):
        peak = 6 if picture % 12 < shift else 3
        for question in range(3):
            for layer in range(10):
                value = 5.0 - abs(layer - peak) + rng.normal() / 4
                known = {"example": f"{picture}-{question}", "group": str(picture), "kind": "k", "condition": "c"}
                jump = 4.0 if layer == 9 else 1.0 + (layer == 5) * (1 + picture % 3)
                parts = {
                    "attention": 1.0 + rng.normal() / 9,
                    "mlp": 2.0,
                    "between": 0.0,
                    "embedding": 0.1,
                    "total": 9.0,
                }
                parts |= {"constant": 0.2, "relative_update": 0.5, "absolute_update": jump}
                rows.append({**known, **parts, "scored": True, "layer": layer, "margin": value})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("shift", [0, 4, 5])
def test_peak_and_updates_by_a_slow_bootstrap(shift):
    rows = _planted(shift)
    found = MARGIN.summarise(rows, SETTINGS).set_index("quantity")
    curves = {name: [some.pivot(index="example", columns="layer", values=name).to_numpy() for _, some in
              rows.groupby("group")] for name in ("margin", "absolute_update")}  # fmt: skip
    everything = np.concatenate(curves["margin"]).mean(0)
    rng, drawn = np.random.default_rng(99), {"depth": [], "peak": [], "flat": [], "jump": []}
    for _ in range(4000):
        chosen = rng.integers(0, 36, 36)
        mean = np.concatenate([curves["margin"][c] for c in chosen]).mean(0)
        update = np.concatenate([curves["absolute_update"][c] for c in chosen]).mean(0)
        drawn["depth"].append(mean.argmax() / 9)
        drawn["peak"].append(mean[everything.argmax()])
        drawn["flat"].append(update[5] / update[1])
        drawn["jump"].append(update[9] / update[1:8].mean())
    for quantity, name, slack in (
        ("relative depth of the peak", "depth", 1e-9),
        ("peak truth margin", "peak", 0.1),
        ("flatness of the middle", "flat", 0.1),
        ("last layers against the middle", "jump", 0.1),
    ):
        low, high = np.quantile(drawn[name], [0.025, 0.975], method="inverted_cdf")
        line = found.loc[quantity]
        assert line["low"] == pytest.approx(low, abs=slack)  # tails for few pictures are wider than the percentiles
        assert line["high"] == pytest.approx(high, abs=slack)
    assert found.loc["peak truth margin", "value"] == pytest.approx(everything.max())
    assert found.loc["relative depth of the peak", "value"] == pytest.approx(everything.argmax() / 9)
    assert found.loc["peak layer", "value"] == everything.argmax()
    wide = found.loc["relative depth of the peak", "high"] - found.loc["relative depth of the peak", "low"]
    assert (wide > 0) == (shift > 0)  # pictures that disagree widen the interval
    assert found.loc["flatness of the middle", "value"] == pytest.approx(3)
    assert found.loc["last layers against the middle", "value"] == pytest.approx(4 / ((6 + 3) / 7))


def test_middle_and_last_layers():
    assert (middle_layers(32), last_layers(32)) == (list(range(4, 28)), [29, 30, 31])  # counted from 1: 5-28 and 30-32
    for n_layers in range(1, 100):
        middle, last = middle_layers(n_layers), last_layers(n_layers)
        assert not set(middle) & set(last)
        assert last[-1] == n_layers - 1
        assert bool(middle) == (n_layers > 1)


def test_right_answers_of_several_tokens_are_left_out_and_counted(bench):
    long = [EXAMPLES[0], *(iv.data.Example(f"x{n}", e.image, e.question, "a green umbrella", group=e.group, kind=e.kind)
            for n, e in enumerate(EXAMPLES[1:4])), *EXAMPLES[4:9]]  # fmt: skip
    rows = MARGIN.measure(bench, Shard(0, "standard", tuple(long)))
    alone = MARGIN.measure(bench, Shard(0, "standard", (EXAMPLES[0], *EXAMPLES[4:9])))
    kept = rows[rows["scored"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, alone, rtol=1e-3, atol=1e-4)
    table = where(MARGIN.summarise(rows, SETTINGS), kind="all")
    scored = table[table["part"] != "update"]
    assert set(scored["n"]) == {6}
    assert scored["note"].str.contains("3 of 9 questions left out: their right answer is not one token").all()
    assert set(table[table["part"] == "update"]["n"]) == {9}
    facts = dict(section(table.assign(model="m"), ["m"]).facts)
    assert "3 of 9 questions left out: their right answer is not one token (m)" in facts["n"]
    none = MARGIN.measure(bench, Shard(0, "standard", tuple(long[1:4])))
    only = MARGIN.summarise(none, SETTINGS)
    assert set(only["part"]) == {"update"}
    assert section(only.assign(model="m"), ["m"]).answer == (
        "There is no evidence that the right answer leads after any layer in m."
    )


def test_a_single_picture_or_layer_is_a_result():
    rows = _planted(0)
    one = MARGIN.summarise(rows[rows["group"] == "0"], SETTINGS)
    assert (one[one["quantity"] == "truth margin"]["note"] == "one group: nothing to resample").all()
    assert one[one["quantity"] == "relative depth of the peak"]["low"].isna().all()
    shallow = MARGIN.summarise(rows[rows["layer"] == 0], SETTINGS).set_index("quantity")
    assert shallow.loc["relative depth of the peak", "value"] == 0
    assert "flatness of the middle" not in shallow.index


def test_shares_of_a_margin_that_may_be_zero_have_no_interval():
    rows = _planted(0)
    opposed = np.where(rows["group"].astype(int) % 2, 2.0, -1.9)
    table = MARGIN.summarise(rows.assign(attention=opposed, mlp=opposed), SETTINGS)
    shares = where(table, quantity="share of the margin", kind="all")
    assert shares["low"].isna().all()
    assert shares["note"].str.contains("denominator").all()


def test_the_report_claims_a_lead_only_where_the_interval_shows_one(table):
    named = table.assign(model="llava")
    made = section(named, ["llava"])
    assert made.answer.startswith("The right answer takes the lead after layer ")
    assert len(made.panels) == 3
    assert math.isfinite(float(made.points[0].split("peak ")[1].split(" ")[0]))
    wide = named["quantity"] == "truth margin"
    named.loc[wide, "low"] = -1.0
    assert "no evidence" in section(named, ["llava"]).answer
    assert section(named, ["llava"]).summary == ""
