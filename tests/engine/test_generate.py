"""Generation with interventions: against loops that compute all anew, and against hooks in Hugging Face's own."""

import pytest
import torch

import interp_vlm as iv
from interp_vlm.errors import InterventionError
from tests.engine import reference
from tests.engine.settings import QUESTIONS, Setting, pictures
from tests.tiny import FAMILIES

STEPS = 5
WHEN = ["prompt", "generated", "both"]
DIRECTION = 6 * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def edits_of(setting: Setting, during: str) -> list[iv.AttentionKnockout | iv.Steering | iv.Ablation]:
    """One of every way to reach a generated token; the knockout in a layer that sees the whole prompt."""
    return [
        iv.AttentionKnockout(queries="last", keys=~iv.select.last, layers=[1], heads=[0, 1], during=during),
        iv.Steering("resid_post", layers=[0], positions="last", direction=DIRECTION, during=during),
        iv.Ablation("z", layers=[1], heads=[2], positions="last", to="zero", during=during),
    ]


def hooks_of(setting: Setting, rows: torch.Tensor) -> reference.Edits:
    """The same edits as hooks, on the rows that `rows` (batch, query) marks of what a pass computes."""
    prompt = setting.batch.inputs["attention_mask"].bool()

    def knock(mask):
        queries = rows.shape[1]
        if mask is None:
            total = max(queries, prompt.shape[1])
            mask = torch.ones(queries, total, dtype=torch.bool).tril(total - queries)[None, None]
        keys = torch.zeros(len(prompt), mask.shape[-1], dtype=torch.bool)
        keys[:, : prompt.shape[1]] = prompt
        keys[:, prompt.shape[1] - 1] = False  # padded on the left: the last position is the last column
        named = (
            rows[:, None, :, None] & keys[:, None, None, :] & torch.tensor([True, True, False, False])[:, None, None]
        )
        if mask.dtype == torch.bool:
            return mask & ~named
        return torch.where(named, torch.finfo(mask.dtype).min, mask)

    def steer(value):
        return torch.where(rows[..., None], value + DIRECTION.to(value.dtype), value)

    def ablate(value):
        new = value.clone()
        new[:, :, 2] = torch.where(rows[..., None], 0.0, value[:, :, 2])
        return new

    return {("attn_mask", 1): knock, ("resid_post", 0): steer, ("z", 1): ablate}


def last_rows(setting: Setting, length: int, during: str) -> torch.Tensor:
    """Which rows of the prompt and what was generated so far are edited."""
    start = setting.batch.inputs["input_ids"].shape[1]
    rows = torch.zeros(len(setting.batch), length, dtype=torch.bool)
    rows[:, start - 1] = during != "generated"
    rows[:, start:] = during != "prompt"
    return rows


