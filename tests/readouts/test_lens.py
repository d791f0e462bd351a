"""The logit lens and the truth margin, against the models' own logits and hand-written layers."""

import math

import pytest
import torch

import interp_vlm as iv
from interp_vlm.readouts.lens import logit_entropy, output_confidence, unembed
from interp_vlm.readouts.metrics import MetricContext
from interp_vlm.readouts.spelling import answer_vocabulary, prompt_ends, spellings
from tests.models.tiny_model import noise
from tests.tiny import FAMILIES, build

QUESTIONS = ["is there a red cat on the left of the picture?", "how many dogs?", "what colour is the square?"]


@pytest.fixture(scope="module")
def made():
    """`made(family)`: a tiny model in double precision and a left-padded batch of three."""
    known = {}

    def made(family: str) -> tuple[iv.VLM, iv.Batch]:
        if family not in known:
            vlm = iv.VLM(*build(family, dtype=torch.float64), name=family)
            known[family] = vlm, vlm.encode([noise(24, 24, seed) for seed in range(3)], QUESTIONS)
        return known[family]

    return made


@pytest.fixture(params=FAMILIES)
def pair(request, made):
    return made(request.param)


def every_logit(vlm, batch):
    with torch.no_grad():
        return vlm.model(**batch.inputs).logits


class TestLens:
    def test_the_last_layer_gives_the_models_own_logits_at_every_position(self, pair):
        vlm, batch = pair
        own = every_logit(vlm, batch)
        lens = iv.logit_lens(vlm, batch, positions="all", layers=[-1], keep_logits=True)
        for row, tokens in enumerate(batch.tokens):
            found = lens.logits[row, 0][lens.mask[row]]
            torch.testing.assert_close(found, own[row, tokens.all], rtol=0, atol=1e-10)
        assert any(len(tokens.image) for tokens in batch.tokens)

    def test_an_inner_layer_is_normed_once_by_hand(self, pair):
        vlm, batch = pair
        lens = iv.logit_lens(vlm, batch, positions="image", layers=[1], site="resid_mid", keep_logits=True)
        stream = vlm.capture(batch, "resid_mid", "image", 1)["resid_mid"][:, 0]
        norm = vlm.model.get_submodule(vlm.anatomy.final_norm)
        gain = norm.weight + 1 if vlm.anatomy.norm == "gemma_rms" else norm.weight
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        normed = gain * stream / (stream.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        logits = normed @ vlm.model.get_submodule(vlm.anatomy.head).weight.T
        if vlm.anatomy.final_softcap:
            logits = vlm.anatomy.final_softcap * torch.tanh(logits / vlm.anatomy.final_softcap)
        # the models' norms compute in single precision whatever their dtype
        torch.testing.assert_close(lens.logits[:, 0][lens.mask], logits[lens.mask], rtol=1e-5, atol=1e-5)

    def test_a_second_norm_would_be_seen(self, made):
        vlm, batch = made("llava")
        norm = vlm.model.get_submodule(vlm.anatomy.final_norm)
        final = vlm.capture(batch, "resid_post", "last", -1)["resid_post"][:, 0, 0]
        own = vlm.run(batch).logits
        assert (unembed(vlm, final) - own).abs().max() < 1e-10
        assert (unembed(vlm, norm(final)) - own).abs().max() > 1e-2

    def test_measures_are_those_of_the_logits(self, pair):
        vlm, batch = pair
        lens = iv.logit_lens(vlm, batch, positions=iv.select.text, keep_logits=True, k=3)
        for row, layer, column in ((0, 0, 1), (1, 2, -1), (2, 1, 0)):
            column = int(lens.mask[row].nonzero().flatten()[column])
            logits = lens.logits[row, layer, column]
            probabilities = [math.exp(x - float(logits.max())) for x in logits.tolist()]
            probabilities = [p / sum(probabilities) for p in probabilities]
            entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
            assert float(lens.entropy[row, layer, column]) == pytest.approx(entropy, abs=1e-9)
            assert float(lens.confidence[row, layer, column]) == pytest.approx(max(probabilities), abs=1e-12)
            best = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:3]
            assert lens.top[row, layer, column].tolist() == best

    def test_chunks_change_nothing(self, made, monkeypatch):
        vlm, batch = made("qwen2_vl")
        whole = iv.logit_lens(vlm, batch, positions="all", correct="yes", keep_logits=True)
        monkeypatch.setattr("interp_vlm.readouts.lens.CHUNK", 1)
        pieces = iv.logit_lens(vlm, batch, positions="all", correct="yes", keep_logits=True)
        for name in ("margin", "probability", "entropy", "confidence", "logits"):
            torch.testing.assert_close(
                getattr(whole, name), getattr(pieces, name), rtol=1e-9, atol=1e-9, equal_nan=True
            )

    def test_padding_is_nan_and_left_out_of_the_frame(self, made):
        vlm, batch = made("llava")
        lens = iv.logit_lens(vlm, batch, positions="question", layers=[0, 2])
        assert not lens.mask.all()
        assert lens.margin.transpose(1, 2)[~lens.mask].isnan().all()
        frame = lens.frame()
        assert len(frame) == 2 * int(lens.mask.sum())
        assert not frame.isna().any(axis=None)
        assert set(frame["layer"]) == {0, 2}
        row = frame[(frame["example"] == 1) & (frame["layer"] == 2)].iloc[0]
        assert row["position"] == int(batch.tokens[1].question[0])
        assert row["piece"] == batch.tokens[1].pieces[row["position"]]
        assert row["entropy"] == pytest.approx(float(lens.entropy[1, 1, 0]))
        assert row["top"] == answer_vocabulary(vlm.tokenizer).text(int(lens.top[1, 1, 0, 0]))

    def test_plot_draws_each_measure(self, made):
        lens = iv.logit_lens(*made("llava"), positions="question")
        for measure in ("margin", "probability", "entropy", "confidence"):
            assert lens.plot(measure).axes[0].get_xlabel() == "layer (resid_post)"
        with pytest.raises(iv.InterventionError, match="measure 'mood'"):
            lens.plot("mood")

    def test_bad_input_is_an_error(self, made):
        vlm, batch = made("llava")
        with pytest.raises(iv.InterventionError, match=r"logit lens of 'mlp_out'.*iv\.truth_margin"):
            iv.logit_lens(vlm, batch, site="mlp_out")
        with pytest.raises(iv.InterventionError, match="layer"):
            iv.logit_lens(vlm, batch, layers=[9])
        with pytest.raises(iv.SelectionError, match="same answer"):
            iv.logit_lens(vlm, batch, correct="yes", wrong="yes")
        with pytest.raises(iv.SelectionError, match="without a right one"):
            iv.logit_lens(vlm, batch, wrong="yes")
        with pytest.raises(iv.DataError, match="2 right answers for 3 examples"):
            iv.logit_lens(vlm, batch, correct=["yes", "no"])
        with pytest.raises(iv.SelectionError, match="no single token"):
            iv.logit_lens(vlm, batch, correct="an umbrella of many colours")
        with pytest.raises(iv.SelectionError, match="has no logit"):
            iv.logit_lens(vlm, batch, correct=10**6)


