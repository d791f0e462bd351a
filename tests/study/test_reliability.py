"""Signals of right answers: rows against the raw Hugging Face models, the table against scikit-learn and by hand."""

import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import entropy, pearsonr
from sklearn.metrics import roc_auc_score

import interp_vlm as iv
from interp_vlm.data.digits import digit_scenes
from interp_vlm.errors import DataError
from interp_vlm.models.loading import load
from interp_vlm.readouts.attention import cluster_count
from interp_vlm.readouts.lens import unembed
from interp_vlm.study.answered import answered
from interp_vlm.study.experiment import Bench
from interp_vlm.study.folder import write_frame
from interp_vlm.study.material import shards
from interp_vlm.study.reliability import RELIABILITY
from interp_vlm.study.reliability_tables import CURVES, SIGNALS
from interp_vlm.study.sections import reliability
from interp_vlm.study.sections.words import span
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import COLUMNS, where
from interp_vlm.testbed.build import question_inputs
from tests.engine.settings import Setting
from tests.tiny import FAMILIES

SETTINGS = Settings(models=("testbed:llava",), batch_size=20, shard_size=30)
EXAMPLES = digit_scenes("test", 96, 0, "hard")[::2]  # three questions about each of 16 pictures
N = 5


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_the_answer_is_what_generation_computes(family):
    """Hugging Face feeds its own answer back with a cache; we run the longer prompt. All layers, all families."""
    setting = Setting(family)
    vlm, batch = setting.vlm, setting.batch
    with torch.no_grad():
        out = setting.raw.generate(
            **batch.inputs, max_new_tokens=2, do_sample=False, repetition_penalty=1.0, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True, output_hidden_states=True, output_logits=True,
        )  # fmt: skip
    tokens = out.sequences[:, -2].tolist()
    longer = answered(vlm, batch, tokens)
    assert longer.last.tolist() == (batch.last + 1).tolist()
    found = vlm.capture(longer, "resid_post", positions="last")["resid_post"][:, :, 0]
    wanted = torch.stack([layer[:, -1] for layer in out.hidden_states[1][1:-1]], dim=1)
    torch.testing.assert_close(found[:, :-1], wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))
    logits = out.logits[1].double()
    torch.testing.assert_close(
        unembed(vlm, found[:, -1]).double(), logits, rtol=0, atol=1e-5 * float(logits.abs().max())
    )
    # and no token of the prompt sees the answer
    before = vlm.capture(batch, "resid_post", positions="all")
    same = vlm.capture(longer, "resid_post", positions="all")["resid_post"][:, :, : before.mask.shape[1]]
    change = (same - before["resid_post"]).abs().amax(dim=(1, 3))[before.mask]
    assert float(change.max()) < 2e-6 * float(before["resid_post"].abs().max())


def test_an_answer_needs_a_token_and_a_place():
    setting = Setting("llava")
    with pytest.raises(DataError, match="2 answer tokens for 3 examples"):
        answered(setting.vlm, setting.batch, [1, 2])
    with pytest.raises(DataError, match="padded on the right"):
        answered(setting.vlm, Setting("llava", padding="right").batch, [1, 2, 3])


@pytest.fixture(scope="module", params=["testbed:llava", "testbed:paligemma"])
def measured(request):
    """A model, and the rows of 48 hard questions about 16 pictures."""
    bench = Bench(iv.load(request.param), SETTINGS)
    parts = [RELIABILITY.measure(bench, shard) for shard in shards({"hard": EXAMPLES}, SETTINGS.shard_size)]
    assert len(parts) > 1
    return request.param, bench.vlm, pd.concat(parts, ignore_index=True)