@pytest.mark.parametrize("during", WHEN)
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma", "idefics3"])
def test_equals_a_loop_that_computes_everything_anew(family, during):
    setting = Setting(family)
    inputs = dict(setting.batch.inputs)
    start = inputs["input_ids"].shape[1]
    for _ in range(STEPS):
        rows = last_rows(setting, inputs["input_ids"].shape[1], during)
        with reference.hooked(setting.raw, hooks_of(setting, rows)):
            token = reference.forward(setting.raw, inputs, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        more = {"input_ids": token, "attention_mask": torch.ones_like(token)}
        more |= {"token_type_ids": torch.ones_like(token), "mm_token_type_ids": torch.zeros_like(token)}
        inputs |= {name: torch.cat([inputs[name], column], dim=1) for name, column in more.items() if name in inputs}
    wanted = inputs["input_ids"][:, start:]
    found = setting.vlm.generate(
        setting.batch, edits_of(setting, during), max_new_tokens=STEPS, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(found.ids, wanted)
    clean = setting.vlm.generate(setting.batch, max_new_tokens=STEPS, eos_token_id=None, pad_token_id=0)
    assert not torch.equal(found.ids, clean.ids)
    if during == "generated":  # the first token comes from the prompt alone
        assert torch.equal(found.ids[:, 0], clean.ids[:, 0])
    assert found.texts == tuple(setting.vlm.tokenizer.batch_decode(wanted, skip_special_tokens=True))


def hooked_generate(setting: Setting, during: str, **options) -> torch.Tensor:
    """Hugging Face's own generation, with hooks that edit each pass's last row."""
    start = setting.batch.inputs["input_ids"].shape[1]
    acting = {start: during != "generated", 1: during != "prompt"}

    def at(number):
        def edit(value):
            count = value.shape[-2] if number == 0 else value.shape[1]
            if not acting[count]:
                return value
            rows = torch.zeros(len(setting.batch), count, dtype=torch.bool)
            rows[:, -1] = True
            return list(hooks_of(setting, rows).values())[number](value)

        return edit

    def mask_edit(mask):
        if mask is not None:
            return at(0)(mask)
        # causal by itself, which only a pass over unpadded prompts or a single new token is
        raise AssertionError("these batches are padded")

    edits = {("attn_mask", 1): mask_edit, ("resid_post", 0): at(1), ("z", 1): at(2)}
    with reference.hooked(setting.raw, edits), torch.no_grad():
        out = setting.raw.generate(**setting.batch.inputs, max_new_tokens=STEPS, **{"do_sample": False, **options})
    return out[:, start:]


ENDLESS = {"eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("during", WHEN)
@pytest.mark.parametrize("family", [family for family in FAMILIES if "paligemma" not in family])
def test_equals_hugging_faces_own_generation_with_hooks(family, during):
    setting = Setting(family, bits=32)
    wanted = hooked_generate(setting, during, **ENDLESS)
    found = setting.vlm.generate(setting.batch, edits_of(setting, during), max_new_tokens=STEPS, **ENDLESS)
    assert torch.equal(found.ids, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_interventions_is_hugging_faces_own(family):
    setting = Setting(family, bits=32)
    start = setting.batch.inputs["input_ids"].shape[1]
    with torch.no_grad():
        wanted = setting.raw.generate(**setting.batch.inputs, max_new_tokens=STEPS, do_sample=False)[:, start:]
    assert torch.equal(setting.vlm.generate(setting.batch, max_new_tokens=STEPS).ids, wanted)


@pytest.mark.parametrize("during", WHEN)
def test_ends_early_at_the_end_of_sequence(during):
    setting = Setting("llava", bits=32)
    edits = edits_of(setting, during)
    endless = setting.vlm.generate(setting.batch, edits, max_new_tokens=STEPS, **ENDLESS).ids
    # each row's third token ends it; the longest row ends before the last step
    ending = {"eos_token_id": endless[:, 2].unique().tolist(), "pad_token_id": 0}
    found = setting.vlm.generate(setting.batch, edits, max_new_tokens=STEPS, **ending).ids
    assert found.shape[1] <= 3
    assert torch.equal(found, hooked_generate(setting, during, **ending))
    assert torch.equal(found[:, 0], endless[:, 0])


@pytest.mark.parametrize("during", WHEN)
def test_samples_as_hugging_face_does_with_the_same_seed(during):
    setting = Setting("llava", bits=32)
    options = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, **ENDLESS}
    drawn = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = hooked_generate(setting, during, **options)
        torch.manual_seed(seed)
        found = setting.vlm.generate(setting.batch, edits_of(setting, during), max_new_tokens=STEPS, **options)
        assert torch.equal(found.ids, wanted)
        drawn.append(found.ids)
    assert not torch.equal(drawn[0], drawn[1])


def test_of_one_token_and_of_dictionaries():
    setting = Setting("llava", bits=32)
    run = setting.vlm.run(setting.batch, edits_of(setting, "both"))
    for options in ({}, {"return_dict_in_generate": True}):
        found = setting.vlm.generate(setting.batch, edits_of(setting, "both"), max_new_tokens=1, **options)
        assert torch.equal(found.ids[:, 0], run.logits.argmax(-1))


def test_a_run_of_an_intervention_on_both_edits_the_prompt():
    setting = Setting("llava", bits=32)
    both, prompt = (setting.vlm.run(setting.batch, edits_of(setting, during)) for during in ("both", "prompt"))
    assert torch.equal(both.logits, prompt.logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "the model computes 6 x 54 rows where"),
        ({"do_sample": True, "num_return_sequences": 2}, "expected 3 x 54, one row of the batch for each example"),
        (
            {"use_cache": False},
            "expected 3 x 1, one row of the batch for each example; generate without beams or several",
        ),
    ],
)
def test_passes_over_other_rows_are_refused(options, said):
    setting = Setting("llava", bits=32)
    with pytest.raises(InterventionError) as caught:
        setting.vlm.generate(setting.batch, edits_of(setting, "both"), max_new_tokens=3, **ENDLESS, **options)
    assert said in str(caught.value)
    plain = setting.vlm.generate(setting.batch, max_new_tokens=3, **ENDLESS, **options)
    assert plain.ids.shape[1] == 3


def test_right_padding_is_refused_unless_there_is_none():
    setting = Setting("llava", bits=32, padding="right")
    with pytest.raises(
        InterventionError, match="the batch is padded on the right; expected padding on the left to gen"
    ):
        setting.vlm.generate(setting.batch)
    alone = setting.vlm.encode(pictures(0)[0], QUESTIONS[1], padding="right")
    other = setting.vlm.encode(pictures(0)[0], QUESTIONS[1], padding="left")
    ids = [setting.vlm.generate(batch, max_new_tokens=3, **ENDLESS).ids for batch in (alone, other)]
    assert torch.equal(*ids)


def test_a_sliding_window_that_forgets_keys_is_refused():
    setting = Setting("gemma3", bits=32)
    everywhere = iv.AttentionKnockout(queries="last", keys="question", during="generated")
    with pytest.raises(InterventionError, match=r"layers \[0, 2\] forget positions beyond 16 while \d+ are generated"):
        setting.vlm.generate(setting.batch, everywhere, max_new_tokens=3)
    setting.vlm.generate(setting.batch, iv.vary(everywhere, during=["prompt"])[0], max_new_tokens=3)


def test_what_can_have_no_effect_on_the_prompt_is_refused_here_too():
    setting = Setting("llava", bits=32)
    with pytest.raises(InterventionError, match="blocks no edge"):
        setting.vlm.generate(setting.batch, iv.AttentionKnockout("image", "last"), max_new_tokens=2)
