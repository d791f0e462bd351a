"""Ablated neurons: sets by hand, edits against the engine's ablations, planted cases, and every number of the table."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pandas as pd
import pytest
import torch

import interp_vlm as iv
from interp_vlm import stats
from interp_vlm.data.digits import digit_scenes
from interp_vlm.study import neuron_sets
from interp_vlm.study.changes import _equivalence, by_quantity
from interp_vlm.study.experiment import Bench
from interp_vlm.study.material import Shard
from interp_vlm.study.neuron_sets import Chosen, chosen, count_of, equal_norm_sets, random_sets, ranking
from interp_vlm.study.neurons import NEURONS, Edit, _Bank, edits, verdict
from interp_vlm.study.sections import neurons as words
from interp_vlm.study.settings import Settings
from interp_vlm.study.tables import tidy, where

N = 18
SETTINGS = Settings(models=("testbed:llava",), limit=N, draws=20, batch_size=24)


@pytest.fixture(scope="module")
def vlm():
    return iv.load("testbed:llava")


@pytest.fixture(scope="module")
def fitting():
    return tuple(digit_scenes("validation", 120, 1, "hard"))


@pytest.fixture(scope="module")
def bench(vlm, fitting):
    return Bench(vlm, SETTINGS, fitting=fitting)


@pytest.fixture(scope="module")
def shard():
    return Shard(0, "standard", tuple(digit_scenes("test", N, 0)))


@pytest.fixture(scope="module")
def rows(bench, shard):
    return NEURONS.measure(bench, shard)


@pytest.fixture(scope="module")
def table(rows):
    return NEURONS.summarise(rows, SETTINGS)


# Choosing


def test_sizes():
    assert [count_of(size, 128) for size in ("1", "5", "10", "25 %", "50 %", "90 %")] == [1, 5, 10, 32, 64, 115]
    assert count_of("10", 4) == 4
    assert count_of("25 %", 2) == 1


def test_random_sets_are_distinct_and_of_one_size():
    sets = random_sets(128, 5, 20, seed=0)
    assert (sets.sum(1) == 5).all()
    assert len({row.tobytes() for row in sets}) == 20
    assert (sets == random_sets(128, 5, 20, seed=0)).all()
    assert (sets != random_sets(128, 5, 20, seed=1)).any()
    # every neuron is as likely as any other
    often = random_sets(16, 4, 2000, seed=0).mean(0)
    assert np.abs(often - 0.25).max() < 0.04


@pytest.mark.parametrize("count", [1, 5, 32, 64, 115])
def test_sets_of_equal_norm_match_in_size_and_norm(count):
    """With a few neurons of enormous norm among the top, as in real models, sets of equal size alone do not match."""
    rng = np.random.default_rng(0)
    norm = np.exp(rng.normal(0.0, 1.5, size=128))
    top = np.argsort(-norm * rng.uniform(0.2, 1.0, size=128))[:count]
    matched, free = equal_norm_sets(norm, top, 20, seed=0), random_sets(128, count, 20, seed=0)
    assert (matched.sum(1) == count).all()
    off, far = (abs(float((sets @ norm).mean() / norm[top].sum()) - 1.0) for sets in (matched, free))
    assert off < 0.35
    if count < 100:
        assert off < far / 2


def test_equal_norm_by_hand():
    """Norms in two plateaus: the only set of three low neurons and one high one is four of those."""
    norm = np.array([1.0] * 8 + [100.0] * 8)
    sets = equal_norm_sets(norm, np.array([0, 3, 5, 9]), 20, seed=3)
    assert ((sets @ norm) == 103.0).all()
    assert (sets[:, :8].sum(1) == 3).all()


def test_ranking_finds_planted_neurons():
    rng = np.random.default_rng(0)
    right = rng.random(300) < 0.6
    hidden = rng.normal(size=(300, 24)) * np.linspace(1, 30, 24)
    for unit, size in ((3, 3.0), (17, 2.0)):
        hidden[:, unit] += size * (unit + 1) * right
    groups = [str(number // 3) for number in range(300)]
    order, stable = ranking(torch.from_numpy(hidden).float(), right, groups, 0.1, seed=0)
    assert set(order[:2]) == {3, 17}
    assert sorted(order) == list(range(24))
    assert stable == 2


@pytest.mark.parametrize("width", [10, 300], ids=["tall", "wide"])
def test_ranking_falls_back_on_the_l2_probe(width):
    """Weights on standardised features against scikit-learn's, with fewer and with more neurons than examples."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(1)
    right = rng.random(200) < 0.5
    hidden = rng.normal(size=(200, width)) * 5.0
    order, stable = ranking(torch.from_numpy(hidden).float(), right, [str(i) for i in range(200)], 0.01, seed=0)
    assert stable == 0
    features = StandardScaler().fit_transform(hidden.astype("float32").astype("float64"))
    model = LogisticRegression(C=0.01, solver="newton-cholesky", tol=1e-10).fit(features, right)
    weights = np.abs(model.coef_[0])
    assert sorted(order) == list(range(width))
    assert (np.diff(weights[order]) < 3e-5).all()  # wide layers are solved in single precision