def _raw(model, inputs):
    """Residual stream after every layer at the last position, by plain hooks, and the model's output."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.language_model.layers
    ]
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    for hook in hooks:
        hook.remove()
    return torch.stack([value[0, -1] for value in found]).flatten().numpy(), out


def test_rows_are_what_the_raw_model_says_of_each_question(measured):
    name, vlm, rows = measured
    model, processor = load(name, attn_implementation="eager")
    cells = np.argwhere(np.ones((7, 7), dtype=bool))
    for (_, row), example in list(zip(rows.iterrows(), EXAMPLES, strict=True))[:N]:
        inputs = question_inputs(processor, example.image, example.question)
        hidden, out = _raw(model, inputs)
        p = out.logits[0, -1].double().softmax(-1)
        best, second = p.topk(2).values.tolist()
        token = p.argmax()
        assert row["answer"] == processor.tokenizer.decode(token).strip()
        assert row["correct"] == (row["answer"] == example.answer)
        assert row["answer_length"] == len(row["answer"])
        assert row["confidence"] == pytest.approx(best, abs=1e-4)
        assert row["margin"] == pytest.approx(math.log(best / second), abs=1e-3)
        assert row["logit_certainty"] == pytest.approx(-entropy(p), abs=1e-3)
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        weights = torch.stack([layer[0, :, -1, places].mean(0) for layer in out.attentions]).mean(0)
        assert row["attention_entropy"] == pytest.approx(-entropy(weights) / math.log(49), abs=1e-4)
        assert row["attention_clusters"] == -int(cluster_count(weights, cells))
        assert row["attention_peak"] == pytest.approx(float(weights.max()), abs=1e-5)
        np.testing.assert_allclose(row["hidden"], hidden, atol=2e-3)
        more = {name: torch.ones(1, 1, dtype=torch.long) for name in ("attention_mask", "token_type_ids")}
        more["input_ids"] = token.reshape(1, 1)
        longer = {key: torch.cat([value, more[key]], 1) if key in more else value for key, value in inputs.items()}
        after, _ = _raw(model, longer)
        np.testing.assert_allclose(row["hidden_after"], after, atol=2e-3)
        assert np.abs(after - hidden).max() > 1  # one position on is another place
        samples = iv.self_consistency(vlm, vlm.encode(example.image, example.question), k=10).samples[0]
        (most, count), *_ = Counter(samples).most_common()
        assert row["agreement"] == count / 10
        if count > 5:
            assert row["majority"] == most
            assert row["majority_correct"] == (most == example.answer)


def test_a_run_repeats_itself(measured):
    _, vlm, rows = measured
    bench = Bench(iv.VLM(vlm.model, vlm.processor, "again"), SETTINGS)
    first = RELIABILITY.measure(bench, shards({"hard": EXAMPLES}, SETTINGS.shard_size)[0])
    pd.testing.assert_frame_equal(first, rows[: len(first)], check_exact=True)


def test_real_rows_survive_the_disk_and_make_a_section(measured, tmp_path):
    name, _, rows = measured
    write_frame(tmp_path / "part.parquet", rows)
    read = pd.read_parquet(tmp_path / "part.parquet")
    for column in ("hidden", "hidden_after"):
        kept = np.stack(list(read[column]))
        assert kept.dtype == np.float32
        assert np.array_equal(kept, np.stack(list(rows[column])))
    found = RELIABILITY.summarise(read, SETTINGS).assign(model=name)
    section = reliability.section(found, [name])
    auroc = where(found, kind="all", quantity="AUROC", signal="confidence").iloc[0]
    assert auroc["value"] == pytest.approx(roc_auc_score(rows["correct"], rows["confidence"]))
    assert f"confidence {span(auroc, 2)}" in section.points[0]


def planted(n=240, pictures=40, seed=0, share=0.75):
    """Rows whose hidden states say what is right, in layer 1 before the answer; whose confidence knows a little."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(pictures), n // pictures)
    right = rng.random(n) < share
    hidden = rng.normal(size=(n, 3, 8)).astype(np.float32)
    after = rng.normal(size=(n, 3, 8)).astype(np.float32)
    hidden[:, 1, 0] += 2.5 * right
    agreement = np.clip(np.round(rng.normal(0.8 + 0.1 * right, 0.15), 1), 0.1, 1.0)
    answers = rng.choice(["yes", "no", "red", "three"], n)
    return pd.DataFrame(
        {
            "condition": "hard",
            "example": [f"e{number}" for number in range(n)],
            "group": [f"p{number:02d}" for number in group],
            "kind": np.array(["existence", "colour", "count"])[np.arange(n) % 3],
            "category": "",
            "question": [f"what is at {number} ?" for number in np.arange(n) % 12],
            "expected": "yes",
            "answer": answers,
            "correct": right,
            "answer_length": [len(answer) for answer in answers],
            "confidence": rng.beta(5 + 2 * right, 2),
            "margin": rng.normal(size=n) + 0.5 * right,
            "logit_certainty": rng.normal(size=n) + 0.5 * right,
            "attention_entropy": np.where(np.arange(n) % 40 == 0, np.nan, rng.normal(size=n)),
            "attention_clusters": -rng.integers(0, 4, n).astype(float),
            "attention_peak": rng.random(n),
            "agreement": agreement,
            "majority": answers,
            "majority_correct": right ^ (rng.random(n) < 0.05),
            "layers": 3,
            "hidden": list(hidden.reshape(n, -1)),
            "hidden_after": list(after.reshape(n, -1)),
        }
    )


