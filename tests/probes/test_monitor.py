"""Monitors of real models: one pass, the same numbers as the slow way, refused by other models, safe on disk."""

import dataclasses
import hashlib
import json
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoProcessor, LlavaForConditionalGeneration

import interp_vlm as iv
from interp_vlm.errors import DataError, InterventionError, ModelError
from interp_vlm.probes import monitor_files, scoring
from interp_vlm.probes.monitor_fit import platt
from interp_vlm.probes.scoring import one_pass, width

LAYERS = (2, 3)


@pytest.fixture(scope="module")
def vlm():
    return iv.load("testbed:llava")


@pytest.fixture(scope="module")
def asked(vlm):
    """Examples, a cache of their last token, and whether they were answered rightly."""
    examples = iv.data.load("digits?difficulty=hard", limit=180, seed=5)
    batch = vlm.encode([example.image for example in examples], [example.question for example in examples])
    right = [str(answer) == example.answer for answer, example in zip(vlm.run(batch).answers, examples, strict=True)]
    return examples, vlm.capture(batch, "resid_post", "last", LAYERS), np.array(right)


@pytest.fixture(scope="module")
def report(asked):
    examples, cache, right = asked
    groups = [example.group for example in examples]
    return iv.probe_layers(cache, right, groups, folds=3, inner_folds=2, permutations=0, resamples=1000)


@pytest.fixture(scope="module")
def monitor(report, asked, vlm):
    return report.monitor(asked[1], vlm, kinds=[example.kind for example in asked[0]]).at_recall(0.8)


@pytest.fixture
def folder(monitor, tmp_path):
    return monitor.save(tmp_path / "monitor")


def test_the_weights_are_those_of_scikit_learn(monitor, report, asked):
    values = asked[1].layer("resid_post", monitor.layer)[:, 0].double().numpy()
    slow = make_pipeline(StandardScaler(), LogisticRegression(C=monitor.C, max_iter=10_000, tol=1e-10))
    slow.fit(values, asked[2])
    logits = slow.decision_function(values)
    expected = 1.0 / (1.0 + np.exp(-(monitor.slope * logits + monitor.offset)))
    np.testing.assert_allclose(monitor.probability(values), expected, atol=1e-5)
    assert monitor.layer in report.chosen_layers
    assert monitor.auroc == report.headline
    assert (monitor.n, monitor.pictures) == (180, 30)
    assert set(monitor.kinds) == {example.kind for example in asked[0]}
    order = np.argsort(report.layer_scores(monitor.layer))
    assert np.all(np.diff(monitor.scores[order]) >= 0)


def test_c_has_the_smallest_log_loss_over_the_reports_folds(monitor, report, asked):
    from sklearn.metrics import log_loss
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    values = asked[1].layer("resid_post", monitor.layer)[:, 0].double().numpy()
    losses = {}
    for strength in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=10_000))
        folds = PredefinedSplit(report.folds)
        losses[strength] = log_loss(
            asked[2], cross_val_predict(model, values, asked[2], cv=folds, method="predict_proba")[:, 1]
        )
    # the shared decomposition standardises once for all folds: the choice may move to a neighbour of equal loss
    assert losses[monitor.C] <= min(losses.values()) + 0.01


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_vl"])
def test_one_pass_gives_what_separate_runs_give(name, asked):
    model = iv.load(f"testbed:{name}")
    examples = asked[0][:7]
    batch = model.encode([example.image for example in examples], [example.question for example in examples])
    found = one_pass(model, batch, "resid_post", (0, 3))
    run, cache = model.run(batch), model.capture(batch, "resid_post", "last", (0, 3))
    assert list(map(str, found.answers)) == list(map(str, run.answers))
    assert [answer.token for answer in found.answers] == [answer.token for answer in run.answers]
    assert found.confidence == pytest.approx([np.exp(answer.logprob) for answer in run.answers], abs=1e-5)
    torch.testing.assert_close(found.hidden, cache["resid_post"][:, :, 0])
    values, logits = scoring._traced(model, batch, "resid_post", (0, 3))  # the slow way, through nnsight
    torch.testing.assert_close(found.hidden, torch.stack([values[0], values[3]], dim=1))
    torch.testing.assert_close(logits, run.logits)
    assert not any(module._forward_hooks for module in model.model.model.language_model.layers)
    closed = one_pass(model, batch, "resid_post", (0,), choices=("yes", "no"))
    assert list(map(str, closed.answers)) == list(map(str, model.run(batch, choices=("yes", "no")).answers))
    assert one_pass(model, batch, "z", (1,)).hidden.shape[2] == width(model, "z")