def test_chosen_is_found_once_and_is_the_same_again(bench, vlm, fitting):
    first = chosen(bench)
    assert chosen(Bench(vlm, SETTINGS, fitting=fitting)) is first
    neuron_sets._KNOWN.clear()
    again = chosen(bench)
    assert again.peak == first.peak
    assert all((again.order[layer] == first.order[layer]).all() for layer in first.order)
    aurocs = [estimate.value for estimate in again.aurocs]
    assert again.peak == int(np.argmax(aurocs))
    assert again.depth == 2
    assert again.reason == ""


def test_chosen_statistics_are_those_of_the_examples_set_aside(bench, vlm, fitting):
    found = chosen(bench)
    batch = vlm.encode([e.image for e in fitting], [e.question for e in fitting])
    values = vlm.capture(batch, "resid_post", positions="last")["resid_post"][:, :, 0]
    assert torch.allclose(found.mean, values.double().mean(0), atol=1e-5)
    assert torch.allclose(found.largest, values.amax(0), atol=1e-5)
    assert np.allclose(found.norm, values.abs().mean(0), atol=1e-5)
    few = vlm.encode([e.image for e in fitting[:48]], [e.question for e in fitting[:48]])
    everywhere = iv.reference_mean(vlm, few, "resid_post", layers=[found.peak])[0]
    assert torch.allclose(found.everywhere, everywhere, atol=1e-5)


# Editing


@pytest.mark.parametrize("fill", ["zero", "mean", "clamp"])
def test_edits_are_ablations_of_those_units(bench, vlm, shard, fill):
    """The patch put together for each example gives what the engine's ablation of the same units gives."""
    found = chosen(bench)
    batch = vlm.encode([e.image for e in shard.examples], [e.question for e in shard.examples])
    cache = vlm.capture(batch, "resid_post", positions="last")
    layer, bank = found.peak, _Bank(found, SETTINGS)
    made, facts = bank.ablation(Edit("top", "50 %", fill, layer, layer), cache, shard.examples)
    units = found.order[layer][:64].tolist()
    value = {"zero": "zero", "mean": found.mean[layer].float(), "clamp": found.largest[layer]}[fill]
    oracle = iv.Ablation("resid_post", layers=[layer], positions="last", units=units, to=value)
    assert torch.allclose(vlm.run(batch, made).logits, vlm.run(batch, oracle).logits, atol=1e-5)
    assert {fact["units"] for fact in facts} == {64}
    assert [fact["norm"] for fact in facts] == pytest.approx([1.0] * N)


def test_each_example_meets_its_own_random_set_and_donor(bench, vlm, shard):
    found = chosen(bench)
    layer, bank = found.peak, _Bank(found, SETTINGS)
    examples = shard.examples[:6]
    batch = vlm.encode([e.image for e in examples], [e.question for e in examples])
    cache = vlm.capture(batch, "resid_post", positions="last")
    made, facts = bank.ablation(Edit("random", "50 %", "resample", layer, layer), cache, examples)
    together = vlm.run(batch, made).logits
    sets = random_sets(128, 64, SETTINGS.draws, SETTINGS.seed)
    for number, example in enumerate(examples):
        alone = vlm.encode(example.image, example.question)
        units = np.flatnonzero(sets[int(facts[number]["draw"])]).tolist()
        donor = found.values[layer][bank._chance(example)[1]]
        oracle = iv.Ablation("resid_post", layers=[layer], positions="last", units=units, to=donor)
        assert torch.allclose(vlm.run(alone, oracle).logits[0], together[number], atol=1e-4)
    assert len({fact["draw"] for fact in facts}) > 1
    # neither the batch nor the order matters to what an example meets
    again = bank.ablation(Edit("random", "50 %", "resample", layer, layer), cache, examples)[1]
    assert again == facts


