"""Batches of about equal length: what the processor makes of the same examples, hardly any padding, and no lost one."""

import functools
import random
from types import SimpleNamespace

import pytest
import torch

import interp_vlm as iv
from interp_vlm.engine import batches as module
from interp_vlm.engine.batches import SLACK, in_parts
from interp_vlm.engine.memory import asked_for, out_of_memory
from interp_vlm.errors import DataError
from tests.engine.settings import Setting, pictures
from tests.tiny import FAMILIES

QUESTIONS = (
    "is there a cat?",
    "how many dogs are there?",
    "what colour is the big square on the left of the picture, and what is the man holding?",
)
SIZES = ((40, 30), (60, 20), (24, 24), (48, 96))


def mixed(count=16, seed=0):
    """Examples of four sizes of pictures and three lengths of questions, in no order."""
    rng = random.Random(seed)
    return [
        SimpleNamespace(id=str(number), image=pictures(number, (rng.choice(SIZES),))[0], question=rng.choice(QUESTIONS))
        for number in range(count)
    ]


def together(vlm, examples):
    return vlm.encode([example.image for example in examples], [example.question for example in examples])


@functools.cache
def packed(family):
    """Mixed examples, and their batches."""
    examples = mixed()
    return examples, list(iv.batches(Setting(family, bits=32).vlm, examples, size=4))


def padded(batch):
    return int((batch.inputs["attention_mask"] == 0).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_is_what_the_processor_makes_of_its_examples(family):
    vlm, (examples, found) = Setting(family, bits=32).vlm, packed(family)
    assert sorted(number for numbers, _ in found for number in numbers) == list(range(16))
    for numbers, batch in found:
        wanted = together(vlm, [examples[number] for number in numbers])
        assert set(batch.inputs) == set(wanted.inputs)
        for name, value in wanted.inputs.items():
            assert batch.inputs[name].dtype == value.dtype
            assert torch.equal(batch.inputs[name], value), name
        for name in ("image_rows", "questions", "prompts", "padding"):
            assert getattr(batch, name) == getattr(wanted, name)
        for ours, theirs in zip(batch.tokens, wanted.tokens, strict=True):
            for name in ("pieces", "grids", "key", "question_text", "found", "bos_token_id"):
                assert getattr(ours, name) == getattr(theirs, name)
            for name in ("ids", "attention_mask", "image_index", "image", "question", "last"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_not_padded_and_prompts_by_a_sixteenth_at_most(family):
    vlm, (examples, batches) = Setting(family, bits=32).vlm, packed(family)
    alone = [together(vlm, [example]) for example in examples]
    for numbers, batch in batches:
        lengths = [tokens.length for tokens in batch.tokens]
        assert max(lengths) == batch.inputs["input_ids"].shape[1] <= (1 + SLACK) * min(lengths)
        for name, value in batch.inputs.items():
            own = [alone[number].inputs[name] for number in numbers]
            if own[0].shape != alone[numbers[0]].inputs["input_ids"].shape:
                assert value.numel() == sum(each.numel() for each in own), name
    largest = together(vlm, examples)
    assert 4 * sum(padded(batch) for _, batch in batches) < padded(largest)


def test_equal_prompts_stay_in_their_order_and_are_not_padded():
    vlm = iv.load("testbed:llava")
    examples = [each for each in iv.data.digit_scenes(n=40) if each.kind == "existence"][:10]
    found = list(iv.batches(vlm, examples, size=4))
    assert [numbers for numbers, _ in found] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert sum(padded(batch) for _, batch in found) == 0


def test_the_order_depends_on_the_examples_alone(monkeypatch):
    vlm, examples = Setting("qwen2_vl", bits=32).vlm, mixed(40)
    order = [numbers for numbers, _ in iv.batches(vlm, examples, size=4)]
    assert [numbers for numbers, _ in iv.batches(vlm, mixed(40), size=4)] == order
    assert [numbers for numbers, _ in iv.batches(vlm, examples, size=4)] == order
    assert all(list(numbers) == sorted(numbers) for numbers in order)
    # With less room to wait in, batches are smaller, and none holds examples that are far apart.
    monkeypatch.setattr(module, "WAITING", 1)
    impatient = [numbers for numbers, _ in iv.batches(vlm, examples, size=4)]
    assert sorted(number for numbers in impatient for number in numbers) == list(range(40))
    assert len(impatient) > len(order)


def test_every_picture_is_processed_once(monkeypatch):
    vlm, examples = Setting("qwen2_vl", bits=32).vlm, mixed()
    images, seen = vlm.processor.image_processor, []
    one = type(images).preprocess
    monkeypatch.setattr(type(images), "preprocess", lambda self, *a, **k: seen.append(1) or one(self, *a, **k))
    assert len(list(iv.batches(vlm, examples, size=4).map(lambda _, batch: vlm.run(batch).answers))) > 6
    assert len(seen) == len(examples)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_answers_come_in_the_order_of_the_examples(family):
    vlm, examples = Setting(family).vlm, mixed()
    logits = torch.stack(list(iv.batches(vlm, examples, size=4).each(lambda _, batch: vlm.run(batch).logits)))
    alone = torch.cat([vlm.run(together(vlm, [example])).logits for example in examples])
    assert float((logits - alone).abs().max() / alone.abs().max()) < 1e-10
    numbers = list(iv.batches(vlm, examples, size=4).each(lambda numbers, _: numbers))
    assert numbers == list(range(16))


def test_bad_input_is_named():
    vlm, examples = Setting("llava", bits=32).vlm, mixed(4)
    with pytest.raises(DataError, match="batches of 0 examples; expected at least 1"):
        iv.batches(vlm, examples, size=0)
    examples[2].question = "what is <image>?"
    with pytest.raises(DataError, match=r"example 2 \('2'\): .*image"):
        list(iv.batches(vlm, examples))
    assert list(iv.batches(vlm, [])) == []
    assert list(iv.batches(vlm, []).each(lambda numbers, _: numbers)) == []


def test_errors_that_are_not_about_memory_pass():
    vlm = Setting("llava", bits=32).vlm
    for error in (RuntimeError("shapes do not match"), ValueError("out of"), KeyError("memory")):
        assert not out_of_memory(error)

        def fails(_rows, _part, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            list(in_parts(vlm, together(vlm, mixed(2)), fails))
        assert caught.value is error
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."))
    assert asked_for(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")) == "2 GiB"
    assert asked_for(MemoryError()) == ""
