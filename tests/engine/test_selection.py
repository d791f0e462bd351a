"""Selectors by evidence inside interventions: measured rightly, on the example itself and not on its batch."""

import pytest
import torch

import interp_vlm as iv
from interp_vlm.errors import InterventionError
from interp_vlm.tokens import select
from tests.engine import reference
from tests.engine.settings import Setting
from tests.tiny import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)

SELECTORS = [
    select.top(0.3),
    select.bottom(0.3),
    select.top(0.3, by="attention@-1"),
    select.top(5, among=select.text),
    select.top(4, by="sinks", among=select.all),
    select.random(0.3, seed=7),
    select.sinks(threshold=2.5, among=select.all),
    select.top(0.5) - select.random(3, seed=1) | select.last,
]


def from_the_end(positions, tokens):
    """Positions counted from the end of the row without its padding."""
    return (positions - int(tokens.all[-1]) - 1).tolist()


@every_family
def test_attention_is_the_mean_that_the_last_token_pays(family):
    setting, eager = Setting(family, "sdpa", 32, "right"), Setting(family, "eager", 32, "right")
    batch = setting.batch
    setting.vlm.positions(batch, select.top(1) & ~select.sinks(among=select.all))
    weights = torch.stack(reference.forward(eager.raw, batch.inputs, output_attentions=True).attentions, dim=1)
    hidden = reference.captured(setting.raw, batch.inputs, [("resid_post", 1)])["resid_post", 1]
    for row, tokens in enumerate(batch.tokens):
        last = int(tokens.last)
        score = weights[row, :, :, last].mean((0, 1))
        image = tokens.image
        wanted = image[score[image].argsort(descending=True, stable=True)[: -(-len(image) * 3 // 10)]].sort().values
        assert torch.equal(setting.vlm.positions(batch, select.top(0.3))[row], wanted)
        norm = hidden[row] / (hidden[row].square().mean(-1, keepdim=True) + 1e-6).sqrt()
        sinks = tokens.all[norm[tokens.all].abs().amax(-1) >= 2.5]
        found = setting.vlm.positions(batch, select.sinks(threshold=2.5, among=select.all))[row]
        assert torch.equal(found, sinks)


@every_family
def test_attention_of_one_layer(family):
    setting, eager = Setting(family, "sdpa", 32, "left"), Setting(family, "eager", 32, "left")
    batch, tops = setting.batch, {layer: select.top(0.3, by=f"attention@{layer}") for layer in (0, 2, -1)}
    together = setting.vlm.positions(batch, tops[0] | tops[2] | select.top(0.3) | select.sinks())
    weights = torch.stack(reference.forward(eager.raw, batch.inputs, output_attentions=True).attentions, dim=1)
    for row, tokens in enumerate(batch.tokens):
        image, expected = tokens.image, {}
        for layer in tops:
            score = weights[row, layer, :, int(tokens.last)].mean(0)
            wanted = image[score[image].argsort(descending=True, stable=True)[: -(-len(image) * 3 // 10)]].sort().values
            assert torch.equal(setting.vlm.positions(batch, tops[layer])[row], wanted)
            expected[layer] = set(wanted.tolist())
        assert expected[2] == expected[-1]
        mean = setting.vlm.positions(batch, select.top(0.3))[row]
        sinks = setting.vlm.positions(batch, select.sinks())[row]
        assert set(together[row].tolist()) == expected[0] | expected[2] | set(mean.tolist()) | set(sinks.tolist())


def test_a_layer_that_does_not_exist_is_refused():
    setting = Setting("llava")
    with pytest.raises(InterventionError, match="layer 3 does not exist"):
        setting.vlm.positions(setting.batch, select.top(0.3, by="attention@3"))


@every_family
@pytest.mark.parametrize("padding", ["left", "right"])
def test_an_example_selects_the_same_alone_and_in_any_batch(family, padding):
    setting = Setting(family, padding=padding)
    vlm, batch = setting.vlm, setting.batch
    order = [2, 0]
    shuffled = vlm.encode(
        [batch.images[row][0] for row in order], [batch.questions[row] for row in order], padding=padding
    )
    alone = [vlm.encode(batch.images[row][0], batch.questions[row]) for row in range(3)]
    sliced = [batch[row] for row in range(3)]
    for selector in SELECTORS:
        together = [from_the_end(*pair) for pair in zip(vlm.positions(batch, selector), batch.tokens, strict=True)]
        for row in range(3):
            for one in (alone[row], sliced[row]):
                assert from_the_end(vlm.positions(one, selector)[0], one.tokens[0]) == together[row]
        for row, found, tokens in zip(order, vlm.positions(shuffled, selector), shuffled.tokens, strict=True):
            assert from_the_end(found, tokens) == together[row]


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
def test_an_intervention_acts_where_its_selector_points(selector):
    setting = Setting("llava")
    vlm, batch = setting.vlm, setting.batch
    where = vlm.positions(batch, selector)

    def edit(value):
        new = value.clone()
        for row, positions in enumerate(where):
            new[row, positions] = 0.0
        return new

    wanted = reference.answers(setting.raw, batch.inputs, {("resid_post", 1): edit})
    run = vlm.run(batch, iv.Ablation("resid_post", layers=1, positions=selector, to="zero"))
    torch.testing.assert_close(run.logits, wanted, rtol=0, atol=1e-10 * float(wanted.abs().max()))
    by_query = vlm.run(batch, iv.AttentionKnockout(queries="last", keys=selector - select.last, layers=[0]))
    assert by_query.receipts[0].mass_left == 0.0
    cache = vlm.capture(batch, "resid_post", positions=selector)
    for row, positions in enumerate(where):
        assert cache.positions[row][cache.mask[row]].tolist() == positions.tolist()


def test_masking_the_mean_does_not_depend_on_which_patches_are_masked():
    setting = Setting("llava")
    values = []
    for selector in (select.top(0.3), select.bottom(0.3), select.random(0.3)):
        masked = iv.Ablation("projector_out", positions=selector, to="mean")
        cache = setting.vlm.capture(setting.batch, "projector_out", positions=selector, interventions=masked)
        values.append(cache.layer("projector_out", 0)[cache.mask])
    assert all(torch.equal(row, values[0][0]) for rows in values for row in rows)