def test_the_plan_has_every_row_that_claims_may_pick():
    plan = edits(peak=3, depth=2, n_layers=4)
    found = {(edit.set, edit.size, edit.fill, at) for edit, answers in plan.items() for at in answers}
    for size in ("5", "10", "25 %", "50 %", "90 %"):
        assert {("top", size, fill, "peak") for fill in ("zero", "mean")} <= found
    assert {("single", "1", fill, "peak") for fill in ("zero", "mean", "clamp")} <= found
    for name in ("random", "random of equal norm"):
        assert {(name, size, "mean", "peak") for size in ("5", "25 %", "50 %", "90 %")} <= found
        assert {(name, size, "mean", "depth") for size in ("5", "50 %")} <= found
    assert {edit.layer for edit, answers in plan.items() if "each" in answers} == {0, 1, 2, 3}
    assert all(edit.probe == 3 for edit, answers in plan.items() if "each" in answers)
    # where both layers are one, nothing is done twice
    assert len(edits(peak=2, depth=2, n_layers=4)) < len(plan)


# The whole measure


def test_rows(rows, bench):
    assert (rows["reason"] == "").all()
    assert not rows.duplicated(["example", "set", "size", "fill", "layer", "at"]).any()
    clean = rows[rows["set"] == "none"]
    assert len(clean) == N
    counts = rows.groupby(["set", "size", "fill", "layer", "at"]).size()
    assert (counts == N).all()
    own = rows[rows["set"] == "random"]
    assert set(own["draw"]) <= {str(draw) for draw in range(20)}
    assert own["draw"].nunique() > 5
    found = chosen(bench)
    assert set(rows.loc[rows["at"] == "peak", "layer"]) == {found.peak}
    assert set(rows.loc[rows["at"] == "depth", "layer"]) == {2}
    assert (rows["correct"] == (rows["answer"] == rows["expected"])).all()
    answers = clean.set_index("example")["answer"]
    assert (rows["flipped"] == (rows["answer"] != rows["example"].map(answers))).all()


def test_the_same_again_whatever_the_cut_and_wherever_neurons_were_chosen(bench, vlm, rows, shard):
    """A shard of its own gives some questions the rows that they have among others, from what another process chose."""
    some = shard.items[6:10]
    carried = ForkingPickler.loads(ForkingPickler.dumps(NEURONS.prepare(bench)))
    assert carried["chosen"] is not chosen(bench)
    again = NEURONS.measure(Bench(vlm, SETTINGS, **carried), Shard(7, "standard", some))
    by = ["example", "set", "size", "fill", "layer", "at"]
    before = rows[rows["example"].isin({example.id for example in some})]
    left, right = (frame.sort_values(by).reset_index(drop=True) for frame in (before, again))
    assert (left[[*by, "draw", "answer"]] == right[[*by, "draw", "answer"]]).all(axis=None)


def test_table_against_slow_recomputation(rows, table):
    clean = rows[rows["set"] == "none"].set_index("example")
    keys = ["set", "size", "fill", "layer", "at"]
    assert not table.duplicated([*keys, "quantity"]).any()
    right = {key: part.set_index("example").loc[clean.index] for key, part in rows[rows["set"] != "none"].groupby(keys)}
    checked = 0
    for _, line in table.iterrows():
        key = tuple(line[keys])
        if key not in right:
            assert line["quantity"] == "AUROC of the probe that chooses"
            continue
        part, change = right[key], right[key]["correct"].astype(float) - clean["correct"].astype(float)
        expected = {
            "accuracy": 100 * part["correct"].mean(),
            "change of accuracy": 100 * change.mean(),
            "change of accuracy, exact McNemar": 100 * change.mean(),
            "answers that flip": 100 * part["flipped"].mean(),
            "equivalence within 5 points": 100 * change.mean(),
        }.get(line["quantity"])
        if line["quantity"] == "change of accuracy, exact McNemar":
            assert line["p"] == pytest.approx(stats.mcnemar(part["correct"], clean["correct"]).p)
        if line["quantity"].startswith("change beyond random"):
            other = line["quantity"].replace("change beyond random", "random")
            expected = 100 * (part["correct"].mean() - right[(other, *key[1:])]["correct"].mean())
        if expected is not None:
            assert line["value"] == pytest.approx(expected)
            checked += 1
        assert (line["n"], line["method"] != "") == (N, True)
    assert checked > 150
    tested = table[table["p"].notna()]
    assert (tested["p_holm"] >= tested["p"]).all()


