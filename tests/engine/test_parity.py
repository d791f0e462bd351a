"""Every intervention against plain hooks on the raw Hugging Face model, for every family and setting."""

import pytest
import torch

from tests.engine import reference
from tests.engine.cases import KINDS, by_hand, intervention, together
from tests.engine.settings import SETTINGS, Setting
from tests.tiny import FAMILIES

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def assert_close(found: torch.Tensor, wanted: torch.Tensor, setting: Setting) -> None:
    assert not wanted.isnan().any()
    torch.testing.assert_close(found, wanted, rtol=0, atol=setting.tolerance * float(wanted.abs().max()))


@every_setting
def test_without_interventions_the_model_is_hugging_faces_own_bit_for_bit(setting):
    assert torch.equal(setting.vlm.run(setting.batch).logits, reference.answers(setting.raw, setting.batch.inputs))


@every_setting
@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_at_every_site_at_once(setting, kind):
    many = [intervention(kind, place, setting) for place in together(kind)]
    wanted = reference.answers(setting.raw, setting.batch.inputs, by_hand(kind, together(kind), setting))
    run = setting.vlm.run(setting.batch, many)
    assert_close(run.logits, wanted, setting)
    assert all(receipt.changed > 0 for receipt in run.receipts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_would_notice_a_missing_edit(family, kind):
    setting = Setting(family)
    edits = dict(by_hand(kind, together(kind), setting))
    everything = reference.answers(setting.raw, setting.batch.inputs, edits)
    for missing in edits:
        others = {key: edit for key, edit in edits.items() if key != missing}
        change = (reference.answers(setting.raw, setting.batch.inputs, others) - everything).abs().max()
        assert change > 1e-4 * everything.abs().max(), missing
