"""Every plan against the whole model, for every family and setting; what must not be exact shows that it would show."""

import dataclasses
from collections import Counter
from copy import copy
from typing import Any

import pytest
import torch

import interp_vlm as iv
from interp_vlm import select
from interp_vlm.engine import packed
from interp_vlm.engine.cone import Rest
from interp_vlm.engine.memory import budget
from interp_vlm.engine.packed import Packed
from interp_vlm.errors import InterventionError
from tests.engine.settings import SETTINGS, Setting
from tests.tiny import FAMILIES

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)
LAYERS = 3


def at_the_answer(setting, layer):
    """Interventions that change the last row alone, at every site of a layer; several layers, heads and two at once."""
    steer = torch.linspace(-1.0, 1.0, 64, dtype=setting.dtype)
    knockout = iv.AttentionKnockout("last", "image", layers=[layer], allow_empty=True)
    zeroed = iv.Ablation("z", layers=[layer], heads=[1], positions="last", to="zero")
    return [
        knockout,
        iv.AttentionKnockout("last", select.question, layers=range(layer, LAYERS), heads=[0, 2], allow_empty=True),
        zeroed,
        iv.Ablation("resid_pre", layers=[layer], positions="last", to="resample"),
        iv.Ablation("attn_out", layers=[layer], positions="last", to="zero"),
        iv.Ablation("resid_mid", layers=[layer], positions="last", to="mean"),
        iv.Ablation("mlp_post", layers=[layer], positions="last", units=[1, 5], to="mean"),
        iv.Ablation("mlp_out", layers=[layer], positions="last", to="zero"),
        iv.Steering("resid_post", layers=[layer], positions="last", direction=steer),
        [knockout, zeroed, iv.Steering("resid_post", layers=[-1], positions="last", direction=steer)],
    ]


def elsewhere(setting):
    """Interventions on other rows of the decoder, and one before it."""
    source = setting.vlm.capture(setting.corrupt, "resid_post")
    return [
        iv.AttentionKnockout("question", "image", layers=[1], allow_empty=True),
        iv.AttentionKnockout("question", "image", layers=[0], heads=[1], allow_empty=True),
        iv.Ablation("resid_pre", layers=[0], positions="image", to="zero"),
        iv.Ablation("resid_pre", layers=[1], positions="image", to="zero"),
        iv.ActivationPatch("resid_post", layers=[0], positions="image", source=source),
        iv.Ablation("z", layers=[0, 1], heads=[0], positions="question", to="mean"),
        iv.Ablation("mlp_out", layers=[1], positions="text", to="zero"),
        iv.Ablation("projector_out", positions=select.random(0.5, seed=1), to="zero"),
    ]


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


def logits(setting, many, engine):
    outcomes = dict(setting.vlm._engine.runs(setting.batch, [x if isinstance(x, list) else [x] for x in many], engine))
    return [outcomes[number] for number in range(len(many))]


@every_setting
def test_every_plan_gives_what_the_whole_model_gives(setting):
    many = [each for layer in range(LAYERS) for each in at_the_answer(setting, layer)] + elsewhere(setting)
    found, wanted = logits(setting, many, "auto"), logits(setting, many, "full")
    names = Counter(outcome.plan.name for outcome in found)
    for each, fast, slow in zip(many, found, wanted, strict=True):
        assert gap(fast.logits, slow.logits) <= setting.tolerance, (each, fast.plan)
        assert torch.equal(fast.clean_logits, slow.clean_logits)
        for mine, theirs in zip(fast.receipts, slow.receipts, strict=True):
            assert (mine.changed, mine.mass_left, mine.layers) == (theirs.changed, theirs.mass_left, theirs.layers)
    assert names["full"] == (len(many) if setting.family == "qwen3_vl" else 1)
    if setting.family != "qwen3_vl":
        assert names["last_row"] == (9 if "paligemma" in setting.family else 10 * LAYERS)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_vl"])
@pytest.mark.parametrize("engine", ["last_row", "suffix", "resume"])
def test_a_larger_plan_gives_the_same_when_it_is_asked_for(family, engine):
    setting = Setting(family)
    many = [each for each in at_the_answer(setting, LAYERS - 1) if each != "resid_pre"]
    kept = [each for each in many if isinstance(each, list) or each.where.name != "resid_pre"]
    wanted = logits(setting, kept, "full")
    if engine == "suffix" and "paligemma" in family:  # the prompt is one block: every row sees the last
        kept, wanted = kept[:2], wanted[:2]
    for fast, slow in zip(logits(setting, kept, engine), wanted, strict=True):
        assert fast.plan.name == engine
        assert gap(fast.logits, slow.logits) <= setting.tolerance


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl", "gemma3"])
def test_in_half_precision_plans_differ_by_rounding_alone(family):
    setting = Setting(family, bits=16)
    many = [each for layer in range(LAYERS) for each in at_the_answer(setting, layer)] + elsewhere(setting)
    for fast, slow in zip(logits(setting, many, "auto"), logits(setting, many, "full"), strict=True):
        assert gap(fast.logits, slow.logits) <= setting.tolerance


