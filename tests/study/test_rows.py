"""What the experiments measure, against the raw Hugging Face model with plain hooks, one question at a time."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from interp_vlm.data.digits import digit_scenes
from interp_vlm.models.loading import load
from interp_vlm.readouts.attention import cluster_count
from interp_vlm.study.material import load_material
from interp_vlm.study.tables import where
from interp_vlm.testbed.build import question_inputs
from tests.study.conftest import SMALL

N = 6


@pytest.fixture(scope="module", params=["testbed:llava", "testbed:paligemma"])
def raw(request):
    model, processor = load(request.param, attn_implementation="eager")
    return request.param.removeprefix("testbed:"), model, processor


def _run(raw, example, replace=None):
    """The answer, and the last token's attention on the image by layer; `replace` sets rows of the image tokens."""
    _, model, processor = raw
    inputs = question_inputs(processor, example.image, example.question)
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()

    def hook(_, args, kwargs):
        if replace is not None:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"].clone()
            kwargs["inputs_embeds"][0, places[replace[0]]] = replace[1]
        return args, kwargs

    handle = model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    handle.remove()
    attention = torch.stack([layer[0, :, -1, places].mean(0) for layer in out.attentions])
    return processor.tokenizer.decode(out.logits[0, -1].argmax()).strip(), attention, out.logits[0, -1]


def _mean_image_token(raw):
    """The mean image token of the pictures set aside, by the model's own projector."""
    _, model, processor = raw
    found = []

    def keep(_, args, kwargs):
        found.append(kwargs["inputs_embeds"][0, places])
        return args, kwargs

    handle = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    for example in load_material(SMALL).reference:
        inputs = question_inputs(processor, example.image, example.question)
        places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten()
        with torch.no_grad():
            model(**inputs)
    handle.remove()
    return torch.cat(found).double().mean(0).float()


def test_answers_and_attention_are_the_models_own(raw, examples):
    rows = where(examples("signals"), model=raw[0], sinks="with")
    answers = where(examples("accuracy"), model=raw[0], condition="hard").set_index("example")
    cells = np.argwhere(np.ones((7, 7), dtype=bool))
    for example in digit_scenes("test", 4 * SMALL.n, SMALL.seed, "hard")[:N]:
        answer, attention, logits = _run(raw, example)
        assert answers.loc[example.id, "answer"] == answer
        assert answers.loc[example.id, "confidence"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
        own = rows[rows["example"] == example.id].set_index("layer")
        for layer, weights in [*enumerate(attention), (-1, attention.mean(0))]:
            assert own.loc[layer, "entropy"] == pytest.approx(entropy(weights.double()), abs=1e-4)
            assert own.loc[layer, "entropy_normalised"] == pytest.approx(entropy(weights) / math.log(49), abs=1e-4)
            assert own.loc[layer, "max_attention"] == pytest.approx(float(weights.max()), abs=1e-5)
            assert own.loc[layer, "clusters"] == int(cluster_count(weights, cells))


def test_masked_answers_are_those_of_a_model_whose_image_tokens_are_replaced(raw, examples):
    rows = where(examples("masking"), model=raw[0])
    blank = _mean_image_token(raw)
    for example in digit_scenes("test", SMALL.n, SMALL.seed)[:N]:
        own = rows[rows["example"] == example.id]
        _, attention, clean = _run(raw, example)
        order = attention.mean(0).argsort(descending=True, stable=True)
        for mask, chosen in (("top", order[:15]), ("bottom", order[-15:]), ("all", order)):
            line = own[own["mask"] == mask].iloc[0]
            answer, _, logits = _run(raw, example, (chosen, blank))
            assert line["answer"] == answer
            assert line["probability"] == pytest.approx(float(logits.softmax(-1)[clean.argmax()]), abs=1e-4)
            assert line["flipped"] == bool(logits.argmax() != clean.argmax())
