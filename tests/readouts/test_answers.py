"""Closed scores and answers against loops over Python floats."""

import copy
import math
import pickle

import pytest
import torch

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.answers import Answer, closed_scores, read_answers, spellings

PROMPTS = ["is there a red cat in the picture?", "is there a Two cat in the picture? answer:\n", "left right"]
CHOICES = ["yes", "no", "red"]


def probabilities(row: torch.Tensor) -> list[float]:
    peak = max(row.tolist())
    weights = [math.exp(value - peak) for value in row.tolist()]
    return [weight / math.fsum(weights) for weight in weights]


def test_closed_scores_are_the_summed_probabilities(tokenizer, logits_for):
    logits = logits_for(tokenizer, len(PROMPTS))
    scores = closed_scores(logits, tokenizer, PROMPTS, CHOICES)
    assert scores.logprobs.shape == (3, 3)
    for row, prompt in enumerate(PROMPTS):
        shares = probabilities(logits[row])
        expected = [math.fsum(shares[i] for i in spellings(tokenizer, prompt, choice)) for choice in CHOICES]
        assert scores.logprobs[row].exp().tolist() == pytest.approx(expected, rel=1e-12)
        assert float(scores.coverage[row]) == pytest.approx(math.fsum(expected), rel=1e-12)
        assert int(scores.best[row]) == expected.index(max(expected))
        assert scores.ids[row] == tuple(spellings(tokenizer, prompt, choice) for choice in CHOICES)


def test_closed_scores_as_a_table(tokenizer, logits_for):
    scores = closed_scores(logits_for(tokenizer, 3), tokenizer, PROMPTS, CHOICES)
    frame = scores.frame()
    assert frame.columns.tolist() == ["example", "choice", "logprob", "coverage"]
    assert frame["choice"].tolist() == CHOICES * 3
    assert frame["logprob"].tolist() == scores.logprobs.flatten().tolist()
    assert frame["coverage"].tolist() == scores.coverage.repeat_interleave(3).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_are_summed_in_single_precision(tokenizer, logits_for, dtype):
    logits = logits_for(tokenizer, 3).to(dtype)
    scores = closed_scores(logits, tokenizer, PROMPTS, CHOICES)
    exact = closed_scores(logits.double(), tokenizer, PROMPTS, CHOICES)
    assert scores.logprobs.dtype == torch.float32
    assert torch.allclose(scores.logprobs.double(), exact.logprobs, atol=1e-5)


def test_a_spelling_may_have_no_probability_at_all(tokenizers, logits_for):
    tokenizer = tokenizers["bytes"]
    logits = logits_for(tokenizer, 3)
    silent = spellings(tokenizer, PROMPTS[0], "yes")
    logits[:, list(silent)] = -math.inf
    scores = closed_scores(logits, tokenizer, PROMPTS, ["yes", "no"])
    assert scores.logprobs[0, 0] == -math.inf
    assert scores.coverage[0] == scores.logprobs[0, 1].exp()


@pytest.mark.parametrize("choices", [["yes", " Yes"], [], "yes"])
def test_choices_must_be_a_closed_set(tokenizer, logits_for, choices):
    with pytest.raises(SelectionError, match="no closed set"):
        closed_scores(logits_for(tokenizer, 3), tokenizer, PROMPTS, choices)


@pytest.mark.parametrize("prompts", [PROMPTS[:2], "left right"])
def test_one_prompt_per_row(tokenizer, logits_for, prompts):
    with pytest.raises(DataError, match="for 3 rows of logits"):
        closed_scores(logits_for(tokenizer, 3), tokenizer, prompts, CHOICES)


def test_logits_without_the_tokenizers_ids_are_refused(tokenizers, logits_for):
    tokenizer = tokenizers["bytes"]
    with pytest.raises(SelectionError, match=r"token \d+ has no logit; expected a token id from 0 to 9"):
        closed_scores(logits_for(tokenizer, 3)[:, :10], tokenizer, PROMPTS, CHOICES)


