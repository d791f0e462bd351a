"""Self-consistency, against top-p by hand, exact probabilities and Hugging Face's own warpers."""

import itertools
import math
from collections import Counter

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TopPLogitsWarper

import interp_vlm as iv
from interp_vlm.data.scorers import vqa_normalise
from interp_vlm.readouts.consistency import _uniforms, _vote, draw
from interp_vlm.readouts.spelling import answer_vocabulary, normalised
from tests.models.tiny_model import noise
from tests.tiny import build

QUESTIONS = ["is there a red cat on the left of the picture?", "how many dogs?", "what colour is the square?"]


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Probabilities of the tokens that may be drawn, by hand."""
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    shares = [w / sum(weights) for w in weights]
    kept, reached = {}, 0.0
    for token in sorted(range(len(shares)), key=lambda i: -shares[i]):
        if reached >= top_p:
            break
        kept[token] = shares[token]
        reached += shares[token]
    return {token: share / sum(kept.values()) for token, share in kept.items()}


@pytest.fixture(scope="module")
def made():
    known = {}

    def made(family: str) -> tuple[iv.VLM, iv.Batch]:
        if family not in known:
            vlm = iv.VLM(*build(family, dtype=torch.float64), name=family)
            known[family] = vlm, vlm.encode([noise(24, 24, seed) for seed in range(3)], QUESTIONS)
        return known[family]

    return made


class TestDraw:
    @given(
        st.lists(st.floats(-8, 8), min_size=1, max_size=12, unique=True),
        st.floats(0.2, 3.0),
        st.floats(0.05, 1.0),
        st.floats(0, 0.9999),
    )
    def test_is_the_inverse_of_the_cumulated_nucleus(self, logits, temperature, top_p, u):
        kept = nucleus(logits, temperature, top_p)
        bounds, reached = [], 0.0
        for token, share in sorted(kept.items(), key=lambda item: -item[1]):
            bounds.append((reached, reached + share, token))
            reached += share
        (found,) = draw(torch.tensor([logits]).double(), torch.tensor([[u]]).double(), temperature, top_p)[0].tolist()
        allowed = [token for low, high, token in bounds if low - 1e-9 <= u <= high + 1e-9]
        assert found in allowed

    @pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 1.0), (2.0, 0.5), (0.3, 0.99)])
    def test_draws_as_often_as_is_probable(self, temperature, top_p):
        generator = torch.Generator().manual_seed(0)
        logits = 2 * torch.randn(1, 40, generator=generator, dtype=torch.double)
        drawn = draw(logits, torch.rand(1, 20_000, generator=generator, dtype=torch.double), temperature, top_p)
        kept = nucleus(logits[0].tolist(), temperature, top_p)
        counts = Counter(drawn[0].tolist())
        assert set(counts) <= set(kept)
        common = [token for token, share in kept.items() if share * 20_000 >= 5]
        observed = [counts[token] for token in common]
        expected = [kept[token] for token in common]
        expected = [share / sum(expected) * sum(observed) for share in expected]
        if len(common) > 1:
            assert scipy.stats.chisquare(observed, expected).pvalue > 0.001
        # and another distribution is found out
        flat = nucleus(logits[0].tolist(), 3 * temperature, top_p)
        wrong = [flat.get(token, 0.0) for token in common]
        wrong = [share / sum(wrong) * sum(observed) for share in wrong]
        assert scipy.stats.chisquare(observed, wrong).pvalue < 1e-6

    def test_the_nucleus_is_hugging_faces(self):
        logits = 2 * torch.randn(6, 50, generator=torch.Generator().manual_seed(1), dtype=torch.double)
        kept = TopPLogitsWarper(top_p=0.9)(torch.zeros(6, 1), logits / 0.7) > -math.inf
        drawn = draw(logits, torch.linspace(0, 1 - 1e-12, 30_001, dtype=torch.double).expand(6, -1), 0.7, 0.9)
        assert [set(row.tolist()) for row in drawn] == [set(row.nonzero().flatten().tolist()) for row in kept]

    def test_one_certain_token_is_all_there_is(self):
        logits = torch.tensor([[-math.inf, 0.0, -math.inf]])
        assert draw(logits, torch.tensor([[0.0, 0.5, 1 - 1e-9]]), 0.7, 0.9).tolist() == [[1, 1, 1]]


class TestSampling:
    @pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl"])
    def test_one_token_answers_follow_the_answer_position(self, made, family):
        vlm, batch = made(family)
        sampled = iv.self_consistency(vlm, batch, k=3000, temperature=0.7, top_p=0.9)
        vocabulary = answer_vocabulary(vlm.tokenizer)
        for row, logits in enumerate(vlm.run(batch).logits):
            kept = nucleus(logits.tolist(), 0.7, 0.9)
            expected = Counter()
            for token, share in kept.items():
                expected[vocabulary.text(token)] += share
            observed = Counter(sampled.samples[row])
            assert set(observed) <= set(expected)
            common = [text for text, share in expected.items() if share * 3000 >= 5]
            if len(common) > 1:
                shares = [expected[text] for text in common]
                counts = [observed[text] for text in common]
                fit = [share / sum(shares) * sum(counts) for share in shares]
                assert scipy.stats.chisquare(counts, fit).pvalue > 0.001
            assert sampled.greedy[row] == vocabulary.text(int(logits.argmax()))

    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
    def test_samples_do_not_depend_on_the_batch(self, made, family, steps):
        vlm, batch = made(family)
        options = {"k": 4, "temperature": 1.5, "top_p": 0.95, "max_new_tokens": steps}
        together = iv.self_consistency(vlm, batch, **options)
        alone = [vlm.encode(noise(24, 24, seed), QUESTIONS[seed]) for seed in (2, 0, 1)]
        apart = iv.self_consistency(vlm, alone, **options)
        assert [together.samples[i] for i in (2, 0, 1)] == list(apart.samples)
        assert [together.greedy[i] for i in (2, 0, 1)] == list(apart.greedy)
        assert len({sample for row in together.samples for sample in row}) > 3

    def test_first_samples_stay_with_a_larger_k_and_change_with_the_seed(self, made):
        vlm, batch = made("llava")
        few, many = (iv.self_consistency(vlm, batch, k=k, temperature=2.0, top_p=1.0) for k in (3, 8))
        assert [row[:3] for row in many.samples] == list(few.samples)
        other = iv.self_consistency(vlm, batch, k=8, temperature=2.0, top_p=1.0, seed=1)
        assert other.samples != many.samples

    @pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl"])
    def test_long_answers_are_a_plain_loop_of_forward_passes(self, made, family):
        """Without a cache and one example at a time: the whole text again for every token."""
        vlm, _ = made(family)
        image, question, steps = noise(24, 24, 1), QUESTIONS[1], 3
        batch = vlm.encode(image, question)
        sampled = iv.self_consistency(vlm, batch, k=2, temperature=1.2, top_p=0.9, max_new_tokens=steps)
        first = iv.self_consistency(vlm, batch, k=2, temperature=1.2, top_p=0.9)
        numbers = _uniforms(batch, 0, 2, steps)
        for sample in range(2):
            inputs, ids = dict(batch.inputs), []
            for step in range(steps):
                with torch.no_grad():
                    logits = vlm.model(**inputs).logits[0, -1]
                kept = sorted(nucleus(logits.tolist(), 1.2, 0.9).items(), key=lambda item: -item[1])
                u, reached = float(numbers[0, step, sample]), itertools.accumulate(share for _, share in kept)
                ends = zip((token for token, _ in kept), reached, strict=True)
                token = next((token for token, end in ends if u < end), kept[-1][0])
                ids.append(token)
                if token == vlm.tokenizer.eos_token_id:
                    break
                for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
                    if name in inputs:
                        new = {"input_ids": token, "attention_mask": 1, "token_type_ids": 1}.get(name, 0)
                        inputs[name] = torch.cat([inputs[name], torch.tensor([[new]])], dim=1)
            assert sampled.samples[0][sample] == vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert first.samples[0][sample] == answer_vocabulary(vlm.tokenizer).text(ids[0])

    def test_generation_settings_of_the_checkpoint_do_not_count(self, made):
        vlm, batch = made("llava")
        options = {"k": 3, "temperature": 1.5, "max_new_tokens": 3}
        before = iv.self_consistency(vlm, batch, **options).samples
        settings = vlm.model.generation_config
        kept = settings.repetition_penalty, settings.top_k, settings.do_sample
        try:
            settings.repetition_penalty, settings.top_k, settings.do_sample = 5.0, 1, True
            assert iv.self_consistency(vlm, batch, **options).samples == before
        finally:
            settings.repetition_penalty, settings.top_k, settings.do_sample = kept

    def test_cold_samples_are_the_greedy_answer(self, made):
        vlm, batch = made("llava")
        for steps in (1, 3):
            sampled = iv.self_consistency(vlm, batch, k=3, temperature=1e-4, max_new_tokens=steps)
            assert [set(row) for row in sampled.samples] == [{greedy} for greedy in sampled.greedy]
            assert sampled.agreement.tolist() == [1.0, 1.0, 1.0]


class TestVotes:
    def test_are_counted_on_normalised_answers(self, made):
        vlm, batch = made("llava")
        sampled = iv.self_consistency(vlm, batch, k=40, temperature=2.0, top_p=1.0)
        for row, samples in enumerate(sampled.samples):
            votes = [normalised(sample) for sample in samples]
            most = max(votes.count(vote) for vote in votes)
            assert float(sampled.agreement[row]) == most / 40
            assert votes.count(sampled.majority[row]) == most
        merged = iv.self_consistency(vlm, batch, k=40, temperature=2.0, top_p=1.0, normaliser=lambda text: "same")
        assert merged.samples == sampled.samples
        assert merged.agreement.tolist() == [1.0, 1.0, 1.0]
        assert iv.self_consistency(vlm, batch, k=2, normaliser=vqa_normalise).normaliser is vqa_normalise

    def test_ties_go_to_the_greedy_answer_then_to_the_first(self):
        assert _vote(["a", "b", "b", "a"], "b") == ("b", 0.5)
        assert _vote(["a", "b", "b", "a"], "c") == ("a", 0.5)
        assert _vote(["a", "b", "b"], "a") == ("b", 2 / 3)

    def test_frame_and_whose_correctness(self, made):
        vlm, batch = made("llava")
        greedy = iv.self_consistency(vlm, batch, k=9, temperature=2.0, top_p=1.0)
        majority = iv.self_consistency(vlm, batch, k=9, temperature=2.0, top_p=1.0, correctness="majority")
        assert greedy.answers == greedy.greedy
        assert majority.answers == majority.majority == greedy.majority
        frame = majority.frame()
        assert frame["correctness"].tolist() == ["majority"] * 3
        assert frame["agreement"].tolist() == majority.agreement.tolist()
        votes = [[normalised(sample) for sample in row] for row in majority.samples]
        assert frame["distinct"].tolist() == [len(set(row)) for row in votes]
        shares = [row.count(normalised(g)) / 9 for row, g in zip(votes, majority.greedy, strict=True)]
        assert frame["agrees_with_greedy"].tolist() == shares

    @pytest.mark.parametrize(
        "options", [{"k": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_new_tokens": 0}]
    )
    def test_bad_settings_are_refused(self, made, options):
        with pytest.raises(iv.SelectionError, match="expected"):
            iv.self_consistency(*made("llava"), **options)
        with pytest.raises(iv.DataError, match="no batch"):
            iv.self_consistency(made("llava")[0], [])

    def test_on_the_embedded_model_agreement_tells_something(self):
        vlm = iv.load("testbed:llava")
        examples = iv.data.digit_scenes(n=48)
        batch = vlm.encode([e.image for e in examples], [e.question for e in examples])
        sampled = iv.self_consistency(vlm, batch)
        right = torch.tensor([g == e.answer for g, e in zip(sampled.greedy, examples, strict=True)])
        assert sampled.k == 10
        assert float(right.double().mean()) > 0.8
        assert float(sampled.agreement[right].mean()) > 0.8
