"""Scoring against planted circuits: the scores on truths made by hand, the methods on real planted models, the page."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from scipy import stats
from typer.testing import CliRunner

import interp_vlm as iv
from experiments.ground_truth import methods, page
from experiments.ground_truth.__main__ import CASES, main, measure, models
from experiments.ground_truth.bench import NOTHING, WHAT, Bench, Found, counts, truth_of
from experiments.ground_truth.scores import SIZES, area, circuits, faithfulness, integrated, precision_recall, score
from interp_vlm.testbed import NAMES
from interp_vlm.testbed.planted import plant

DOCS = Path(__file__).parents[2] / "docs"


def named(*cells):
    return frozenset(cells)


@pytest.fixture(scope="module")
def kept():
    """The rows that the page is made from."""
    return pd.read_parquet(DOCS / "validation.parquet")


@pytest.fixture(scope="module")
def bench():
    return Bench(plant("llava", 0), 6)


# scores, on truths made by hand

TRUTH = Found(named(2), named((2, 0), (2, 3)), named((2, "query", 58), (2, "key", 7)), named((0, 7), (2, 58)), named())


def test_scores_of_a_found_set_that_is_partly_right():
    found = Found(layers=named(1, 2), heads=named((2, 0), (4, 1), (5, 1)), ends=named((2, "key", 58)))
    rows = {row["what"]: row for row in score(found, TRUTH, decoys=[(4, 1), (0, 0)])}
    assert list(rows) == ["layers", "heads", "positions"]
    assert (rows["layers"]["precision"], rows["layers"]["recall"]) == (0.5, 1.0)
    assert (rows["heads"]["precision"], rows["heads"]["recall"], rows["heads"]["decoys"]) == (1 / 3, 0.5, 0.5)
    # a key is no query: the right position on the wrong side is wrong
    assert (rows["positions"]["precision"], rows["positions"]["recall"]) == (0.0, 0.0)
    assert not any(row["exact"] for row in rows.values())


def test_scores_of_the_truth_itself_and_of_nothing():
    rows = score(TRUTH, TRUTH)
    assert [row["what"] for row in rows] == ["layers", "heads", "positions", "positions", "neurons"]
    assert all(row["exact"] for row in rows)
    assert all(row["recall"] == 1.0 for row in rows[:4])
    empty = score(NOTHING, TRUTH)
    assert all(np.isnan(row["precision"]) for row in empty)
    assert [row["exact"] for row in empty] == [False, False, False, False, True]
    assert all(row["exact"] for row in score(NOTHING, NOTHING))


def test_naming_a_backup_is_no_mistake_and_no_recall():
    whole = Found(named(2, 4), named((2, 0), (2, 3), (4, 1)))
    (layers, heads) = score(Found(layers=named(4), heads=named((2, 0), (4, 1))), TRUTH, whole=whole)
    assert (layers["precision"], layers["recall"], layers["backups"]) == (1.0, 0.0, 1.0)
    assert (heads["precision"], heads["recall"], heads["backups"], heads["exact"]) == (1.0, 0.5, 1.0, False)


def test_what_is_named_without_need_is_held_against_the_route():
    (layers, heads) = score(Found(layers=named(2, 3), heads=named((2, 0))), NOTHING, route=TRUTH)
    assert (layers["precision"], layers["on_route"], layers["exact"]) == (0.0, 0.5, False)
    assert (heads["precision"], heads["on_route"]) == (0.0, 1.0)


def test_precision_and_recall_of_random_sets_are_those_of_scikit_learn():
    from sklearn.metrics import precision_score, recall_score

    rng = np.random.default_rng(0)
    for _ in range(50):
        found, true = rng.random((2, 12)) < 0.5
        ours = precision_recall(*(frozenset(np.flatnonzero(one).tolist()) for one in (found, true)))
        assert ours == pytest.approx((precision_score(true, found), recall_score(true, found)))


def test_an_effect_counts_by_its_t_test_and_its_size():
    rng = np.random.default_rng(0)
    effects = rng.normal(rng.choice([0.0, 0.5, 2.0], 400)[:, None], 1.0, (400, 6))
    whole = np.full(6, 10.0)
    wanted = (stats.ttest_1samp(effects, 0.0, axis=1).pvalue < 0.05) & (abs(effects.mean(1)) >= 1.0)
    assert 0 < wanted.sum() < 400
    assert counts(effects, whole).tolist() == wanted.tolist()
    # rounding is no effect, however sure
    assert not counts(np.full((1, 6), 1e-4), np.full(6, 1e-4)).any()


def test_area_is_the_trapezoid_of_numpy_over_the_sizes_of_mib():
    curve = np.random.default_rng(0).random(10).tolist()
    assert area(curve) == pytest.approx(np.trapezoid(curve, SIZES))


def test_circuits_take_the_best_heads_first():
    ranking = {(0, 0): 0.1, (0, 1): -5.0, (1, 0): 2.0, (1, 1): 0.1003}
    assert circuits(ranking)[-2] == named((1, 0), (0, 0))  # hundredths decide, then the earlier head
    assert circuits(ranking, signed=False)[-2] == named((0, 1), (1, 0))
    assert circuits(ranking)[0] == named()
    assert circuits(ranking)[-1] == frozenset(ranking)


# faithfulness, on a real planted model


def without_library(bench, circuit):
    """The clean answers' score difference with the heads outside the circuit patched by plain PyTorch hooks."""
    model, anatomy = bench.vlm.model, bench.vlm.anatomy
    layers = list(model.get_submodule(anatomy.layers).children())
    width = anatomy.d_head
    corrupt = {}

    def keep(number):
        return lambda _, args: corrupt.__setitem__(number, args[0].clone())

    def replace(number):
        def hook(_, args):
            mixed = args[0].clone()
            for head in range(anatomy.n_heads):
                if (number, head) not in circuit:
                    cells = slice(head * width, (head + 1) * width)
                    mixed[..., cells] = corrupt[number][..., cells]
            return (mixed,)

        return hook

    logits = []
    for batch, hook in ((bench.corrupt, keep), (bench.clean, replace)):
        handles = [layer.self_attn.o_proj.register_forward_pre_hook(hook(k)) for k, layer in enumerate(layers)]
        with torch.no_grad():
            logits.append(model(**batch.inputs).logits[:, -1].double())
        for handle in handles:
            handle.remove()
    ids = [bench.vlm.tokenizer.convert_tokens_to_ids(list(words)) for words in (bench.right, bench.wrong)]
    rows = torch.arange(len(ids[0]))
    return float((logits[1][rows, ids[0]] - logits[1][rows, ids[1]]).mean())