def test_the_words_robust_and_fragile_need_their_tests():
    """Six questions about each of 60 pictures; Holm over the two sets."""
    rng = np.random.default_rng(0)
    groups = pd.Series([f"p{i // 6:02d}" for i in range(360)])
    before = rng.random(360) < 0.9

    def said(lost: float, lost_at_random: float, n: int = 360) -> str:
        top, random = (before & (rng.random(360) >= share) for share in (lost, lost_at_random))
        rows = []
        for name, after in (("top", top), ("random of equal norm", random)):
            facts = {"set": name, "size": "5", "fill": "mean", "at": "depth"}
            rows += _equivalence((after * 1.0 - before)[:n], groups[:n], facts, {})
        test = stats.paired_test(top[:n], random[:n], groups[:n], permutations=1000)
        rows.append({**rows[0], "quantity": "change beyond random of equal norm", "value": test.value, "p": test.p})
        return verdict(by_quantity(tidy(rows, ("set", "size", "fill", "at"))), "5")

    assert said(0.01, 0.01) == "robust"
    assert said(0.0, 0.0) == "robust"  # no answer changed: no scatter, an exact bound
    assert said(0.30, 0.02) == "fragile"
    assert said(0.30, 0.30) == "not resolved"  # costs much, but no more than random neurons
    assert said(0.02, 0.02, n=24) == "not resolved"  # too few to say


def _whole(found: Chosen, layer: int, order: np.ndarray) -> _Bank:
    """A bank that takes its neurons in a given order."""
    return _Bank(replace(found, peak=layer, order={layer: order}), SETTINGS)


def test_ablating_everything_leaves_one_answer(bench, vlm, shard):
    """The planted case: all neurons of the last layer to their mean, and nothing of picture and question is left."""
    last = vlm.anatomy.n_layers - 1
    batch = vlm.encode([e.image for e in shard.examples], [e.question for e in shard.examples])
    cache = vlm.capture(batch, "resid_post", positions="last")
    bank = _whole(chosen(bench), last, np.arange(128))
    made, _ = bank.ablation(Edit("top", "100 %", "mean", last, last), cache, shard.examples)
    assert len({str(answer) for answer in vlm.run(batch, made).answers}) == 1
    assert len({str(answer) for answer in vlm.run(batch).answers}) > 1


def test_neurons_that_nothing_reads_change_nothing(bench, shard):
    """The negative control: a norm that gives some neurons no weight, so that they reach no logit.

    Values of other examples leave the root mean square, through which every neuron acts on the norm, nearly as it was.
    """
    blind = iv.load("testbed:llava")
    unread = np.array([5, 40, 77, 101])
    with torch.no_grad():
        blind.model.model.language_model.norm.weight[unread] = 0.0
    last = blind.anatomy.n_layers - 1
    batch = blind.encode([e.image for e in shard.examples], [e.question for e in shard.examples])
    cache = blind.capture(batch, "resid_post", positions="last")
    found = replace(chosen(bench), values={last: chosen(bench).values[chosen(bench).peak]})
    rest = np.setdiff1d(np.arange(128), unread)
    clean, changed = blind.run(batch), {}
    for name, order in (("unread", np.append(unread, rest)), ("read", np.append(rest, unread))):
        size = "4" if name == "unread" else "50 %"
        made, _ = _whole(found, last, order).ablation(Edit("top", size, "resample", last, last), cache, shard.examples)
        changed[name] = [str(a) != str(b) for a, b in zip(blind.run(batch, made).answers, clean.answers, strict=True)]
    assert not any(changed["unread"])
    assert sum(changed["read"]) > 3


# What cannot be measured


@pytest.mark.parametrize(
    ("examples", "said"),
    [((), "no example is set aside"), (digit_scenes("validation", 6, 1, "standard"), "no probe could be fitted")],
    ids=["none", "one picture"],
)
def test_without_a_probe_the_rows_say_why(vlm, shard, examples, said):
    bench = Bench(vlm, SETTINGS, fitting=tuple(examples))
    rows = NEURONS.measure(bench, shard)
    table = NEURONS.summarise(rows, SETTINGS)
    assert set(rows["set"]) == {"none"}
    assert table["value"].isna().all()
    assert table["note"].str.contains(said).all()
    assert (table["n"] == N).all()
    assert len(where(table, set="top", size="5", fill="mean", at="peak", quantity="change of accuracy")) == 1
    section = words.section(table.assign(model="llava"), ["llava"])
    assert said in section.answer
    assert "robust" not in section.answer
    assert section.panels == ()


def test_section(table):
    """Two models: this one, and one whose numbers are missing."""
    missing = table.assign(model="other", value=np.nan, note="no probe could be fitted: one class")
    both = pd.concat([table.assign(model="llava"), missing], ignore_index=True)
    section = words.section(both, ["llava", "other"])
    assert "Not measured: other: no probe could be fitted" in section.answer
    assert len(section.panels) == 2
    assert len(section.points) == 1
    for size in ("5", "50 %"):
        if verdict(table, size) != "robust":
            assert "robust" not in section.answer.split(". ")[("5", "50 %").index(size)]
    heads, lines = section.table
    assert heads == ("where", "neurons", "set to", "llava", "other")
    assert all(len(line) == 5 for line in lines)
