"""Attention features against closed forms, slow sums over tokens, and the pictures' own grids."""

import math

import numpy as np
import pytest
import torch

import interp_vlm as iv
from interp_vlm.readouts.attention import cluster_count
from interp_vlm.readouts.attention_features import (
    FEATURES,
    POOLED,
    attention_features,
    attention_map,
    layer_features,
    pooled,
)
from tests.models.tiny_model import noise
from tests.tiny import build

QUESTION = "is there a red cat on the left of the picture?"
FAMILIES = ["llava", "llava_next", "paligemma", "qwen2_vl", "internvl", "idefics3"]


@pytest.fixture(scope="module", params=FAMILIES)
def seen(request):
    """A tiny model's own attention at the last prompt token, and the token map."""
    vlm = iv.VLM(*build(request.param, dtype=torch.float64), name=request.param)
    batch = vlm.encode([noise(40, 24, 0), noise(40, 24, 1)], [QUESTION, "how many?"])
    return vlm.capture(batch, "pattern", positions="last")["pattern"][1], batch.tokens[1]


def uniform_on_picture(tokens, share=0.5, layers=3, heads=2):
    pattern = torch.zeros(layers, heads, 1, len(tokens.ids), dtype=torch.float64)
    places = tokens.picture_tokens(0)
    pattern[..., places] = share / len(places)
    pattern[..., tokens.last] += 1 - share
    return pattern


def test_even_attention_is_what_algebra_says():
    vlm = iv.load("testbed:llava")
    scene = iv.data.digit_scenes(n=1)[0]
    tokens = vlm.encode(scene.image, scene.question).tokens[0]
    n, side = 49, 7
    expected = {
        "entropy": math.log(n), "entropy_normalised": 1, "largest": 1 / n, "top_tenth": 5 / n, "gini": 0,
        "spread": math.sqrt(2 * (1 - 1 / side**2) / 12), "off_centre": 0, "image_mass": 0.5, "question_mass": 0,
        "first_mass": 0, "own_mass": 0.5, "head_largest_mass": 0.5, "head_smallest_mass": 0.5,
        "head_disagreement": 0, "between_layers": 0,
    }  # fmt: skip
    found = attention_features(uniform_on_picture(tokens), tokens)
    assert set(found) == {f"{how} {name}" for how in ("mean", "last") for name in FEATURES} | {"change entropy"}
    for name, value in expected.items():
        for how in ("mean", "last"):
            assert found[f"{how} {name}"] == pytest.approx(value, abs=1e-9), name
    assert found["change entropy"] == pytest.approx(0, abs=1e-9)


def test_two_heads_on_one_token_each():
    vlm = iv.load("testbed:llava")
    scene = iv.data.digit_scenes(n=1)[0]
    tokens = vlm.encode(scene.image, scene.question).tokens[0]
    pattern = torch.zeros(2, 2, 1, len(tokens.ids), dtype=torch.float64)
    corner, other = tokens.image[0], tokens.image[6]
    pattern[:, 0, 0, corner], pattern[0, 1, 0, other], pattern[1, 1, 0, corner] = 1.0, 1.0, 0.5
    found = layer_features(pattern, tokens)
    assert found["head_disagreement"].tolist() == pytest.approx([math.log(2), 0])
    assert found["gini"].tolist() == pytest.approx([1 - 2 / 49, 1 - 1 / 49])
    assert found["spread"].tolist() == pytest.approx([3 / 7, 0])  # half of the way between both columns
    assert found["off_centre"].tolist() == pytest.approx([3 / 7, 3 / 7 * math.sqrt(2)])
    assert found["head_smallest_mass"].tolist() == pytest.approx([1, 0.5])
    assert math.isnan(found["between_layers"][0])
    assert found["between_layers"][1] == pytest.approx(0.5)


