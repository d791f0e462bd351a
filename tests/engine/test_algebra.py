"""What algebra says about interventions, whatever the model."""

import pytest
import torch

import interp_vlm as iv
from tests.engine.cases import KINDS, PLACES, intervention, together
from tests.engine.settings import ROUNDING, Setting
from tests.tiny import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)
every_padding = pytest.mark.parametrize("padding", ["left", "right"])


class TestAlgebra:
    setting = Setting("llava")

    @every_family
    @every_padding
    def test_everything_patched_from_the_corrupt_run_gives_the_corrupt_answer(self, family, padding):
        setting = Setting(family, padding=padding)
        vlm = setting.vlm
        sites = ["resid_pre", "projector_out", "vision_post"]
        source = vlm.capture(setting.corrupt, sites)
        wanted = vlm.run(setting.corrupt).logits
        assert not torch.equal(vlm.run(setting.batch).logits, wanted)
        for patches in (
            [iv.ActivationPatch("resid_pre", layers=[1], source=source)],
            [iv.ActivationPatch("vision_post", layers=0, source=source)],
            [iv.ActivationPatch("projector_out", source=source)],
        ):
            found = vlm.run(setting.batch, patches).logits
            if family == "qwen3_vl" and patches[0].site != "vision_post":  # the picture comes in between layers, too
                assert not torch.equal(found, wanted)
            else:
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))

    @pytest.mark.parametrize("site", PLACES)
    @every_padding
    def test_steering_by_nothing_is_bit_identical(self, site, padding):
        setting = Setting("llava", bits=32, padding=padding)
        place = PLACES[site]
        steering = intervention("steer", place, setting)
        run = setting.vlm.run(setting.batch, iv.vary(steering, scale=[0.0])[0], engine="full")
        assert torch.equal(run.logits, run.clean_logits)
        assert run.receipts[0].changed == 0
        patch = iv.ActivationPatch(
            site,
            place.layers,
            place.positions,
            place.heads,
            place.units,
            source=setting.vlm.capture(setting.batch, site),
        )
        assert torch.equal(setting.vlm.run(setting.batch, patch, engine="full").logits, run.clean_logits)

    def test_edits_of_the_same_cells_apply_in_the_order_of_the_list(self):
        vlm, batch = self.setting.vlm, self.setting.batch
        set_, add = (
            iv.Ablation("resid_post", layers=[1], positions="last", to=2.0),
            iv.Steering("resid_post", layers=[1], positions="last", direction=torch.ones(64), scale=3.0),
        )
        only, more = (iv.Ablation("resid_post", layers=[1], positions="last", to=value) for value in (2.0, 5.0))
        assert torch.equal(vlm.run(batch, [add, set_]).logits, vlm.run(batch, only).logits)
        assert torch.equal(vlm.run(batch, [set_, add]).logits, vlm.run(batch, more).logits)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_order_of_the_list_does_not_matter_across_sites(self, kind):
        vlm, batch = self.setting.vlm, self.setting.batch
        edits = [intervention(kind, place, self.setting) for place in PLACES.values()]
        edits.append(iv.AttentionKnockout(layers=[1]))
        forwards, backwards = vlm.run(batch, edits), vlm.run(batch, edits[::-1])
        assert torch.equal(forwards.logits, backwards.logits)
        assert forwards.receipts == backwards.receipts[::-1]

    @pytest.mark.parametrize("bits", [32, 64])
    def test_layers_are_named_in_any_way(self, bits):
        setting = Setting("llava", bits=bits)
        vlm, batch = setting.vlm, setting.batch
        for ways in (("all", range(3), [0, 1, 2], (2, 0, 1), [-1, -2, -3]), (2, -1, [2], range(2, 3), [-1])):
            runs = [vlm.run(batch, iv.AttentionKnockout(layers=layers)).logits for layers in ways]
            assert all(torch.equal(run, runs[0]) for run in runs)
            caches = [vlm.capture(batch, "z", layers=layers) for layers in ways]
            for layers, cache in zip(ways, caches, strict=True):
                for layer in caches[0].layers["z"]:
                    assert torch.equal(cache.layer("z", layer), caches[0].layer("z", layer)), layers

    @pytest.mark.parametrize("kind", ["zero", "tensor", "steer"])
    @every_family
    def test_an_example_in_a_batch_is_the_example_alone(self, family, kind):
        setting = Setting(family)
        vlm = setting.vlm
        edits = [intervention(kind, place, setting) for place in together(kind)]
        edits.append(iv.AttentionKnockout(queries="last", keys="question", layers=[2]))
        run = vlm.run(setting.batch, edits)
        for row in range(3):
            alone = vlm.encode(setting.batch.images[row][0], setting.batch.questions[row])
            found = vlm.run(alone, edits).logits[0]
            torch.testing.assert_close(found, run.logits[row], rtol=0, atol=ROUNDING * float(found.abs().max()))