@pytest.fixture(scope="module")
def rows():
    return planted()


@pytest.fixture(scope="module")
def table(rows):
    return RELIABILITY.summarise(rows, SETTINGS)


def scope(rows, kind):
    return (
        rows if kind == "all" else rows[rows["kind"] != "existence"] if kind == "open" else rows[rows["kind"] == kind]
    )


def test_the_table_has_the_rows_that_claims_pick(table):
    assert list(table.columns) == ["condition", "kind", "signal", "judged", "layer", "coverage", *COLUMNS]
    assert set(table["kind"]) == {"all", "existence", "colour", "count", "open"}
    assert not table.duplicated(["kind", "signal", "judged", "layer", "coverage", "quantity"]).any()
    headlines = where(table, quantity="AUROC", kind="all")
    assert set(headlines["signal"]) == set(SIGNALS)
    assert set(headlines.loc[headlines["signal"] == "probe", "layer"]) == {-1, 0, 1, 2}
    assert set(where(headlines, signal="agreement")["judged"]) == {"greedy", "majority"}
    assert set(headlines["baseline"]) == {0.5}
    for kind in ("all", "existence", "open"):
        assert len(where(table, kind=kind, quantity="probe minus confidence", signal="probe", baseline=0.0)) == 1
        for signal in CURVES:
            risk = where(table, kind=kind, quantity="risk", signal=signal)
            assert list(risk["coverage"]) == [f"{share / 10:.1f}" for share in range(1, 11)]
            assert len(where(table, kind=kind, quantity="area under risk-coverage", signal=signal)) == 1
    assert ((table["n"] > 0) & (table["groups"] > 0) & (table["method"] != "")).all()
    assert (table[table["low"].isna()]["note"] != "").all()


def test_plain_signals_against_scikit_learn(table, rows):
    found = where(table, quantity="AUROC", layer=-1)
    plain = found[found["signal"].isin(rows.columns) & (found["signal"] != "answer_length")]
    assert len(plain) == 5 * 8
    for _, line in plain.iterrows():
        part = scope(rows, line["kind"])
        part = part[part[line["signal"]].notna()]
        label = part["majority_correct" if line["judged"] == "majority" else "correct"]
        assert line["value"] == pytest.approx(roc_auc_score(label, part[line["signal"]]))
        assert (line["n"], line["groups"]) == (len(part), part["group"].nunique())
        if line["signal"] == "attention_entropy":
            assert "without a value left out" in line["note"]
    related = where(table, quantity="point-biserial correlation")
    assert len(related) == 5 * 6
    for _, line in related.iterrows():
        part = scope(rows, line["kind"])
        part = part[part[line["signal"]].notna()]
        label = part["majority_correct" if line["judged"] == "majority" else "correct"]
        assert line["value"] == pytest.approx(pearsonr(part[line["signal"]], label).statistic)


