"""Published protocols, computed again by hand: hooks on Hugging Face models, one example at a time, eager masks."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import interp_vlm as iv
from interp_vlm.readouts import protocols
from tests.engine import reference
from tests.engine.settings import QUESTIONS, SIZES, pictures
from tests.tiny import build

FAMILIES = ("llava", "paligemma", "qwen2_vl")
BOXES = [(2, 3, 15, 12), [(0, 0, 8, 8), (30, 20, 38, 28)], (5, 5, 12, 30)]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    """A tiny model (sdpa, a padded batch), and the same weights in eager attention that the package never touches."""
    vlm = iv.VLM(*build(request.param), request.param)
    return vlm, reference.raw(request.param, attn="eager")


@pytest.fixture(scope="module")
def trained():
    """A trained model with scenes of four pictures and pairs of pictures."""
    vlm = iv.load("testbed:llava")
    return vlm, iv.data.digit_scenes(n=12), iv.data.digit_pairs(n=6)


def encoded(vlm, examples):
    return vlm.encode([example.image for example in examples], [example.question for example in examples])


class TestInformationFlow:
    @pytest.mark.parametrize("window", [1, 3])
    def test_it_is_what_hooks_on_eager_masks_give(self, tiny, window):
        vlm, raw = tiny
        batch = vlm.encode(pictures(0), QUESTIONS)
        flow = protocols.information_flow(vlm, batch, objects=BOXES, window=window)
        assert flow.flows == protocols.FLOWS
        assert flow.mass_left == 0
        for example in range(3):
            alone = vlm.encode(pictures(0)[example], QUESTIONS[example])  # without padding
            clean = reference.forward(raw, alone.inputs).logits[0, -1].softmax(-1)
            first = int(clean.argmax())
            assert float(flow.before[example]) == pytest.approx(float(clean[first]), rel=1e-4)
            for at, name in enumerate(flow.flows):
                edges = edges_by_hand(name, alone.tokens[0], BOXES[example])
                for layer in range(3):
                    cut = range(max(0, layer - window // 2), min(3, layer - (-window // 2)))  # as released
                    probability = probability_without(raw, alone.inputs, edges, cut, first)
                    change = 100 * (probability - float(clean[first])) / float(clean[first])
                    assert float(flow.change[at, layer, example]) == pytest.approx(change, rel=2e-3, abs=2e-3)
        assert float(flow.change[:3].abs().max(dim=1).values.min()) > 0.1  # something happened

    def test_several_batches_are_laid_end_to_end(self, trained):
        vlm, scenes, _ = trained
        whole = protocols.information_flow(vlm, encoded(vlm, scenes), window=1)
        parts = protocols.information_flow(vlm, [encoded(vlm, scenes[:5]), encoded(vlm, scenes[5:])], window=1)
        torch.testing.assert_close(whole.after, parts.after, rtol=1e-4, atol=1e-6)
        assert whole.first_tokens == parts.first_tokens
        assert whole.pictures == parts.pictures == tuple(number // 6 for number in range(12))

    def test_only_right_answers_are_averaged(self, trained):
        vlm, scenes, _ = trained
        batch, answers = encoded(vlm, scenes), [scene.answer for scene in scenes]
        answers[3] = "a camel"
        flow = protocols.information_flow(
            vlm, batch, answers=answers, flows=["Image->Last"], window=3, max_new_tokens=1
        )
        wanted = [number != 3 for number in range(12)]
        assert flow.right.tolist() == wanted
        table = flow.summary()
        assert table["n"].tolist() == [11] * 4
        assert table["groups"].tolist() == [2] * 4
        np.testing.assert_allclose(table["change"], flow.change[0, :, flow.right].mean(dim=-1), rtol=1e-5)
        frame = flow.frame()
        assert len(frame) == 4 * 12
        assert frame.loc[frame["layer"] == 0, "right"].tolist() == wanted
        np.testing.assert_allclose(frame["change"], 100 * (frame["after"] / frame["before"] - 1), rtol=1e-3, atol=1e-3)
        assert (frame["first_layer"].iloc[0], frame["last_layer"].iloc[0]) == (0, 1)
        assert isinstance(flow.plot(), Figure)
        nobody = protocols.information_flow(vlm, batch, answers=["?"] * 12, flows=["Image->Last"], max_new_tokens=1)
        with pytest.raises(iv.DataError, match="no example was answered rightly"):
            nobody.summary()

    def test_the_whole_answer_has_to_be_right(self, trained):
        vlm, scenes, _ = trained  # the embedded model never stops: its longer answers are wrong
        answers = [scene.answer for scene in scenes]
        flow = protocols.information_flow(
            vlm, encoded(vlm, scenes), answers=answers, flows=["Last->Last"], window=1, max_new_tokens=3
        )
        assert not flow.right.any()

    def test_what_the_question_holds_after_the_last_layer_is_read_by_nobody(self, trained):
        vlm, scenes, _ = trained
        flow = protocols.information_flow(vlm, encoded(vlm, scenes), window=1)
        image_to_question = flow.change[flow.flows.index("Image->Question")]
        assert float(image_to_question[-1].abs().max()) < 1e-3
        assert float(image_to_question[0].abs().max()) > 1

    def test_what_makes_no_sense_is_an_error(self, trained):
        vlm, scenes, _ = trained
        batch = encoded(vlm, scenes[:2])
        with pytest.raises(iv.InterventionError, match="a window of 4 layers"):
            protocols.information_flow(vlm, batch, window=4)
        with pytest.raises(iv.SelectionError, match="'Image Central Object->Question' without objects"):
            protocols.information_flow(vlm, batch, flows=["Image Central Object->Question"])
        with pytest.raises(iv.SelectionError, match="'Image->Nowhere' does not exist"):
            protocols.information_flow(vlm, batch, flows=["Image->Nowhere"])
        with pytest.raises(iv.DataError, match="1 answers for 2 examples"):
            protocols.information_flow(vlm, batch, answers=["yes"])
        with pytest.raises(iv.DataError, match="the object of example 1"):
            protocols.information_flow(vlm, batch, objects=[(0, 0, 9, 9), (0, 0, 9)])
        with pytest.raises(iv.SelectionError, match="example 1 has no object"):
            protocols.information_flow(vlm, batch, objects=[(0, 0, 9, 9), (900, 900, 909, 909)])
        twice = encoded(vlm, [scenes[0], scenes[0]])
        with pytest.raises(iv.DataError, match="with another object"):
            protocols.information_flow(vlm, twice, objects=[(0, 0, 9, 9), (9, 9, 20, 20)])


def edges_by_hand(name, tokens, boxes):
    """Rows and columns of the attention mask, from the text and the boxes of the patches."""
    pictured = (tokens.image_index >= 0).nonzero().flatten().tolist()
    text, spans = "", []
    for piece, is_image in zip(tokens.pieces, (tokens.image_index >= 0).tolist(), strict=True):
        spans.append((len(text), len(text) + (0 if is_image else len(piece))))
        text += "" if is_image else piece
    start = text.index(tokens.question_text)
    end = start + len(tokens.question_text)
    question = [place for place, (left, right) in enumerate(spans) if left < end and right > start and right > left]
    listed = boxes if isinstance(boxes, list) else [boxes]
    inside = [
        any(x0 < box[2] and box[0] < x1 and y0 < box[3] and box[1] < y1 for box in listed)
        for x0, y0, x1, y1 in tokens.grid.boxes.tolist()
    ]
    parts = {
        "Question": question,
        "Image": pictured,
        "Last": [len(tokens.ids) - 1],
        "Image Central Object": [place for place, own in zip(pictured, inside, strict=True) if own],
        "Image Without Central Object": [place for place, own in zip(pictured, inside, strict=True) if not own],
    }
    source, target = name.split("->")
    return parts[target], parts[source]


def probability_without(raw, inputs, edges, layers, token):
    """Probability of a token with edges of the additive mask set to its lowest value."""
    rows, columns = (torch.tensor(part) for part in edges)

    def cut(mask):
        mask = mask.clone()
        mask[:, :, rows[:, None], columns[None]] = torch.finfo(mask.dtype).min
        return mask

    logits = reference.answers(raw, inputs, {("attn_mask", layer): cut for layer in layers})
    return float(logits[0].softmax(-1)[token])


class TestNotice:
    @pytest.mark.parametrize("site", ["attn_out", "mlp_out", "resid_post"])
    def test_it_is_what_hooks_give(self, tiny, site):
        vlm, raw = tiny
        clean, corrupt = vlm.encode(pictures(0), QUESTIONS), vlm.encode(pictures(1), QUESTIONS)
        found = protocols.notice(vlm, clean, corrupt, [5, 6, 7], [9, 10, 11], site=site)
        assert found.corruption == "semantic image pairs"
        by_hand(found, raw, clean, corrupt, [(5, 9), (6, 10), (7, 11)])

    def test_heads_one_at_a_time(self, tiny):
        vlm, raw = tiny
        clean, corrupt = vlm.encode(pictures(0), QUESTIONS), vlm.encode(pictures(1), QUESTIONS)
        found = protocols.notice(
            vlm, clean, corrupt, 5, 9, site="z", positions={"end": [-1], "before": [-2]}, heads=[3, 1], layers=[2, 1]
        )
        assert (found.places, found.layers, found.heads) == (("end", "before"), (2, 1), (3, 1))
        by_hand(found, raw, clean, corrupt, [(5, 9)] * 3, back={"end": -1, "before": -2})

    def test_symmetric_token_replacement(self, tiny):
        vlm, raw = tiny
        texts = "is there a cat?", "is there a dog?"
        first, second = (vlm.encode(pictures(0, SIZES[:2]), [text] * 2) for text in texts)
        found = protocols.notice(vlm, first, second, 5, 9, site="resid_post")
        assert found.corruption == "symmetric token replacement"
        by_hand(found, raw, first, second, [(5, 9)] * 2)

    def test_the_last_row_of_the_last_layer_is_the_answer(self, trained):
        vlm, _, pairs = trained
        clean, corrupt = encoded(vlm, [pair.clean for pair in pairs]), encoded(vlm, [pair.corrupt for pair in pairs])
        answers = [pair.clean.answer for pair in pairs], [pair.corrupt.answer for pair in pairs]
        found = protocols.notice(vlm, clean, corrupt, *answers, site="resid_post", positions=["image", "last"])
        image, last = found.effect[:, :, 0]
        torch.testing.assert_close(last[-1], torch.ones(6), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(image[-1], torch.zeros(6), rtol=0, atol=1e-4)
        assert float(image[0].mean()) > 0.5
        assert float(image[0].mean()) > float(last[0].mean()) + 0.5
        metric = iv.logit_difference(*answers)  # words: all their spellings
        patch = iv.ActivationPatch("resid_post", [1], "last", source=vlm.capture(clean, "resid_post"))
        sweep = iv.sweep(vlm, corrupt, [patch], metric)
        torch.testing.assert_close(found.difference[1, 1, 0], sweep.values[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.corrupt_difference, sweep.baseline, rtol=1e-4, atol=1e-4)

    def test_several_batches_are_laid_end_to_end(self, trained):
        vlm, _, pairs = trained
        answers = [pair.clean.answer for pair in pairs], [pair.corrupt.answer for pair in pairs]
        clean, corrupt = [pair.clean for pair in pairs], [pair.corrupt for pair in pairs]
        place = {"site": "mlp_out", "positions": iv.select.last}
        whole = protocols.notice(vlm, encoded(vlm, clean), encoded(vlm, corrupt), *answers, **place)
        cleans, corrupts = ([encoded(vlm, side[:2]), encoded(vlm, side[2:])] for side in (clean, corrupt))
        parts = protocols.notice(vlm, cleans, corrupts, *answers, **place)
        assert whole.places == parts.places == ("last",)
        for name in ("effect", "probability", "clean_difference", "corrupt_probability"):
            torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-5)
        assert parts.pictures == whole.pictures
        with pytest.raises(iv.InterventionError, match=r"in batches of \[2, 4\] and \[4, 2\]"):
            protocols.notice(vlm, cleans, corrupts[::-1], *answers, **place)

    def test_tables_and_figure(self, trained):
        vlm, _, pairs = trained
        clean, corrupt = encoded(vlm, [pair.clean for pair in pairs]), encoded(vlm, [pair.corrupt for pair in pairs])
        answers = [pair.clean.answer for pair in pairs], [pair.corrupt.answer for pair in pairs]
        found = protocols.notice(vlm, clean, corrupt, *answers, site="mlp_out")
        assert len(found.places) == min(len(tokens.text) - 2 for tokens in clean.tokens)  # two stand before the picture
        assert found.places[-1] == "-1 'assistant:'"
        frame, table = found.frame(), found.summary()
        assert len(frame) == len(found.places) * 4 * 6
        assert "head" not in frame
        assert len(table) == len(found.places) * 4
        row = table[(table["place"] == found.places[-1]) & (table["layer"] == 1)].iloc[0]
        own = frame[(frame["place"] == found.places[-1]) & (frame["layer"] == 1)]
        whole = own["clean_difference"] - own["corrupt_difference"]
        assert row["effect"] == pytest.approx((own["difference"] - own["corrupt_difference"]).mean() / whole.mean())
        assert row["mean_of_effects"] == pytest.approx(own["effect"].mean())
        assert row["low"] <= row["effect"] <= row["high"]
        assert row["n"] == 6
        assert isinstance(found.plot(), Figure)
        heads = protocols.notice(vlm, clean, corrupt, *answers, site="z", positions="last", heads="all")
        assert set(heads.frame()["head"]) == {0, 1, 2, 3}
        assert isinstance(heads.plot(), Figure)
        several = protocols.notice(vlm, clean, corrupt, *answers, site="z", positions=["last", "image"], heads=[0, 1])
        with pytest.raises(iv.InterventionError, match="2 heads at 2 places"):
            several.plot()

    def test_what_makes_no_pair_is_an_error(self, trained):
        vlm, _, _ = trained
        red, blue = (Image.new("RGB", (56, 56), colour) for colour in ("red", "blue"))
        one, other = "what colour is the 2 ?", "what colour is the 4 ?"

        def notice(clean, corrupt, correct="red", incorrect="blue", **options):
            return protocols.notice(vlm, clean, corrupt, correct, incorrect, **options)

        base = vlm.encode(red, one)
        with pytest.raises(iv.InterventionError, match="pair 0 are the same"):
            notice(base, vlm.encode(red, one))
        with pytest.raises(iv.InterventionError, match="pair 0 differ in picture and question"):
            notice(base, vlm.encode(blue, other))
        with pytest.raises(iv.InterventionError, match=r"questions of pair 0 have \d+ and \d+ tokens"):
            notice(base, vlm.encode(red, "is there a 4 ?"))
        with pytest.raises(iv.InterventionError, match="1 clean and 2 corrupt"):
            notice(base, vlm.encode([blue, blue], [one, one]))
        with pytest.raises(iv.InterventionError, match="semantic image pairs and symmetric token"):
            notice(vlm.encode([red, red], [one, one]), vlm.encode([blue, red], [one, other]))
        pair = base, vlm.encode(blue, one)
        with pytest.raises(iv.InterventionError, match="heads of 'attn_out'"):
            notice(*pair, heads=[0])
        with pytest.raises(iv.InterventionError, match="site 'projector_out'"):
            notice(*pair, site="projector_out")
        with pytest.raises(iv.SelectionError, match="are the same answer"):
            notice(*pair, incorrect="Red")
        with pytest.raises(iv.DataError, match="2 answers for 1 examples"):
            notice(*pair, correct=["red", "blue"])


def by_hand(found, raw, clean, corrupt, tokens, back=None):
    """Every cell of a result, patched by hooks: logits and softmax by the formulas of the released code."""
    places = back or dict(zip(found.places, range(-len(found.places), 0), strict=True))
    correct, incorrect = torch.tensor(tokens).T

    def ends(batch, edits=None):
        logits = reference.answers(raw, batch.inputs, edits)
        row = torch.arange(len(logits))
        return logits[row, correct] - logits[row, incorrect], logits.softmax(-1)[row, correct]

    close = {"rtol": 2e-3, "atol": 2e-4}
    (ld_clean, _), (ld_corrupt, p_corrupt) = ends(clean), ends(corrupt)
    theirs = reference.captured(raw, clean.inputs, [(found.site, layer) for layer in found.layers])
    moved = 0.0
    for p, name in enumerate(found.places):
        where = [int(tokens.all[places[name]]) for tokens in corrupt.tokens]
        for at, layer in enumerate(found.layers):
            for h, head in enumerate(found.heads or [None]):
                donor = theirs[found.site, layer]

                def patch(value, donor=donor, where=where, head=head):
                    value = value.clone()
                    for example, place in enumerate(where):
                        cells = (example, place) if head is None else (example, place, head)
                        value[cells] = donor[cells]
                    return value

                ld, probability = ends(corrupt, {(found.site, layer): patch})
                effect = (ld - ld_corrupt) / (ld_clean - ld_corrupt)
                torch.testing.assert_close(found.effect[p, at, h], effect, **close)
                torch.testing.assert_close(found.probability_change[p, at, h], probability - p_corrupt, **close)
                moved = max(moved, float(effect.abs().max()))
    assert moved > 0.05