class TestSabotage:
    """Negative controls: what would make a plan wrong shows in the comparison."""

    setting = Setting("llava")
    last = staticmethod(lambda: iv.Ablation("mlp_out", layers=[1], positions="last", to="zero"))
    later = staticmethod(lambda: iv.Ablation("mlp_out", layers=[1], positions="question", to="zero"))
    whole = staticmethod(lambda: iv.Ablation("mlp_out", layers=[1], positions="all", to="zero"))

    def difference(self, each):
        ((_, fast),) = self.setting.vlm._engine.runs(self.setting.batch, [[each]])
        return gap(fast.logits, self.setting.vlm.run(self.setting.batch, each, engine="full").logits)

    @pytest.fixture(autouse=True)
    def honest(self):
        assert self.difference(self.last()) < 1e-12
        assert self.difference(self.later()) < 1e-12
        assert self.difference(self.whole()) < 1e-12

    @pytest.mark.parametrize(("plan", "each"), [(Packed, "last"), (Packed, "later"), (Rest, "whole")])
    def test_the_residual_stream_of_another_layer(self, plan, each, monkeypatch):
        entering = plan.entering
        wrong = self.setting.vlm.capture(self.setting.batch, "resid_pre", layers=[0])["resid_pre"][:, 0]

        def earlier(cone, layer, hidden):
            moved = dataclasses.replace(cone.trunk, residuals=dict.fromkeys(cone.trunk.residuals, wrong))
            return entering(dataclasses.replace(cone, trunk=moved), layer, hidden)

        monkeypatch.setattr(plan, "entering", earlier)
        assert self.difference(getattr(self, each)()) > 1e-3

    def test_the_keys_of_another_block(self, monkeypatch):
        mask = Packed._mask

        def swapped(cone, layer):
            found = mask(cone, layer).clone()
            found[..., cone.stop :] = found[..., cone.stop :].roll(cone.rows.shape[1], dims=-1)
            return found

        many = [self.later(), iv.Ablation("mlp_out", layers=[0], positions="question", to="zero")]
        wanted = logits(self.setting, many, "suffix")
        monkeypatch.setattr(Packed, "_mask", swapped)
        found = logits(self.setting, many, "suffix")
        assert all(gap(wrong.logits, right.logits) > 1e-3 for wrong, right in zip(found, wanted, strict=True))

    def test_one_key_fewer(self, monkeypatch):
        mask = Packed._mask

        def fewer(cone, layer):
            found = mask(cone, layer).clone()
            found[..., int(cone.last.min()) - 1] = False
            return found

        monkeypatch.setattr(Packed, "_mask", fewer)
        assert self.difference(self.last()) > 1e-3

    def test_the_last_key_of_the_run_without_interventions(self, monkeypatch):
        mask = Packed._mask
        monkeypatch.setattr(Packed, "stop", property(lambda cone: cone.trunk.length))
        assert self.difference(self.last()) < 1e-12

        def stale(cone, layer):
            found = mask(cone, layer).clone()
            found[torch.arange(len(cone.last)), :, :, cone.last] = True
            found[..., cone.trunk.length :] = False
            return found

        monkeypatch.setattr(Packed, "_mask", stale)
        assert self.difference(self.last()) > 1e-6

    @pytest.mark.parametrize("each", ["last", "later"])
    def test_the_prefix_of_another_batch(self, each, monkeypatch):
        engine, batch = self.setting.vlm._engine, self.setting.batch
        trunk: Any = engine.clean.of(batch).trunk
        other: Any = engine.clean.of(self.setting.corrupt, residuals=[1]).trunk
        monkeypatch.setattr(trunk, "keys", other.keys)
        monkeypatch.setattr(trunk, "values", other.values)
        assert self.difference(getattr(self, each)()) > 1e-3