def test_nan_has_no_answer(tokenizer, logits_for):
    logits = logits_for(tokenizer, 3)
    logits[1, 5] = math.nan
    for ask in (
        lambda: read_answers(logits, tokenizer),
        lambda: closed_scores(logits, tokenizer, PROMPTS, CHOICES),
    ):
        with pytest.raises(DataError, match=r"examples \[1\] contain NaN"):
            ask()


def test_open_answers_merge_spellings(tokenizer, logits_for):
    logits = logits_for(tokenizer, 4, seed=1)
    for row, answer in zip(logits, read_answers(logits, tokenizer, k=7), strict=True):
        shares, merged = probabilities(row), {}
        for token, share in enumerate(shares):
            text = tokenizer.decode([token])
            key = f"<id {token}>" if "\ufffd" in text else text.strip().casefold()
            merged[key] = merged.get(key, 0.0) + share
        token = shares.index(max(shares))
        ranked = sorted(merged, key=lambda key: -merged[key])[:7]
        assert (answer.token, answer.strip()) == (token, str(answer))
        assert answer.logprob == pytest.approx(math.log(shares[token]), rel=1e-12)
        assert list(answer.scores) == ranked
        assert list(answer.scores.values()) == pytest.approx([math.log(merged[key]) for key in ranked], rel=1e-9)
        assert answer.coverage == pytest.approx(sum(merged[key] for key in ranked), rel=1e-12)


def test_an_open_answer_is_the_best_tokens_text_and_always_listed(tokenizers):
    tokenizer = tokenizers["bytes"]
    logits = torch.full((1, len(tokenizer)), -20.0)
    spelt = spellings(tokenizer, PROMPTS[0], "yes")
    logits[0, list(spelt)] = 1.0
    red = tokenizer.convert_tokens_to_ids("ĠRed")
    logits[0, red] = 1.5
    (answer,) = read_answers(logits, tokenizer, k=1)
    assert (answer, answer.token, list(answer.scores)) == ("Red", red, ["red"])
    (answer,) = read_answers(logits, tokenizer, k=2)
    assert list(answer.scores) == ["yes", "red"]  # six spellings of yes weigh more together
    assert answer.coverage == pytest.approx(1.0, abs=1e-5)


def test_an_id_beyond_the_tokenizer_is_shown_as_such(tokenizer, logits_for):
    logits = logits_for(tokenizer, 1, extra=3)
    logits[0, -1] = 50.0
    (answer,) = read_answers(logits, tokenizer)
    assert answer == f"<id {len(tokenizer) + 2}>"
    assert answer.scores[answer] == pytest.approx(0.0, abs=1e-9)


def test_closed_answers(tokenizer, logits_for):
    logits = logits_for(tokenizer, 3, seed=2)
    scores = closed_scores(logits, tokenizer, PROMPTS, CHOICES)
    answers = read_answers(logits, tokenizer, PROMPTS, CHOICES)
    for row, answer in enumerate(answers):
        assert answer == CHOICES[int(scores.best[row])]
        assert answer.scores == dict(zip(CHOICES, scores.logprobs[row].tolist(), strict=True))
        assert list(answer.scores.values()) == sorted(answer.scores.values(), reverse=True)
        assert answer.coverage == float(scores.coverage[row])
        own = spellings(tokenizer, PROMPTS[row], answer)
        shares = probabilities(logits[row])
        assert answer.token == max(own, key=lambda token: shares[token])
        assert answer.logprob == pytest.approx(math.log(shares[answer.token]), rel=1e-12)


def test_choices_need_prompts(tokenizer, logits_for):
    with pytest.raises(SelectionError, match="prompt_ends"):
        read_answers(logits_for(tokenizer, 1), tokenizer, choices=["yes", "no"])


def test_answers_are_strings_that_survive_copies():
    answer = Answer("yes", {"yes": -0.1}, 0.9, 3, -0.2)
    assert f"{answer}" == "yes"
    assert {"yes": 1}[answer] == 1
    for same in (copy.copy(answer), copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
        assert (same, same.scores, same.coverage, same.token, same.logprob) == ("yes", {"yes": -0.1}, 0.9, 3, -0.2)
