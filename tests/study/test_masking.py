"""Masks with other fills and another source of attention, against the raw Hugging Face model."""

import pandas as pd
import pytest
import torch

import interp_vlm as iv
from interp_vlm.data.digits import digit_scenes
from interp_vlm.models.loading import load
from interp_vlm.stats import holm
from interp_vlm.study.experiment import Bench
from interp_vlm.study.masking import ALTERNATIVES, FILLS, MAIN, MASKING, SOURCES, masks
from interp_vlm.study.material import Shard
from interp_vlm.study.sections.masking import section
from interp_vlm.study.settings import EMBEDDED, Settings
from interp_vlm.study.tables import where
from interp_vlm.testbed.build import question_inputs

SETTINGS = Settings(limit=6, draws=7, batch_size=4)
EXAMPLES = tuple(digit_scenes(n=12, questions_per_image=2))
REFERENCE = tuple(digit_scenes("validation", n=4))


@pytest.fixture(scope="module", params=EMBEDDED)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def bench(model):
    return Bench(iv.load(model), SETTINGS, reference=REFERENCE)


@pytest.fixture(scope="module")
def rows(bench):
    return MASKING.measure(bench, Shard(0, "standard", EXAMPLES))


@pytest.fixture(scope="module")
def table(rows):
    return MASKING.summarise(rows, SETTINGS)


class _Raw:
    """The model of Hugging Face alone, image tokens replaced where the decoder receives them."""

    def __init__(self, name):
        self.model, self.processor = load(name, attn_implementation="eager")

    def __call__(self, example, replace=None):
        """Logits of the answer, attention of the last token on image tokens (layer, token), and these tokens."""
        inputs = question_inputs(self.processor, example.image, example.question)
        places = (inputs["input_ids"][0] == self.model.config.image_token_id).nonzero().flatten()
        seen = []

        def hook(_, args, kwargs):
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"].clone()
            seen.append(kwargs["inputs_embeds"][0, places].clone())
            if replace is not None:
                kwargs["inputs_embeds"][0, places[replace[0]]] = replace[1](seen[0])
            return args, kwargs

        handle = self.model.model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            out = self.model(**inputs, output_attentions=True)
        handle.remove()
        attention = torch.stack([layer[0, :, -1, places].mean(0) for layer in out.attentions])
        return out.logits[0, -1], attention, seen[0]


@pytest.fixture(scope="module")
def raw(model):
    return _Raw(model)


def test_every_fill_and_source_by_hand(raw, bench, rows):
    reference = torch.cat([raw(example)[2] for example in REFERENCE]).double().mean(0).float()
    put = {"mean": lambda _: reference, "zero": lambda _: 0.0, "own mean": lambda tokens: tokens.mean(0)}
    drawn = [mask for mask in masks(SETTINGS) if mask.name == "random"]
    for example in EXAMPLES[:3]:
        own = rows[rows["example"] == example.id]
        clean, attention, tokens = raw(example)
        order = {"all layers": attention.mean(0), "last layer": attention[-1]}
        count = -(-len(tokens) * 3 // 10)
        batch = bench.vlm.encode(example.image, example.question)
        cases = [
            ("top", 0, fill, source, order[source].argsort(descending=True, stable=True)[:count])
            for fill, source in [(choice["fill"], choice["source"]) for choice in (MAIN, *ALTERNATIVES)]
        ]
        for mask in drawn[:2] + drawn[7:9] + drawn[12:14]:
            at = bench.vlm.positions(batch, mask.selector)[0] - int(batch.tokens[0].image[0])
            cases.append(("random", mask.draw, mask.fill, mask.source, at))
        for name, draw, fill, source, at in cases:
            line = where(own, mask=name, draw=draw, fill=fill, source=source)
            assert len(line) == 1
            line = line.iloc[0]
            logits = raw(example, (at, put[fill]))[0]
            assert line["masked"] == len(at) == count
            assert line["probability"] == pytest.approx(float(logits.softmax(-1)[clean.argmax()]), abs=1e-4)
            assert line["flipped"] == bool(logits.argmax() != clean.argmax())


def test_the_alternatives_use_the_same_random_tokens():
    made = list(masks(SETTINGS))
    main = [mask.selector for mask in made if (mask.name, mask.fill) == ("random", "mean")]
    assert len(main) == len(set(main)) == 7
    for fill in ("own mean", "zero"):
        assert [mask.selector for mask in made if (mask.name, mask.fill) == ("random", fill)] == main[:5]
    assert len({(mask.name, mask.draw, mask.fill, mask.source) for mask in made}) == len(made)
    assert {mask.fill for mask in made} == set(FILLS)
    assert {mask.source for mask in made} == set(SOURCES)


def test_the_table_holds_each_alternative_against_its_own_random_tokens(rows, table):
    clean = rows[rows["mask"] == "none"]["correct"].mean()
    for choice in ALTERNATIVES:
        own = where(rows, **choice)
        top = own[own["mask"] == "top"]["correct"].mean()
        random = where(rows, mask="random", fill=choice["fill"], source="all layers")["correct"].mean()
        found = where(table, kind="all", mask="top", **choice).set_index("quantity")
        assert found.loc["change of accuracy", "value"] == pytest.approx(100 * (top - clean))
        assert found.loc["change beyond random", "value"] == pytest.approx(100 * (top - random))
        assert (found["n"] == len(EXAMPLES)).all()
        assert (found["groups"] == 6).all()
        if choice["source"] == "all layers":
            costs = where(table, quantity="change of accuracy", mask="random", **choice)
            assert costs["value"].tolist() == [pytest.approx(100 * (random - clean))]


def test_p_values_of_the_main_choices_are_corrected_among_themselves(table):
    main = (table["fill"] == MAIN["fill"]) & (table["source"] == MAIN["source"])
    for part in (table[main], table[~main]):
        tested = part[part["p"].notna()]
        assert len(tested) >= 5
        assert tested["p_holm"].tolist() == pytest.approx(holm(tested["p"].to_numpy()).tolist())


def test_the_report_says_whether_the_answer_depends_on_the_choices(table):
    named = table.assign(model="llava")
    chosen = (named["quantity"] == "change beyond random") & (named["mask"] == "top") & (named["kind"] == "all")
    named.loc[chosen, ["value", "low", "high"]] = [-20.0, -30.0, -10.0]
    same = section(named, ["llava"]).points[-1]
    assert same.startswith("Other choices (")
    assert "every model the same verdict" in same
    named.loc[chosen & (named["fill"] == "zero"), "high"] = 5.0
    assert "with zeros the verdict is no evidence (llava)" in section(named, ["llava"]).points[-1]
    both = pd.concat([named, named.assign(model="paligemma")])
    assert "no evidence (llava) and no evidence (paligemma)" in section(both, ["llava", "paligemma"]).points[-1]