class TestChoice:
    """Plans follow from the masks that attention received."""

    def plan(self, family, each, **options):
        setting = Setting(family)
        return setting.vlm.plan(setting.batch, each, **options)

    def test_causal_models_recompute_what_comes_after(self):
        knockout = iv.AttentionKnockout("last", "image", layers=[1])
        assert self.plan("llava", knockout).name == "last_row"
        assert self.plan("llava", knockout).layers == 2
        image = self.plan("llava", iv.Ablation("resid_post", layers=[1], positions="image", to="zero"))
        batch = Setting("llava").batch
        assert (image.name, image.start) == ("suffix", min(int(tokens.image.min()) for tokens in batch.tokens))
        assert "nor before position" in image.explain()
        assert "MiB kept" in image.explain()

    def test_where_the_prompt_sees_itself_it_is_recomputed_whole(self):
        knockout = iv.AttentionKnockout("last", "image", layers=[0])
        assert self.plan("paligemma", knockout).name == "resume"
        # Nothing reads the last layer's rows but the answer.
        assert self.plan("paligemma", iv.AttentionKnockout("last", "image", layers=[-1])).name == "last_row"
        assert self.plan("paligemma", iv.Ablation("resid_pre", layers=[-1], positions="last")).name == "resume"

    def test_a_picture_that_sees_itself_is_recomputed_from_its_start(self):
        setting = Setting("gemma3")
        first = min(int(tokens.image.min()) for tokens in setting.batch.tokens)
        one = select.positions([int(setting.batch.tokens[0].image.max())])
        found = setting.vlm.plan(setting.batch, iv.Ablation("resid_pre", layers=[0], positions=one, to="zero"))
        assert found.start <= first

    def test_a_decoder_whose_layers_alone_do_not_give_the_answer_is_run_whole(self):
        found = self.plan("qwen3_vl", iv.AttentionKnockout("last", "image", layers=[1]))
        assert found.name == "full"
        assert "do not give this model's answer" in found.explain()
        with pytest.raises(InterventionError, match="would not be exact"):
            self.plan("qwen3_vl", iv.AttentionKnockout("last", "image", layers=[1]), engine="resume")

    def test_a_plan_that_is_not_exact_is_refused(self):
        each = iv.Ablation("resid_post", layers=[0], positions="image", to="zero")
        with pytest.raises(InterventionError, match="'last_row' would not be exact here; expected 'auto' or 'suffix'"):
            self.plan("llava", each, engine="last_row")
        with pytest.raises(InterventionError, match="the image side is edited"):
            self.plan("llava", iv.Ablation("projector_out", to="zero"), engine="resume")


class TestMemory:
    setting = Setting("llava")

    def many(self):
        return [each for layer in range(LAYERS) for each in at_the_answer(self.setting, layer)] + elsewhere(
            self.setting
        )

    def test_a_small_budget_takes_more_passes_and_gives_the_same(self, monkeypatch):
        wanted = iv.sweep(self.setting.vlm, self.setting.batch, self.many())
        passes = []
        one = packed._pass
        monkeypatch.setattr(packed, "_pass", lambda *args: passes.append(len(args[-1])) or one(*args))
        found = iv.sweep(self.setting.vlm, self.setting.batch, self.many(), memory="900KiB")
        assert len(passes) > 1
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-10, atol=1e-12)
        monkeypatch.undo()
        nothing = iv.sweep(self.setting.vlm, copy(self.setting.batch), self.many(), memory=1)
        assert {receipt.plan for receipts in nothing.receipts for receipt in receipts} == {"full"}
        held = iv.sweep(self.setting.vlm, self.setting.batch, self.many(), memory=1)  # needs no more room
        assert [receipt.plan for each in held.receipts for receipt in each] == [
            receipt.plan for each in wanted.receipts for receipt in each
        ]
        torch.testing.assert_close(nothing.values, wanted.values, rtol=1e-10, atol=1e-12)

    def test_captures_that_will_not_be_used_are_not_kept(self):
        batch = self.setting.vlm.encode(self.setting.batch.images[0][0], "is there a cat?")
        iv.sweep(self.setting.vlm, batch, [iv.AttentionKnockout(layers=[2])])
        trunk: Any = self.setting.vlm._engine.clean.of(batch).trunk
        assert set(trunk.residuals) == {2}
        assert self.setting.vlm.plan(batch, iv.AttentionKnockout(layers=[2])).memory == trunk.nbytes

    def test_out_of_memory_halves_the_rows_of_a_pass(self, monkeypatch):
        wanted = iv.sweep(self.setting.vlm, self.setting.batch, self.many())
        sizes, one = [], packed._pass

        def tight(*args):
            sizes.append(len(args[-1]))
            if sizes[-1] > 4:
                raise torch.OutOfMemoryError("full")
            return one(*args)

        monkeypatch.setattr(packed, "_pass", tight)
        found = iv.sweep(self.setting.vlm, self.setting.batch, self.many())
        assert sizes[:4] == [30, 15, 7, 3]
        torch.testing.assert_close(found.values, wanted.values, rtol=1e-10, atol=1e-12)

    def test_budgets(self):
        cpu = torch.device("cpu")
        assert budget("4GiB", cpu) == 4 * 2**30
        assert budget("1.5 MB", cpu) == 1_500_000
        assert budget(1234, cpu) == 1234
        assert 0 < budget(0.1, cpu) < budget(0.5, cpu)
        for wrong in ("four", "0GiB", -1, 0, 1.5, True, "4"):
            with pytest.raises(InterventionError, match="expected bytes, a size such as '4GiB'"):
                budget(wrong, cpu)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vision_tower_runs_again_only_where_it_is_edited(family):
    setting = Setting(family)
    ran = []
    tower = setting.vlm.model.get_submodule(setting.vlm.anatomy.vision)
    handle = tower.register_forward_hook(lambda *_: ran.append(1))
    try:
        masked = iv.Ablation("projector_out", positions=select.random(0.5, seed=1), to="zero")
        wanted = setting.vlm.run(setting.batch, masked, engine="full")
        before = len(ran)
        found = setting.vlm.run(setting.batch, masked)
        assert len(ran) == before
        assert "the vision tower taken from it" in found.plan.explain()
        assert gap(found.logits, wanted.logits) <= setting.tolerance
        assert setting.vlm.run(setting.batch, iv.Ablation("vision_post", layers=[0], to="zero")).plan.tower
        assert len(ran) > before
    finally:
        handle.remove()