def test_faithfulness_is_that_of_plain_hooks(bench):
    true = truth_of(bench.planted).heads
    nothing, everything = frozenset(), frozenset(bench.heads)
    half = frozenset(head for head in bench.heads if head[1] < 2) | set(list(true)[:1])
    kept = [nothing, true, half, everything, everything - true]
    m = [without_library(bench, circuit) for circuit in kept]
    wanted = [(value - m[0]) / (m[3] - m[0]) for value in m]
    assert faithfulness(bench, kept) == pytest.approx(wanted, abs=1e-4)
    assert wanted[1] == pytest.approx(1.0, abs=0.02)
    assert wanted[4] == pytest.approx(0.0, abs=0.02)


def test_the_true_ranking_is_the_most_faithful_and_its_reverse_the_least(bench):
    true = truth_of(bench.planted).heads
    up = {head: float(head in true) for head in bench.heads}
    down = {head: float(head not in true) for head in bench.heads}
    found = integrated(bench, {"up": up, "down": down})
    first = SIZES[next(k for k, kept in enumerate(circuits(up)) if true <= kept)]
    assert found["up"][0] > 1.0 - first
    assert found["down"][0] < 0.3
    assert found["up"][1] < first < found["down"][1]


# methods, on real planted models


@pytest.mark.parametrize("family", ["paligemma", "qwen2_vl"])
def test_knockout_and_patching_recover_the_route_and_not_another_one(family):
    planted = plant(family, 3)
    own, other = truth_of(planted), truth_of(plant(family, 4))
    bench = Bench(planted, 4)
    for found in (methods.knockout(bench), methods.denoising(bench)):
        assert all(row["exact"] for row in score(found, own, planted.decoys))
        assert not any(row["exact"] for row in score(found, other) if row["what"] == "positions")


def test_nothing_is_found_where_there_is_nothing():
    bench = Bench(plant("paligemma", 0, null=True), 4)
    assert all(
        row["exact"] for method in (methods.knockout, methods.denoising) for row in score(method(bench), NOTHING)
    )


def test_sharpness_names_the_true_heads_and_the_decoys(bench):
    decoys, true = frozenset(bench.planted.decoys), truth_of(bench.planted).heads
    assert decoys
    assert methods.sharpness(bench).heads == decoys | true


def test_pairs_find_the_backup_that_single_knockouts_miss():
    planted = plant("llava", 1, backup=True)
    bench = Bench(planted, 4)
    route, whole = truth_of(planted), truth_of(planted, backups=True)
    assert whole.heads > route.heads
    assert methods.knockout(bench).heads == frozenset()
    assert methods.pairs(bench).heads == whole.heads
    alone, sight, closed = methods.cuts(bench).values()
    assert abs(alone) < 0.01
    assert sight == pytest.approx(1.0, abs=0.01)
    assert closed == pytest.approx(1.0, abs=0.01)


def test_closing_the_leaks_takes_what_blocking_the_last_token_leaves():
    bench = Bench(plant("qwen2_vl", 0, detour="question"), 4)
    edges, sight, closed = methods.cuts(bench).values()
    assert abs(sight) < 0.01
    assert edges == pytest.approx(1.0, abs=0.01)
    assert closed == pytest.approx(1.0, abs=0.01)


# the page