def test_scoring_is_one_forward_pass(monitor, vlm, asked):
    monitor.bind(vlm)
    passes = []
    hook = vlm.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        found = monitor.score(vlm, asked[0][0].image, asked[0][0].question)
    finally:
        hook.remove()
    assert len(passes) == 1
    assert len(found) == 1
    batch = vlm.encode(asked[0][0].image, asked[0][0].question)
    hidden = vlm.capture(batch, "resid_post", "last", monitor.layer)["resid_post"][:, 0, 0]
    assert found[0].score == pytest.approx(float(monitor.probability(hidden)[0]), abs=1e-9)
    assert str(found[0].answer) == str(vlm.run(batch).answers[0])
    assert found[0].reliable is (found[0].score >= monitor.threshold.value)


def test_the_model_may_be_used_by_another_thread_and_not_within_a_trace(monitor, vlm, asked):
    examples = asked[0][:2]
    mine, other = (vlm.encode(example.image, example.question) for example in examples)
    expected = monitor.run(vlm, mine)[0].score

    class Beside(torch.nn.Module):
        """Runs the same model on another question, in another thread, in the middle of the pass."""

        def __call__(self, module, arguments, output):
            self.handle.remove()
            thread = threading.Thread(target=lambda: vlm.model(**other.inputs))
            thread.start()
            thread.join()

    beside = Beside()
    beside.handle = vlm.model.model.language_model.layers[monitor.layer].register_forward_hook(beside)
    assert monitor.run(vlm, mine)[0].score == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InterventionError, match="inside a trace"), vlm.trace(mine):
        monitor.run(vlm, mine)


def test_a_batch_gives_what_its_examples_give_alone(monitor, vlm, asked):
    examples = asked[0][:6]
    together = monitor.score(vlm, [example.image for example in examples], [example.question for example in examples])
    for example, found in zip(examples, together, strict=True):
        alone = monitor.score(vlm, example.image, example.question)[0]
        assert str(alone.answer) == str(found.answer)
        assert alone.score == pytest.approx(found.score, abs=1e-4)
    bare = dataclasses.replace(monitor, threshold=None)
    assert bare.score(vlm, examples[0].image, examples[0].question)[0].reliable is None


def test_closed_answers_are_kept(report, asked, vlm, tmp_path):
    closed = report.monitor(asked[1], vlm, choices=("yes", "no"))
    again = iv.ReliabilityMonitor.load(closed.save(tmp_path / "closed"))
    assert again.choices == ("yes", "no")
    assert str(again.score(vlm, asked[0][0].image, "how many digits are there ?")[0].answer) in ("yes", "no")