def test_agreement_and_accuracy_by_hand(table, rows):
    for kind in ("all", "colour", "open"):
        part = scope(rows, kind)
        agreed = part[part["agreement"] == 1.0]
        share = where(table, kind=kind, quantity="share where all samples agree").iloc[0]
        assert share["value"] == pytest.approx(100 * len(agreed) / len(part))
        assert share["note"] == "10 of each question, temperature 0.7, top-p 0.9"
        for judged, column in (("greedy", "correct"), ("majority", "majority_correct")):
            line = where(table, kind=kind, quantity="precision where all samples agree", judged=judged).iloc[0]
            assert line["value"] == pytest.approx(100 * agreed[column].mean())
            assert line["baseline"] == pytest.approx(100 * part[column].mean())
            assert line["n"] == len(agreed)
        accuracy = where(table, kind=kind, quantity="accuracy", signal="").iloc[0]
        assert accuracy["value"] == pytest.approx(100 * part["correct"].mean())


def test_probes_are_those_of_probe_layers_read_within_each_kind(table, rows):
    hidden = np.stack(list(rows["hidden"])).reshape(len(rows), 3, 8)
    report = iv.probe_layers(
        hidden, rows["correct"], rows["group"], position="before_answer", permutations=0, resamples=1000
    )
    for kind in ("all", "existence", "open"):
        part = scope(rows, kind)
        scores, folds = report.headline_scores[part.index], report.folds[part.index]
        parts = [(part["correct"].to_numpy()[folds == k], scores[folds == k]) for k in range(5)]
        weights = [right.sum() * (~right).sum() for right, _ in parts]
        probe = np.average([roc_auc_score(*own) for own in parts], weights=weights)
        line = where(table, kind=kind, quantity="AUROC", signal="probe", layer=-1).iloc[0]
        assert line["value"] == pytest.approx(probe)
        sure = [(right, part["confidence"].to_numpy()[folds == k]) for k, (right, _) in enumerate(parts)]
        confidence = np.average([roc_auc_score(*own) for own in sure], weights=weights)
        line = where(table, kind=kind, quantity="probe minus confidence").iloc[0]
        assert line["value"] == pytest.approx(probe - confidence)
    for layer in range(3):
        line = where(table, quantity="AUROC", signal="probe", layer=layer).iloc[0]
        assert line["value"] == pytest.approx(report.auroc[layer].value)
    assert where(table, quantity="peak layer")["value"].tolist() == [1.0]
    assert where(table, quantity="onset layer")["value"].tolist() == [1.0]


def test_risk_by_hand(table, rows):
    for signal in ("confidence", "attention_peak"):
        order = np.argsort(-rows[signal].to_numpy())
        wrong = ~rows["correct"].to_numpy()[order]
        for share in (0.1, 0.5, 1.0):
            line = where(table, kind="all", quantity="risk", signal=signal, coverage=f"{share:.1f}").iloc[0]
            assert line["value"] == pytest.approx(100 * wrong[: int(share * len(rows))].mean())
            assert line["baseline"] == pytest.approx(100 * wrong.mean())
        area = where(table, kind="all", quantity="area under risk-coverage", signal=signal).iloc[0]
        assert area["value"] == pytest.approx(100 * np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))
    # of ten levels many tie: the surest tenth errs as all answers of its level do
    surest = rows[rows["agreement"] == rows["agreement"].max()]
    line = where(table, kind="all", quantity="risk", signal="agreement", coverage="0.1").iloc[0]
    assert line["value"] == pytest.approx(100 * (1 - surest["correct"].mean()))


def test_what_is_planted_is_found_and_what_is_not_is_not(table):
    values = where(table, quantity="AUROC", kind="all", layer=-1).drop_duplicates("signal").set_index("signal")
    # the sparse probe has few strengths to choose from, the MLP its published 50 epochs
    for signal, least in (("probe", 0.75), ("probe_l1", 0.7), ("probe_mlp", 0.5)):
        assert values.loc[signal, "low"] > least
    assert values.loc["confidence", "low"] > 0.5
    for signal in ("probe_after_answer", "question_only", "answer_only", "shuffled_labels"):
        assert values.loc[signal, "low"] < 0.5
        assert values.loc[signal, "value"] < 0.6
    assert where(table, kind="all", quantity="probe minus confidence")["low"].iloc[0] > 0
    by_layer = where(table, quantity="AUROC", signal="probe", kind="all").set_index("layer")
    assert by_layer.loc[1, "p"] <= 0.02
    assert by_layer.loc[0, "p"] > 0.05
    assert "has seen the answer" in values.loc["probe_after_answer", "note"]