class TestMargin:
    def test_of_the_last_layer_is_the_metric_of_the_run(self, pair):
        vlm, batch = pair
        logits = vlm.run(batch).logits
        context = MetricContext(clean_logits=logits, batch=batch, tokenizer=vlm.tokenizer)
        own = iv.logit_lens(vlm, batch, layers=-1)
        torch.testing.assert_close(own.margin[:, 0, 0], iv.logit_difference(logits, context), rtol=0, atol=1e-9)
        torch.testing.assert_close(own.probability[:, 0, 0], iv.answer_probability(logits, context))
        assert not own.given
        fixed = iv.logit_lens(vlm, batch, layers=-1, correct=["yes", "no", "yes"], wrong=["no", "yes", "no"])
        metric = iv.logit_difference(["yes", "no", "yes"], ["no", "yes", "no"])
        torch.testing.assert_close(fixed.margin[:, 0, 0], metric(logits, context), rtol=0, atol=1e-9)
        assert fixed.given
        assert fixed.answers == ("yes", "no", "yes")

    def test_of_a_given_answer_against_the_best_other_by_hand(self, made):
        vlm, batch = made("llava")
        lens = iv.logit_lens(vlm, batch, correct=["yes", "no", "red"], keep_logits=True)
        vocabulary, ends = answer_vocabulary(vlm.tokenizer), prompt_ends(batch, vlm.tokenizer)
        for row, word in enumerate(["yes", "no", "red"]):
            (token, *_) = spellings(vlm.tokenizer, ends[row], word)
            for layer in range(3):
                logits = lens.logits[row, layer, 0].tolist()
                label = vocabulary.answer_of.tolist()
                own = [i for i, answer in enumerate(label) if answer == label[token]]
                rival = max((i for i in range(len(logits)) if i not in own), key=lambda i: logits[i])
                others = [i for i, answer in enumerate(label) if answer == label[rival]]
                expected = math.log(sum(math.exp(logits[i]) for i in own)) - math.log(
                    sum(math.exp(logits[i]) for i in others)
                )
                assert float(lens.margin[row, layer, 0]) == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize("answers", ["own", "words", "tokens"])
    def test_parts_add_up(self, pair, answers):
        vlm, batch = pair
        given = {"own": {}, "words": {"correct": "yes", "wrong": "no"}, "tokens": {"correct": 11, "wrong": 12}}[answers]
        split = iv.truth_margin(vlm, batch, **given)
        parts = split.embedding + split.attention.sum(1) + split.mlp.sum(1) + split.between.sum(1) + split.constant
        torch.testing.assert_close(parts, split.total, rtol=0, atol=1e-10)
        assert float(split.attention.abs().min()) > 0
        assert float(split.mlp.abs().min()) > 0
        if answers == "tokens":
            head = vlm.model.get_submodule(vlm.anatomy.head)
            assert head.bias is None
            assert float(split.constant.abs().max()) == 0.0
            logits = vlm.run(batch).logits
            cap = vlm.anatomy.final_softcap
            raw = logits if cap is None else cap * torch.atanh(logits / cap)
            torch.testing.assert_close(split.total[:, 0], raw[:, 11] - raw[:, 12], rtol=0, atol=1e-10)
        if vlm.anatomy.final_softcap is None:
            lens = iv.logit_lens(vlm, batch, layers=-1, **given)
            torch.testing.assert_close(split.total, lens.margin[:, 0], rtol=0, atol=1e-10)

    def test_parts_add_up_at_the_pictures_own_tokens(self, pair):
        vlm, batch = pair
        split = iv.truth_margin(vlm, batch, positions="image", correct="yes", wrong="no")
        assert float(split.unexplained[split.mask].abs().max()) < 1e-10
        assert bool((split.between[:, 1:].transpose(1, 2)[split.mask] != 0).any()) == vlm.anatomy.between_layers

    def test_chunks_change_nothing(self, made, monkeypatch):
        vlm, batch = made("qwen3_vl")
        whole = iv.truth_margin(vlm, batch, "all").frame()
        monkeypatch.setattr("interp_vlm.readouts.lens.CHUNK", 1)
        pieces = iv.truth_margin(vlm, batch, "all").frame()
        assert (whole["value"] - pieces["value"]).abs().max() < 1e-9

    def test_each_part_is_its_own_vector_against_the_direction(self, made):
        """One part by hand, from hooks and the norm's formula."""
        vlm, batch = made("paligemma")
        split = iv.truth_margin(vlm, batch, correct=11, wrong=12)
        seen = {}
        layer = vlm.model.get_submodule(vlm.anatomy.layers)[1]
        norm = vlm.model.get_submodule(vlm.anatomy.final_norm)
        hooks = [
            layer.mlp.register_forward_hook(lambda *a: seen.update(mlp=a[2])),
            layer.self_attn.register_forward_hook(lambda *a: seen.update(attention=a[2][0])),
            norm.register_forward_hook(lambda *a: seen.update(final=a[1][0])),
        ]
        try:
            every_logit(vlm, batch)
        finally:
            for hook in hooks:
                hook.remove()
        head = vlm.model.get_submodule(vlm.anatomy.head).weight
        for row, last in enumerate(batch.last.tolist()):
            final = seen["final"][row, last]
            direction = (1 + norm.weight) * (head[11] - head[12]) / (final.square().mean() + norm.eps).sqrt()
            for name in ("mlp", "attention"):
                expected = float(seen[name][row, last] @ direction)
                assert float(getattr(split, name)[row, 1, 0]) == pytest.approx(expected, rel=1e-5)

    def test_something_left_out_is_noticed(self, made):
        """A row that takes Gemma 2's attention before its second norm misses what is added."""
        import dataclasses

        model, processor = build("paligemma2", dtype=torch.float64)
        vlm = iv.VLM(model, processor, name="wrong row")
        vlm.anatomy = dataclasses.replace(vlm.anatomy, attn_out="self_attn")
        vlm._engine.access.anatomy = vlm.anatomy
        batch = vlm.encode(noise(24, 24), QUESTIONS[0])
        with pytest.raises(iv.ModelError, match=r"wrong row's layers miss the margin.*'paligemma'"):
            iv.truth_margin(vlm, batch)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("family", ["llava", "paligemma2", "qwen3_vl"])
    def test_of_half_precision_within_its_rounding(self, family, dtype):
        vlm = iv.VLM(*build(family, dtype=dtype), name=family)
        batch = vlm.encode([noise(24, 24, seed) for seed in range(3)], QUESTIONS)
        split = iv.truth_margin(vlm, batch, "all", correct="yes")
        assert float(split.unexplained[split.mask].abs().max()) < 40 * torch.finfo(dtype).eps
        lens = iv.logit_lens(vlm, batch, layers=-1, keep_logits=True)
        assert torch.equal(lens.logits[:, 0, 0], vlm.run(batch).logits)

    def test_frame_share_and_running_sum(self, made):
        vlm, batch = made("qwen3_vl")
        split = iv.truth_margin(vlm, batch, positions="text", correct="yes")
        frame = split.frame()
        summed = frame.groupby(["example", "position"])["value"].sum()
        totals = frame.groupby(["example", "position"])["total"].first()
        assert (summed - totals).abs().max() < 1e-10
        assert len(summed) == int(split.mask.sum())
        by_hand = frame[frame["part"].isin(["mlp", "attention"])].pivot_table(
            index="example", columns="part", values="value", aggfunc="sum"
        )
        last = iv.truth_margin(vlm, batch, correct="yes")
        one = last.frame()
        one = one[one["part"].isin(["mlp", "attention"])].groupby(["example", "part"])["value"].sum().unstack()
        expected = one["mlp"] / (one["mlp"] + one["attention"])
        assert last.mlp_share[:, 0].tolist() == pytest.approx(expected.tolist())
        torch.testing.assert_close(last.running[:, -1] + last.unexplained, last.total)
        assert set(by_hand.columns) == {"mlp", "attention"}
        assert [bar.get_height() for bar in last.plot().axes[0].patches][:3] == pytest.approx(
            last.attention[:, :, 0].mean(0).tolist()
        )

    def test_single_precision_and_the_embedded_model(self):
        vlm = iv.load("testbed:llava")
        examples = iv.data.digit_scenes(n=8)
        batch = vlm.encode([e.image for e in examples], [e.question for e in examples])
        right = [e.answer for e in examples]
        lens = iv.logit_lens(vlm, batch, correct=right)
        split = iv.truth_margin(vlm, batch, correct=right)
        assert float(split.unexplained.abs().max()) < 1e-3
        torch.testing.assert_close(split.total.float(), lens.margin[:, -1], rtol=0, atol=1e-3)
        # a trained model knows the answer at its last layer, not at its first
        assert float((lens.margin[:, -1, 0] > 0).double().mean()) > 0.7
        assert float(lens.margin[:, -1].mean()) > float(lens.margin[:, 0].mean())


class TestEntropy:
    def test_closed_forms(self):
        assert float(logit_entropy(torch.zeros(64, dtype=torch.double))) == pytest.approx(math.log(64))
        certain = torch.tensor([0.0, -math.inf, -math.inf])
        assert float(logit_entropy(certain)) == 0.0
        assert float(output_confidence(certain)) == 1.0
        p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.double)
        assert float(logit_entropy(p.log() + 3)) == pytest.approx(1.5 * math.log(2))

    def test_half_precision_does_not_lose_the_tail(self):
        logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).half()
        assert float(logit_entropy(logits)) == pytest.approx(float(logit_entropy(logits.double())), rel=1e-5)
        expected = torch.distributions.Categorical(logits=logits.double()).entropy()
        assert float(logit_entropy(logits)) == pytest.approx(float(expected), rel=1e-5)


def test_modules_are_the_models_own():
    """The lens calls modules; nothing of the model is copied or changed."""
    model, processor = build("llava", dtype=torch.float64)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    vlm = iv.VLM(model, processor)
    iv.logit_lens(vlm, vlm.encode(noise(24, 24), "how many?"))
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