def test_thresholds_of_held_out_examples_and_of_its_own(monitor, asked):
    rng = np.random.default_rng(0)
    scores = rng.random(900)
    right = rng.random(900) < 0.4 + 0.6 * scores
    held = monitor.at_precision(0.7, scores=scores, labels=right, groups=np.arange(900) // 2)
    assert held.threshold.n == 450
    assert held.threshold.goal == "precision"
    assert "not fitted on" in held.threshold.assumes
    assert right[scores >= held.threshold.value].mean() > 0.7
    own = monitor.at_precision(0.5)
    assert own.threshold.n == 30
    assert "approximate" in own.threshold.assumes
    assert monitor.threshold.goal == "recall of right"  # frozen: the first one is as it was
    with pytest.raises(DataError, match="scores without labels"):
        monitor.at_precision(0.7, scores=scores)
    with pytest.raises(DataError, match=r"no threshold promises a precision of 0\.999"):
        monitor.at_precision(0.999)


def test_another_model_is_refused_by_name(monitor, asked):
    other = iv.load("testbed:paligemma")
    with pytest.raises(ModelError, match=r"layer \d .*name 'testbed:llava' is 'testbed:paligemma' here; .*prompt"):
        monitor.score(other, asked[0][0].image, asked[0][0].question)


@pytest.fixture
def local(tmp_path):
    """A LLaVA of the test bed as a folder of one's own."""
    from interp_vlm.models.loading import resolve

    place = tmp_path / "model"
    LlavaForConditionalGeneration.from_pretrained(resolve("testbed:llava")).save_pretrained(place)
    AutoProcessor.from_pretrained(resolve("testbed:llava")).save_pretrained(place)
    return place


@pytest.mark.parametrize("what", ["weights", "prompt", "revision"])
def test_a_model_that_changed_is_refused(what, report, asked, local):
    def loaded():
        found = iv.load(str(local))
        found.name = "testbed:llava"
        return found

    monitor = report.monitor(asked[1], loaded())
    assert monitor.bind(loaded()) is monitor
    other = loaded()
    if what == "weights":
        next(other.model.parameters()).data.mul_(1.5)
    elif what == "prompt":
        other.processor.chat_template = "{% for m in messages %}Q: <image>{{ m.content[1].text }} A:{% endfor %}"
    else:
        other.model.config._commit_hash = "abc123"
    with pytest.raises(ModelError, match=f"{what} "):
        monitor.score(other, asked[0][0].image, asked[0][0].question)


def test_saved_and_loaded_it_is_the_same(monitor, folder, vlm, asked):
    again = iv.ReliabilityMonitor.load(folder)
    for field in dataclasses.fields(monitor):
        if field.name == "_checked":
            continue
        mine, its = getattr(monitor, field.name), getattr(again, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == its.dtype
            np.testing.assert_array_equal(mine, its)
        else:
            assert mine == its, field.name
    picture, question = asked[0][0].image, asked[0][0].question
    assert again.score(vlm, picture, question) == monitor.score(vlm, picture, question)
    assert repr(again) == repr(monitor)
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["monitor", "monitor.json"]
    saved = dataclasses.replace(monitor, threshold=None, weights=monitor.weights * 2)
    saved.save(folder)  # over the old one
    assert len(list(folder.iterdir())) == 2
    assert iv.ReliabilityMonitor.load(folder).threshold is None


def test_degenerate_intervals_survive(monitor, tmp_path):
    unknown = dataclasses.replace(monitor.auroc, low=float("nan"), high=float("nan"), reason="one group")
    again = iv.ReliabilityMonitor.load(dataclasses.replace(monitor, auroc=unknown).save(tmp_path / "m"))
    assert np.isnan(again.auroc.low)
    assert again.auroc.reason == "one group"


def test_every_edit_and_every_cut_is_noticed(folder):
    tensors = next(folder.glob("*.safetensors"))
    whole = {path: path.read_bytes() for path in (folder / "monitor.json", tensors)}
    for path, data in whole.items():
        for position in range(0, len(data), max(1, len(data) // 25)):
            for damaged in (data[:position], data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]):
                path.write_bytes(damaged)
                with pytest.raises(DataError, match=path.name):
                    iv.ReliabilityMonitor.load(folder)
        path.write_bytes(data)
    iv.ReliabilityMonitor.load(folder)
    tensors.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        iv.ReliabilityMonitor.load(folder)
    with pytest.raises(DataError, match="holds no monitor"):
        iv.ReliabilityMonitor.load(folder.parent / "absent")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("layer", -1, "layer -1"),
        ("layer", True, "layer True"),
        ("layer", "2", "layer '2'"),
        ("site", "pattern_of", "site 'pattern_of'"),
        ("slope", -0.5, "slope -0.5"),
        ("slope", None, "slope None"),
        ("offset", float("inf"), "offset inf"),
        ("C", 0, "C 0"),
        ("kinds", "digit", "kinds 'digit'"),
        ("kinds", [1], "kinds"),
        ("choices", {}, "choices"),
        ("position", "after_answer", "position"),
        ("model", {"name": "x"}, "model"),
        ("auroc", None, "auroc None"),
        ("threshold", {"value": 0.5}, "threshold"),
        ("tensors", "../../etc/passwd", "tensors"),
        ("tensors_sha256", 7, "tensors_sha256"),
        ("format", 99, "format 99"),
        ("extra", 1, "unknown field 'extra'"),
    ],
)
def test_fields_are_checked_even_where_the_digest_is_right(folder, name, value, said):
    path = folder / "monitor.json"
    facts = json.loads(path.read_text())
    facts[name] = value
    facts["sha256"] = monitor_files._digest({key: fact for key, fact in facts.items() if key != "sha256"})
    path.write_text(json.dumps(facts))
    with pytest.raises(DataError, match=r"monitor\.json") as error:
        iv.ReliabilityMonitor.load(folder)
    assert said in str(error.value)


@pytest.mark.parametrize("fault", ["nan", "shape", "dtype", "lengths", "range", "missing", "other"])
def test_tensors_are_checked_even_where_the_digest_is_right(folder, fault):
    from safetensors.numpy import load, save

    old = next(folder.glob("*.safetensors"))
    arrays = load(old.read_bytes())
    if fault == "nan":
        arrays["weights"][0] = np.nan
    elif fault == "shape":
        arrays["weights"] = arrays["weights"][None]
    elif fault == "dtype":
        arrays["scores"] = arrays["scores"].astype(np.float32)
    elif fault == "lengths":
        arrays["labels"] = arrays["labels"][1:]
    elif fault == "range":
        arrays["scores"] = arrays["scores"] + 1.0
    elif fault == "missing":
        del arrays["groups"]
    data = b"no tensors" if fault == "other" else save(arrays)
    facts = json.loads((folder / "monitor.json").read_text())
    facts["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    facts["sha256"] = monitor_files._digest({key: fact for key, fact in facts.items() if key != "sha256"})
    old.write_bytes(data)
    (folder / "monitor.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="safetensors"):
        iv.ReliabilityMonitor.load(folder)


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_nothing_in_the_folder_is_executed(folder, tmp_path):
    burnt = tmp_path / "burnt"
    bomb = pickle.dumps(_Bomb(burnt))
    for name in ("monitor.pkl", "pytorch_model.bin", "monitor.joblib", "monitor-0000000000000000.safetensors"):
        (folder / name).write_bytes(bomb)
    (folder / "monitor.py").write_text(f"import os; os.mkdir({str(burnt)!r})")
    iv.ReliabilityMonitor.load(folder)
    for path in (folder / "monitor.json", next(folder.glob("monitor-[!0]*.safetensors"))):
        path.write_bytes(bomb)
        with pytest.raises(DataError):
            iv.ReliabilityMonitor.load(folder)
    assert not burnt.exists()
    pickle.loads(bomb)  # it would have
    assert burnt.exists()


def test_a_stop_while_saving_leaves_the_old_one(monitor, folder, monkeypatch):
    from pathlib import Path

    real, written = Path.replace, []

    def stop_at_json(self, target):
        if Path(target).name == "monitor.json":
            raise KeyboardInterrupt
        written.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", stop_at_json)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(monitor, weights=monitor.weights * 3).save(folder)
    monkeypatch.undo()
    assert written
    np.testing.assert_array_equal(iv.ReliabilityMonitor.load(folder).weights, monitor.weights)


def test_a_folder_that_cannot_be_made(monitor, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make the folder"):
        monitor.save(tmp_path / "file" / "monitor")


def test_probes_that_saw_the_answer_are_refused(asked, vlm):
    values = asked[1]["resid_post"][:, :, 0].numpy()
    quick = {"permutations": 0, "resamples": 1000, "folds": 3, "inner_folds": 2, "layers": LAYERS}
    groups = [example.group for example in asked[0]]
    seen = iv.probe_layers(values, asked[2], groups, position="after_answer", site="resid_post", **quick)
    with pytest.raises(DataError, match="second forward step"):
        seen.monitor(values, vlm)
    nameless = iv.probe_layers(values, asked[2], groups, position="before_answer", **quick)
    with pytest.raises(DataError, match="does not say at which site"):
        nameless.monitor(values, vlm)


def test_other_activations_than_those_probed_are_refused(report, asked, vlm):
    examples, cache, _ = asked
    values = cache["resid_post"][:, :, 0]
    with pytest.raises(DataError, match="not the ones probed"):
        report.monitor(values.flip(0), vlm)
    with pytest.raises(DataError, match="not the ones probed"):
        report.monitor(values, vlm, standardise=False)
    with pytest.raises(DataError, match="activations of 90 examples; expected the report's 180"):
        report.monitor(values[:90], vlm)
    with pytest.raises(DataError, match="kinds of 2 examples"):
        report.monitor(values, vlm, kinds=["a", "b"])
    with pytest.raises(DataError, match="layer 0 was not probed"):
        report.monitor(values, vlm, layer=0)
    with pytest.raises(ModelError, match="the report is about testbed:llava"):
        report.monitor(cache, iv.load("testbed:qwen2_vl"))
    batch = vlm.encode([example.image for example in examples], [example.question for example in examples])
    first = vlm.capture(batch, "resid_post", [-2], LAYERS)
    with pytest.raises(DataError, match="last prompt token"):
        report.monitor(first, vlm)


def test_a_probe_of_another_kind_and_a_layer_of_choice(asked, vlm, report):
    examples, cache, right = asked
    chosen = report.monitor(cache, vlm, layer=2)
    assert chosen.layer == 2
    groups = [example.group for example in examples]
    sparse = iv.probe_layers(
        cache, right, groups, probe="l1", layers=[3], C=[0.1], folds=3, inner_folds=2, permutations=0, resamples=1000
    )
    with pytest.raises(DataError, match="probe 'l1'"):
        sparse.monitor(cache, vlm)


def test_hidden_states_of_another_width_or_broken(monitor):
    with pytest.raises(DataError, match=r"shape \(3, 64\)"):
        monitor.probability(np.zeros((3, 64)))
    broken = np.zeros((3, 128))
    broken[1, 5] = np.inf
    with pytest.raises(DataError, match="1 of 3 examples"):
        monitor.probability(broken)


def test_sites_without_an_answer_position_have_no_single_pass(vlm, asked):
    batch = vlm.encode(asked[0][0].image, asked[0][0].question)
    for site in ("nowhere", "pattern", "projector_out", "vision_post"):
        with pytest.raises(InterventionError, match=site):
            one_pass(vlm, batch, site, (0,))


def test_platts_sigmoid():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=4000)
    labels = rng.random(4000) < 1.0 / (1.0 + np.exp(-(0.5 * logits + 1.0)))
    slope, offset = platt(logits, labels)
    assert (slope, offset) == pytest.approx((0.5, 1.0), abs=0.12)
    # told apart perfectly: finite all the same; turned round: no information, the share of right answers
    assert np.isfinite(platt(np.array([-1.0, -2.0, 1.0, 2.0]), np.array([False, False, True, True]))).all()
    slope, offset = platt(-logits, labels)
    assert slope == 0.0
    assert 1.0 / (1.0 + np.exp(-offset)) == pytest.approx(labels.mean(), abs=0.01)
    # calibrated: over many examples the mean probability is the share of right answers
    slope, offset = platt(logits, labels)
    assert np.mean(1.0 / (1.0 + np.exp(-(slope * logits + offset)))) == pytest.approx(labels.mean(), abs=1e-3)