def test_the_page_is_that_of_its_rows(kept, tmp_path):
    written = page.write(kept, tmp_path)
    assert [path.name for path in written] == ["validation.parquet", "validation.md", "validation.png"]
    assert (tmp_path / "validation.md").read_text() == (DOCS / "validation.md").read_text()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "validation.parquet"), kept)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_rows_are_those_of_the_methods_as_they_are(kept):
    where = ("llava", "straight", 0)
    again = pd.DataFrame(list(measure(*where)))
    mask = (kept["family"] == where[0]) & (kept["case"] == where[1]) & (kept["seed"] == where[2])
    before = kept.loc[mask, again.columns].reset_index(drop=True)
    numbers = {"exact": float}  # none for the rows that name nothing
    pd.testing.assert_frame_equal(before.astype(numbers), again.astype(numbers), check_dtype=False, rtol=0.0, atol=1e-3)


def test_every_model_was_measured(kept):
    seeds = int(kept["seed"].max()) + 1
    assert seeds >= 20
    assert set(kept.groupby(["family", "case", "seed"]).groups) == set(models(seeds, NAMES))
    assert all(name in set(kept["case"]) for name in CASES)


def test_what_was_needed_was_reached(kept):
    scored = kept[kept["what"].isin(WHAT)]
    causal = scored[scored["method"].isin(page.CAUSAL)]
    assert causal.loc[causal["case"] == "straight", "exact"].all()
    empty = causal[causal["case"] == "null model"]
    assert (empty.groupby(["method", "family", "seed"])["named"].sum() > 0).mean() <= 0.05
    straight = scored[(scored["case"] == "straight") & (scored["what"] == "heads")].set_index("method")
    assert straight.loc["attention sharpness", "decoys"].mean() > 0.9
    assert straight.loc[list(page.CAUSAL), "decoys"].max() == 0.0


def test_what_the_page_says_in_words_is_in_the_rows(kept):
    straight = kept[kept["case"] == "straight"]
    of = dict(list(straight.groupby("method")))
    assert (of["knockout windows of 3"]["recall"] == 1.0).all()
    assert (of["knockout windows of 3"]["precision"] < 1.0).all()
    assert (of["direct logit attribution"]["named"].dropna() == 0).all()
    assert 0.0 < of["probe's onset"]["exact"].mean() < 1.0
    assert (of["L1 neurons"]["recall"] > 0.0).all()
    same = kept[(kept["case"] == "same answer") & (kept["named"] > 0)]
    assert (same.loc[same["method"].isin(list(page.CAUSAL)), "on_route"] == 1.0).all()
    assert of["L1 neurons"]["precision"].mean() < 0.75
    backup = kept[(kept["case"] == "backup") & (kept["what"] == "heads")].groupby("method")
    assert backup["recall"].max()["knockout"] == 0.0
    assert backup["recall"].min()["patching, clean into corrupt"] == 1.0
    assert backup["backups"].max()["patching, clean into corrupt"] == 0.0
    assert backup["backups"].min()[methods.PAIRS] == 1.0
    detours = kept[(kept["what"] == "cut") & kept["case"].str.contains("detour")].groupby("method")["effect"]
    assert detours.max()[methods.CUTS[1]] < 0.01
    assert detours.min()[methods.CUTS[2]] > 0.99


def test_the_route_that_knockout_misses_passes_by_the_first_token(kept):
    missed = kept[(kept["case"] == "prefix detour") & (kept["method"] == "knockout") & (kept["what"] == "heads")]
    missed = missed[~missed["exact"].astype(bool)]
    assert len(missed) == 1
    planted = plant("paligemma", int(missed["seed"].iloc[0]), detour="prefix")
    assert planted.route.edges[1].keys == (0,)


def test_a_page_without_its_marks_is_refused(kept):
    with pytest.raises(ValueError, match="no block 'verdict'"):
        page.filled("# Validation", kept)


def test_the_figure_shows_every_method(kept):
    figure = page.figure(kept)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == list(methods.METHODS)
    assert [axes.get_title().split()[0] for axes in figure.axes] == ["named", "decoy", "null"]


def test_the_command_explains_itself_and_refuses_unknown_families():
    app = typer.Typer()
    app.command()(main)
    runner = CliRunner()
    shown = runner.invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert "Example: python -m experiments.ground_truth --seeds 2" in shown.output
    for option in ("--seeds", "--families", "--out"):
        assert option in shown.output
    refused = runner.invoke(app, ["--families", "llava,gpt"])
    assert refused.exit_code == 2
    assert "gpt" in refused.output


def test_effects_are_those_of_runs_one_by_one(bench):
    edge = bench.planted.route.edges[0]
    knockout = iv.AttentionKnockout(list(edge.queries), list(edge.keys), [edge.layer], list(edge.heads))
    scores = []
    for batch in (bench.clean, bench.corrupt):
        for interventions in ([], [knockout]):
            logits = bench.vlm.run(batch, interventions, engine="full").logits.double()
            ids = [bench.vlm.tokenizer.convert_tokens_to_ids(list(words)) for words in (bench.right, bench.wrong)]
            rows = torch.arange(len(logits))
            scores.append((logits[rows, ids[0]] - logits[rows, ids[1]]).numpy())
    whole, left = scores[0] - scores[2], scores[1] - scores[3]
    assert bench.whole == pytest.approx(whole, abs=1e-3)
    assert bench.blocked([knockout])[0] == pytest.approx(whole - left, abs=1e-3)