def test_a_models_own_attention_against_slow_sums(seen):
    pattern, tokens = seen
    grid, found = tokens.grids[0], layer_features(pattern, tokens)
    kept = [i for i in range(grid.n) if min(grid.cells[i]) >= 0]
    places = [int(tokens.picture_tokens(0)[i]) for i in kept]
    shares_before = None
    for layer in range(pattern.shape[0]):
        heads = [[float(head[0, place]) for place in places] for head in pattern[layer]]
        mean = [sum(column) / len(heads) for column in zip(*heads, strict=True)]
        total = sum(mean)
        shares = [value / total for value in mean]
        n = len(shares)
        gini = sum(abs(a - b) for a in shares for b in shares) / (2 * n)
        at = []
        for i in kept:
            x0, y0, x1, y1 = grid.boxes[i]
            cell = (grid.cells[i] + 0.5) / (grid.rows, grid.cols)
            at.append(cell if math.isnan(x0) else ((y0 + y1) / 2 / grid.size[1], (x0 + x1) / 2 / grid.size[0]))
        at = np.clip(np.array(at), 0, 1)
        centre = np.sum([share * place for share, place in zip(shares, at, strict=True)], axis=0)
        spread = sum(share * ((place - centre) ** 2).sum() for share, place in zip(shares, at, strict=True))

        def entropy(values):
            return -sum(v / sum(values) * math.log(v / sum(values)) for v in values if v > 0)

        each = [[value / sum(head) for value in head] for head in heads]
        mixed = [sum(column) / len(each) for column in zip(*each, strict=True)]
        views = grid.views[kept] if grid.views.any() else None
        whole = pattern[layer, :, 0].mean(0)
        expected = {
            "entropy": entropy(shares),
            "entropy_normalised": entropy(shares) / math.log(n),
            "clusters": int(cluster_count(torch.tensor(mean), grid.cells[kept], views=views)),
            "largest": max(shares),
            "top_tenth": sum(sorted(shares)[-math.ceil(n / 10) :]),
            "gini": gini,
            "spread": math.sqrt(spread),
            "off_centre": math.dist(tuple(centre), (0.5, 0.5)),
            "image_mass": total,
            "question_mass": float(whole[tokens.question].sum()),
            "first_mass": float(whole[tokens.all[0]]),
            "own_mass": float(whole[tokens.all[-1]]),
            "head_largest_mass": max(map(sum, heads)),
            "head_smallest_mass": min(map(sum, heads)),
            "head_disagreement": entropy(mixed) - sum(map(entropy, each)) / len(each),
        }
        if shares_before is not None:
            pairs = zip(shares, shares_before, strict=True)
            expected["between_layers"] = sum(abs(a - b) for a, b in pairs) / 2
        for name, value in expected.items():
            assert found[name][layer] == pytest.approx(value, abs=1e-9), name
        shares_before = shares


def test_a_map_is_the_attention_cell_by_cell_or_pooled_with_nothing_lost(seen):
    pattern, tokens = seen
    grid, found = tokens.grids[0], attention_map(pattern, tokens)
    kept = (grid.cells >= 0).all(axis=1)
    positions = tokens.picture_tokens(0)[torch.from_numpy(kept)]
    assert found.sum(axis=(2, 3)) == pytest.approx(pattern[:, :, 0, positions].sum(-1).numpy())
    if grid.views.any():
        assert found.shape[2:] == (POOLED, POOLED)
    else:
        assert found.shape[2:] == (grid.rows, grid.cols)
        row, col = grid.cells[5]
        assert found[1, 2, row, col] == float(pattern[1, 2, 0, tokens.picture_tokens(0)[5]])
    small = attention_map(pattern, tokens, most=3)
    assert small.shape == (*pattern.shape[:2], POOLED, POOLED)
    assert small.sum(axis=(2, 3)) == pytest.approx(found.sum(axis=(2, 3)))


def test_pooling_sums_over_cells():
    weights = np.arange(1.0, 17.0).reshape(1, 1, 16)
    centres = (np.argwhere(np.ones((4, 4), dtype=bool)) + 0.5) / 4
    quarters = weights.reshape(2, 2, 2, 2).sum(axis=(1, 3))
    assert pooled(weights, centres, size=2)[0, 0].tolist() == quarters.tolist()
    assert pooled(weights, centres, size=4)[0, 0].tolist() == weights.reshape(4, 4).tolist()


def test_a_picture_that_nobody_looks_at_has_no_shape():
    vlm = iv.load("testbed:llava")
    scene = iv.data.digit_scenes(n=1)[0]
    tokens = vlm.encode(scene.image, scene.question).tokens[0]
    found = attention_features(uniform_on_picture(tokens, share=0.0), tokens)
    assert math.isnan(found["mean entropy"])
    assert found["mean image_mass"] == 0
    assert found["last own_mass"] == 1


def test_a_pattern_of_another_example_is_an_error(seen):
    pattern, tokens = seen
    with pytest.raises(iv.DataError, match=r"a pattern of shape"):
        attention_features(pattern[..., 1:], tokens)
    with pytest.raises(iv.DataError, match=r"at least one query"):
        attention_map(pattern[:, :, :0], tokens)
