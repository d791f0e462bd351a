"""Gradients in the sites, against plain autograd through hooks on the raw Hugging Face model."""

import pytest
import torch

from interp_vlm.engine.gradients import GRADIENT_SITES, gradients
from interp_vlm.errors import InterventionError
from tests.engine import reference
from tests.engine.settings import Setting
from tests.tiny import FAMILIES


def score(logits):
    return logits.square().sum(dim=-1) + logits[:, 5]


def by_hand(raw, inputs, site, layer):
    """The gradient in something added at the site."""
    added = []

    def tap(value):
        added.append(torch.zeros_like(value).requires_grad_())
        return value + added[0]

    with torch.enable_grad(), reference.hooked(raw, {(site, layer): tap}):
        logits = raw(**inputs).logits
        rows = zip(logits, inputs["attention_mask"], strict=True)
        answers = torch.stack([row[mask.nonzero().max()] for row, mask in rows])
        return torch.autograd.grad(score(answers).sum(), added)[0]


CASES = [
    *(Setting(family) for family in FAMILIES),
    Setting("llava", padding="right"),
    Setting("qwen2_vl", attn="eager", bits=32),
]


@pytest.mark.parametrize("setting", CASES, ids=str)
def test_they_are_those_of_plain_autograd(setting):
    batch = setting.batch
    real = batch.inputs["attention_mask"].bool()
    for site in GRADIENT_SITES:
        found = gradients(setting.vlm._engine, batch, site, [2, 1], score)
        for layer in (1, 2):
            wanted = by_hand(setting.raw, batch.inputs, site, layer)[real]
            allowed = setting.tolerance * wanted.abs().max()
            assert wanted.abs().max() > 0
            assert (found.slopes[layer][real] - wanted).abs().max() <= allowed
            # another layer's gradient is another one
            assert (found.slopes[3 - layer][real] - wanted).abs().max() > 1e-3 * wanted.abs().max()


def test_a_step_along_the_gradient_moves_the_score_as_it_says():
    setting = Setting("llava")
    found = gradients(setting.vlm._engine, setting.batch, "resid_mid", [1], score)
    step = 1e-3 * torch.randn(found.values[1].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def moved(sign):
        edits = {("resid_mid", 1): lambda value: value + sign * step}
        return score(reference.answers(setting.raw, setting.batch.inputs, edits))

    wanted = (moved(1) - moved(-1)) / 2
    predicted = (found.slopes[1] * step).flatten(1).sum(dim=1)
    torch.testing.assert_close(predicted, wanted, rtol=1e-2, atol=0)


def test_it_leaves_the_model_and_the_answers_as_they_were():
    setting = Setting("paligemma", bits=32)
    before = setting.vlm.run(setting.batch).logits
    found = gradients(setting.vlm._engine, setting.batch, "z", [0], score)
    assert torch.equal(found.logits, before)
    assert not any(weight.requires_grad or weight.grad is not None for weight in setting.vlm.model.parameters())
    assert not any(left.requires_grad for left in (found.logits, found.scores, found.values[0], found.slopes[0]))


def test_weights_that_are_being_trained_are_no_obstacle_and_get_no_gradient():
    setting = Setting("llava", bits=32)
    wanted = gradients(setting.vlm._engine, setting.batch, "mlp_post", [1], score).slopes[1]
    setting.vlm.model.requires_grad_(True)
    try:
        found = gradients(setting.vlm._engine, setting.batch, "mlp_post", [1], score).slopes[1]
        assert all(weight.requires_grad and weight.grad is None for weight in setting.vlm.model.parameters())
    finally:
        setting.vlm.model.requires_grad_(False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_errors_say_what_has_no_gradient():
    setting = Setting("llava", bits=32)
    engine, batch = setting.vlm._engine, setting.batch
    with pytest.raises(InterventionError, match="'attn_mask' has no gradients"):
        gradients(engine, batch, "attn_mask", [0], score)
    with pytest.raises(InterventionError, match="argmax cannot be differentiated"):
        gradients(engine, batch, "z", [0], lambda logits: logits.argmax(dim=-1).float(), "argmax")
    with pytest.raises(InterventionError, match="one number per example"):
        gradients(engine, batch, "z", [0], lambda logits: logits)