def test_what_nothing_reads_changes_nothing_to_the_bit():
    setting = Setting("llava", bits=32)
    unread = iv.AttentionKnockout(select.question - select.last, "image", layers=[-1], allow_empty=True)
    run = setting.vlm.run(setting.batch, unread)
    assert run.receipts[0].changed > 0
    assert run.plan.idle
    assert torch.equal(run.logits, run.clean_logits)
    assert not setting.vlm.plan(setting.batch, iv.AttentionKnockout("last", "image", layers=[-1])).idle


def test_interventions_on_the_same_rows_share_a_pass(monkeypatch):
    setting = Setting("llava")
    question = min(int(tokens.question.min()) for tokens in setting.batch.tokens)
    many = [
        iv.AttentionKnockout(select.positions(range(question, question + 2)), "image", layers=[layer], heads=[head])
        for layer in range(LAYERS - 1) for head in range(3)
    ]  # fmt: skip
    wanted = logits(setting, many, "full")
    passes, one = [], packed._pass
    monkeypatch.setattr(packed, "_pass", lambda *args: passes.append(len(args[-1])) or one(*args))
    found = logits(setting, many, "auto")
    assert passes == [len(many)]
    monkeypatch.setattr(packed, "_WIDE", 2 * (found[0].plan.rows // len(setting.batch)))
    again = logits(setting, many, "auto")
    assert passes == [len(many), 2, 2, 2]
    for fast, split, slow in zip(found, again, wanted, strict=True):
        assert fast.plan.name == "suffix"
        assert gap(fast.logits, slow.logits) <= setting.tolerance
        assert gap(split.logits, slow.logits) <= setting.tolerance


def test_results_come_in_the_order_asked():
    setting = Setting("llava")
    last, image = at_the_answer(setting, 1)[0], elsewhere(setting)[1]
    late, vision = at_the_answer(setting, 2)[0], elsewhere(setting)[-1]
    mixed = [vision, late, image, last, [last, image]]
    found = iv.sweep(setting.vlm, setting.batch, mixed)
    assert [receipts[0].plan for receipts in found.receipts] == ["full", "last_row", "suffix", "last_row", "suffix"]
    for number, each in enumerate(mixed):
        single = iv.sweep(setting.vlm, setting.batch, [each], engine="full")
        torch.testing.assert_close(found.values[number], single.values[0], rtol=1e-10, atol=1e-12)


def test_one_clean_run_serves_a_sweep(monkeypatch):
    setting = Setting("llava")
    batch = setting.vlm.encode(setting.batch.images[0][0], "is there a cat?")
    cleans = setting.vlm._engine.clean
    runs, forward = [], cleans.forward
    monkeypatch.setattr(cleans, "forward", lambda *args: runs.append(1) or forward(*args))
    iv.sweep(setting.vlm, batch, [each for layer in range(LAYERS) for each in at_the_answer(setting, layer)[4:5]])
    assert len(runs) == 1
    batch = setting.vlm.encode(setting.batch.images[0][0], "is there a dog?")
    for layer in range(LAYERS):
        setting.vlm.run(batch, iv.AttentionKnockout(layers=[layer]))
    assert len(runs) == 2  # the first of them kept what all need