def test_with_labels_shuffled_between_pictures_nothing_is_found(rows):
    order = np.random.default_rng(3).permutation(40)
    blocks = rows[["correct", "majority_correct"]].to_numpy().reshape(40, 6, 2)[order].reshape(-1, 2)
    shuffled = rows.assign(correct=blocks[:, 0], majority_correct=blocks[:, 1])
    found = RELIABILITY.summarise(shuffled, SETTINGS)
    auroc = where(found, quantity="AUROC", kind="all", layer=-1)
    known = auroc[auroc["signal"] != "control_task"]
    misses = ((known["low"] > 0.5) | (known["high"] < 0.5)).sum()
    assert misses <= 2  # of 16 intervals at 95 %
    line = where(found, kind="all", quantity="probe minus confidence").iloc[0]
    assert line["low"] < 0 < line["high"]
    assert (where(found, quantity="AUROC", signal="probe", kind="all")["p"].dropna() > 0.05).all()


def named(*tables):
    return pd.concat([found.assign(model=model) for model, found in zip("abc", tables, strict=False)])


def test_the_section_says_what_the_table_says(table):
    tables = named(table, table.assign(value=table["value"]))
    section = reliability.section(tables, ["a", "b"])
    line = where(table, kind="all", quantity="probe minus confidence").iloc[0]
    assert f"says more than confidence in a ({span(line, 2)}) and b ({span(line, 2)})" in section.answer
    assert "the probe (" in section.answer.split(" tells most")[0]
    probe = where(table, kind="all", quantity="AUROC", signal="probe", layer=-1).iloc[0]
    assert f"the probe {span(probe, 2)}" in section.points[0]
    risk = where(table, kind="all", quantity="risk", signal="probe", coverage="0.5").iloc[0]
    assert f"{risk['value']:.1f} (the probe)" in section.points[0]
    assert [panel.name for panel in section.panels] == [
        "reliability-auroc", "reliability-layers", "reliability-risk-a", "reliability-risk-b",
    ]  # fmt: skip
    cells = {line[:3]: line[3:] for line in section.table[1]}
    assert cells["all", SIGNALS["probe"], "AUROC"] == (span(probe, 2), span(probe, 2))
    assert section.summary.startswith("Right answers are told from wrong ones best by the probe (")
    assert not any("nan" in text for text in (section.answer, section.summary, *section.points))


def test_one_class_is_a_result(rows):
    for right in (True, False):
        found = RELIABILITY.summarise(rows.assign(correct=right, majority_correct=right), SETTINGS)
        auroc = where(found, quantity="AUROC")
        assert auroc["value"].isna().all()
        assert (auroc["note"] != "").all()
        assert "one class only" in where(found, quantity="peak layer")["note"].iloc[0]
        section = reliability.section(named(found), ["a"])
        assert section.answer.startswith("This cannot be said")
        assert section.summary == ""
        assert [panel.name for panel in section.panels] == ["reliability-auroc", "reliability-risk-a"]


def test_too_few_pictures_for_folds_leave_what_needs_no_fit(rows):
    few = rows[rows["group"].isin(["p00", "p01", "p02"])].assign(kind="question")
    assert few["correct"].nunique() == 2
    found = RELIABILITY.summarise(few, SETTINGS)
    probe = where(found, quantity="AUROC", signal="probe", kind="all").iloc[0]
    assert math.isnan(probe["value"])
    assert "3 groups for 5 folds" in probe["note"]
    confidence = where(found, quantity="AUROC", signal="confidence", kind="all").iloc[0]
    assert confidence["value"] == pytest.approx(roc_auc_score(few["correct"], few["confidence"]))
    assert set(found["kind"]) == {"all"}  # one kind is everything
    assert "within one kind" not in reliability.section(named(found), ["a"]).answer
