"""Metrics against loops over the vocabulary, and what algebra says of them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.answers import (
    MetricContext,
    answer_logprob,
    answer_probability,
    flipped,
    logit_difference,
    spellings,
)

PROMPTS = ["is there a red cat in the picture?", "is there a Two cat in the picture?", "left right"]


def name_of(metric):
    """The same on every worker, which the repr of a function is not."""
    return metric.__name__


METRICS = [logit_difference, answer_logprob, answer_probability, flipped, logit_difference("yes", "no")]


@pytest.fixture
def context(tokenizer, encode, logits_for) -> MetricContext:
    """Three examples with random clean logits."""
    return MetricContext(logits_for(tokenizer, 3, seed=5), encode(tokenizer, PROMPTS), tokenizer)


def answer_of(tokenizer, token: int) -> str:
    text = tokenizer.decode([token])
    return f"<id {token}>" if "\ufffd" in text else text.strip().casefold()


def log_sum(values: list[float]) -> float:
    peak = max(values)
    return peak + math.log(math.fsum(math.exp(value - peak) for value in values))


def by_loop(tokenizer, row: list[float], clean: list[float]) -> dict[str, float]:
    """Every metric of one example, the slow and obvious way."""
    written: dict[str, list[int]] = {}
    for token in range(len(row)):
        written.setdefault(answer_of(tokenizer, token), []).append(token)
    mine = answer_of(tokenizer, clean.index(max(clean)))
    others = [token for token in range(len(row)) if answer_of(tokenizer, token) != mine]
    rival = answer_of(tokenizer, max(others, key=lambda token: row[token]))
    own = log_sum([row[token] for token in written[mine]])
    return {
        "difference": own - log_sum([row[token] for token in written[rival]]),
        "logprob": own - log_sum(row),
        "flipped": float(answer_of(tokenizer, row.index(max(row))) != mine),
    }


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_a_loop(tokenizer, context, logits_for, seed):
    logits = context.clean_logits + seed * logits_for(tokenizer, 3, seed=seed)
    expected = [
        by_loop(tokenizer, row, clean)
        for row, clean in zip(logits.tolist(), context.clean_logits.tolist(), strict=True)
    ]
    for name, metric in (("difference", logit_difference), ("logprob", answer_logprob), ("flipped", flipped)):
        assert metric(logits, context).tolist() == pytest.approx([row[name] for row in expected], abs=1e-9), name
    assert answer_probability(logits, context).tolist() == pytest.approx([math.exp(row["logprob"]) for row in expected])


@settings(max_examples=40, deadline=None)
@given(
    pair=st.tuples(st.sampled_from(["yes", "no", "red", "cat"]), st.sampled_from(["one", "blue", "left"])),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["bytes", "unigram", "fallback", "words"]),
)
def test_a_fixed_pair_is_the_difference_of_log_sums(tokenizers, encode, pair, seed, kind):
    tokenizer = tokenizers[kind]
    logits = torch.randn(3, len(tokenizer), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    context = MetricContext(logits, encode(tokenizer, PROMPTS), tokenizer)
    values = logit_difference(*pair)(logits, context)
    for row, prompt in enumerate(PROMPTS):
        score = [log_sum([float(logits[row, t]) for t in spellings(tokenizer, prompt, word)]) for word in pair]
        assert float(values[row]) == pytest.approx(score[0] - score[1], abs=1e-12)


def test_a_pair_may_differ_by_example_and_mix_words_and_ids(tokenizer, context):
    logits = context.clean_logits
    words = logit_difference(["yes", "no", "red"], "cat")(logits, context)
    each = [logit_difference(word, "cat")(logits, context)[row] for row, word in enumerate(["yes", "no", "red"])]
    assert words.tolist() == torch.stack(each).tolist()
    ids = logit_difference(torch.tensor([7, 8, 9]), [10, 11, 12])(logits, context)
    assert ids.tolist() == [float(logits[row, 7 + row] - logits[row, 10 + row]) for row in range(3)]
    mixed = logit_difference(7, "cat")(logits, context) - logit_difference("red", "cat")(logits, context)
    assert torch.allclose(mixed, logit_difference(7, "red")(logits, context))


def test_swapping_the_pair_changes_the_sign(context):
    logits = context.clean_logits
    there, back = logit_difference("yes", "no"), logit_difference("no", "yes")
    assert torch.equal(there(logits, context), -back(logits, context))


@pytest.mark.parametrize("metric", METRICS, ids=name_of)
def test_metrics_of_differences_ignore_a_shift_of_all_logits(context, logits_for, tokenizer, metric):
    logits = logits_for(tokenizer, 3, seed=9)
    shift = torch.tensor([[5.0], [-3.0], [100.0]], dtype=torch.float64)
    assert torch.allclose(metric(logits, context), metric(logits + shift, context))


def test_the_clean_run_is_not_flipped_and_another_spelling_is_no_flip(tokenizers, encode):
    tokenizer = tokenizers["bytes"]
    first, *_, last = spellings(tokenizer, PROMPTS[0], "yes")
    (no, *_) = spellings(tokenizer, PROMPTS[0], "no")
    clean, respelt, changed = (torch.zeros(3, len(tokenizer)) for _ in range(3))
    clean[:, first], respelt[:, last], changed[:, no] = 9.0, 9.0, 9.0
    context = MetricContext(clean, encode(tokenizer, PROMPTS), tokenizer)
    assert flipped(clean, context).tolist() == [0.0] * 3
    assert flipped(respelt, context).tolist() == [0.0] * 3
    assert flipped(changed, context).tolist() == [1.0] * 3
    assert (logit_difference(clean, context) > 0).all()
    assert torch.equal(logit_difference(respelt, context), logit_difference(clean, context))
    assert (logit_difference(changed, context) < 0).all()


def test_nan_is_shown_not_hidden(context):
    logits = context.clean_logits.clone()
    logits[1] = math.nan
    for metric in METRICS:
        values = metric(logits, context)
        assert values.isnan().tolist() == [False, True, False], metric


@pytest.mark.parametrize("metric", [m for m in METRICS if m is not flipped], ids=name_of)
def test_metrics_can_be_differentiated(tokenizers, encode, logits_for, metric):
    tokenizer = tokenizers["words"]
    logits = logits_for(tokenizer, 3, seed=3).requires_grad_(True)
    context = MetricContext(logits_for(tokenizer, 3, seed=4), encode(tokenizer, PROMPTS), tokenizer)
    assert torch.autograd.gradcheck(lambda scores: metric(scores, context), logits)


def test_metrics_leave_the_logits_as_they_were(context):
    before = context.clean_logits.clone()
    for metric in METRICS:
        metric(context.clean_logits, context)
    assert torch.equal(context.clean_logits, before)


def test_names_tell_metrics_apart():
    names = [metric.__name__ for metric in METRICS]
    assert names == [
        "logit_difference",
        "answer_logprob",
        "answer_probability",
        "flipped",
        "logit_difference('yes', 'no')",
    ]
    assert repr(logit_difference(["yes", "no"], 3)) == "logit_difference(<2 answers>, 3)"
    assert logit_difference(["yes"], 3) == logit_difference(("yes",), 3)


@pytest.mark.parametrize("wrong", [3.5, [1.5], True, None, ["no", None]])
def test_answers_are_words_or_ids(wrong):
    with pytest.raises(SelectionError, match="expected words or token ids"):
        logit_difference("yes", wrong)


def test_impossible_pairs_are_refused(tokenizer, context):
    logits = context.clean_logits
    with pytest.raises(SelectionError, match="are the same answer"):
        logit_difference("yes", " YES")(logits, context)
    with pytest.raises(SelectionError, match="has no logit"):
        logit_difference(len(tokenizer), 0)(logits, context)
    with pytest.raises(SelectionError, match="no single token"):
        logit_difference("hippopotamus", "no")(logits, context)
    with pytest.raises(DataError, match="names 2 answers for 3 examples"):
        logit_difference(["yes", "no"], "red")(logits, context)
    with pytest.raises(DataError, match="2 rows of logits for a batch of 3"):
        logit_difference("yes", "no")(logits[:2], context)
