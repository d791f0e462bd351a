"""Measures of attention over a picture against SciPy, a hand-written DBSCAN, and planted structure."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.readouts.attention import cluster_count, sink_scores, spatial_entropy, structure
from interp_vlm.tokens.grid import Geometry, ImageGrid, grid_from_geometry, join_grids
from interp_vlm.tokens.token_map import TokenMap


def cells_of(rows: int, cols: int) -> np.ndarray:
    return np.stack(np.divmod(np.arange(rows * cols), cols), axis=1)


def attention(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(2).softmax(dim=-1)


def clusters_by_hand(weights, cells, eps=1.5, min_samples=3, top=0.10, exclude=None, views=None) -> int:
    """DBSCAN as in its paper: grow a cluster from each unvisited core, one neighbour at a time."""
    n = len(weights)
    views = [0] * n if views is None else list(views)
    usable = [i for i in range(n) if min(cells[i]) >= 0 and not (exclude is not None and exclude[i])]
    budget = -(-len(usable) * round(top * 1000) // 1000)
    chosen = sorted(usable, key=lambda i: (-weights[i], i))[:budget]
    chosen = [i for i in chosen if weights[i] > 0]

    def near(i: int) -> list[int]:
        return [j for j in chosen if views[i] == views[j] and math.dist(cells[i], cells[j]) <= eps]

    seen, count = set(), 0
    for i in chosen:
        if i in seen or len(near(i)) < min_samples:
            continue
        count += 1
        queue = [i]
        while queue:
            j = queue.pop()
            if j not in seen:
                seen.add(j)
                if len(near(j)) >= min_samples:
                    queue.extend(near(j))
    return count


class TestEntropy:
    def test_equals_scipy_row_by_row(self):
        weights = attention(2, 3, 4, 49) * torch.rand(2, 3, 4, 1, dtype=torch.float64)
        expected = [scipy.stats.entropy(row) for row in weights.reshape(-1, 49).numpy()]
        assert spatial_entropy(weights).flatten().tolist() == pytest.approx(expected, abs=1e-12)
        normalised = spatial_entropy(weights, normalised=True).flatten().tolist()
        assert normalised == pytest.approx([value / math.log(49) for value in expected], abs=1e-12)

    @settings(max_examples=60, deadline=None)
    @given(
        weights=arrays.arrays(
            np.float64, st.integers(2, 30), elements=st.floats(0, 1).filter(lambda x: not 0 < x < 1e-9)
        )
    )
    def test_of_any_row(self, weights):
        value = float(spatial_entropy(torch.from_numpy(weights)))
        if weights.sum() == 0:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(float(scipy.stats.entropy(weights)), abs=1e-9)
            assert 0 <= value <= math.log(len(weights)) + 1e-9

    def test_of_known_rows(self):
        assert float(spatial_entropy(torch.ones(576))) == pytest.approx(math.log(576), rel=1e-6)
        assert float(spatial_entropy(torch.ones(576), normalised=True)) == pytest.approx(1.0, rel=1e-6)
        assert float(spatial_entropy(torch.eye(5)[2])) == 0.0
        assert not math.copysign(1.0, float(spatial_entropy(torch.eye(5)[2]))) < 0

    def test_does_not_depend_on_how_much_the_picture_is_attended(self):
        weights = attention(49)
        assert torch.allclose(spatial_entropy(weights), spatial_entropy(weights * 1e-3))

    def test_leaving_tokens_out_is_the_same_as_not_having_them(self):
        weights, exclude = attention(3, 49), torch.rand(49) < 0.3
        for normalised in (False, True):
            with_mask = spatial_entropy(weights, normalised, exclude=exclude)
            assert torch.allclose(with_mask, spatial_entropy(weights[:, ~exclude], normalised))

    def test_degenerate_rows(self):
        weights = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.3, 0.0]])
        assert spatial_entropy(weights).isnan().tolist() == [True, False]
        one = torch.tensor([[0.4], [0.0]])
        assert spatial_entropy(one).isnan().tolist() == [False, True]
        assert float(spatial_entropy(one)[0]) == 0.0
        assert spatial_entropy(one, normalised=True).isnan().all()
        everything = torch.ones(3, dtype=torch.bool)
        assert spatial_entropy(weights, exclude=everything).isnan().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_measured_in_single(self, dtype):
        weights = attention(4, 576).to(dtype)
        value = spatial_entropy(weights)
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), spatial_entropy(weights.double()), atol=1e-4)

    @pytest.mark.parametrize("bad", [-0.1, math.nan, math.inf])
    def test_what_is_no_attention_is_refused(self, bad):
        weights = torch.tensor([0.5, bad, 0.2])
        for measure in (spatial_entropy, lambda row: cluster_count(row, cells_of(1, 3))):
            with pytest.raises(DataError, match="negative or not finite"):
                measure(weights)

    def test_a_mask_must_fit(self):
        with pytest.raises(DataError, match=r"a mask of shape \(4,\)"):
            spatial_entropy(torch.ones(5), exclude=torch.zeros(4, dtype=torch.bool))


class TestClusters:
    @pytest.mark.parametrize("top", [0.05, 0.10, 0.25, 1.0])
    def test_equals_dbscan_by_hand(self, top):
        cells, weights = cells_of(12, 10), attention(5, 4, 120)
        weights[0] = weights[0].round(decimals=2)  # ties and zeros
        counts = cluster_count(weights, cells, top=top)
        assert counts.shape == (5, 4)
        expected = [clusters_by_hand(row, cells.tolist(), top=top) for row in weights.reshape(-1, 120).tolist()]
        assert counts.flatten().tolist() == expected

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_of_any_row(self, data):
        rows, cols = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
        n = rows * cols
        weights = data.draw(arrays.arrays(np.float64, n, elements=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0])))
        exclude = data.draw(arrays.arrays(np.bool_, n))
        cells = cells_of(rows, cols)
        cells[data.draw(arrays.arrays(np.bool_, n))] = -1
        views = data.draw(arrays.arrays(np.int64, n, elements=st.integers(0, 2)))
        options = {"eps": data.draw(st.sampled_from([1.0, 1.5, 2.9])), "min_samples": data.draw(st.integers(1, 4))}
        options["top"] = data.draw(st.sampled_from([0.1, 0.3, 0.5, 1.0]))
        count = cluster_count(
            torch.from_numpy(weights), cells, **options, exclude=torch.from_numpy(exclude), views=views
        )
        assert int(count) == clusters_by_hand(
            weights.tolist(), cells.tolist(), **options, exclude=exclude.tolist(), views=views.tolist()
        )

    @pytest.mark.parametrize("blobs", [0, 1, 2, 3, 4])
    def test_planted_blobs_are_counted(self, blobs):
        picture = torch.full((24, 24), 1e-4)
        for row, col in [(2, 2), (2, 20), (20, 2), (20, 20)][:blobs]:
            picture[row : row + 3, col : col + 3] = 1.0
        for row in range(0, 24, 5):
            picture[row, 11] = 0.5  # single tokens, far from each other: no clusters
        assert int(cluster_count(picture.flatten(), cells_of(24, 24), top=(9 * blobs + 5) / 576)) == blobs

    def test_tokens_of_different_views_are_never_neighbours(self):
        cells = np.concatenate([cells_of(2, 2), cells_of(2, 2)])
        weights, views = torch.ones(8), np.repeat([0, 1], 4)
        assert int(cluster_count(weights, cells, top=1.0)) == 1
        assert int(cluster_count(weights, cells, top=1.0, views=views)) == 2
        assert int(cluster_count(weights, cells, eps=40.0, top=1.0, views=views)) == 2

    def test_degenerate_rows_have_no_cluster(self):
        cells = cells_of(6, 6)
        assert int(cluster_count(torch.zeros(36), cells, top=1.0)) == 0
        assert int(cluster_count(torch.ones(1), cells_of(1, 1))) == 0
        assert int(cluster_count(torch.ones(1), cells_of(1, 1), min_samples=1)) == 1
        assert int(cluster_count(torch.ones(36), np.full((36, 2), -1), top=1.0)) == 0
        assert int(cluster_count(torch.ones(36), cells, top=1.0, exclude=torch.ones(36, dtype=torch.bool))) == 0

    def test_a_sink_hides_a_cluster_until_it_is_left_out(self):
        picture = torch.full((6, 6), 0.01)
        picture[0, :4] = 0.3
        picture[5, 5] = 5.0
        sink = torch.zeros(36, dtype=torch.bool)
        sink[35] = True
        cells = cells_of(6, 6)
        assert int(cluster_count(picture.flatten(), cells, top=0.08)) == 0  # 3 tokens, one of them the sink
        assert int(cluster_count(picture.flatten(), cells, top=0.08, exclude=sink)) == 1

    @pytest.mark.parametrize("options", [{"top": 0.0}, {"top": 1.5}, {"eps": 0.0}, {"min_samples": 0}])
    def test_parameters_out_of_range(self, options):
        with pytest.raises(SelectionError, match="expected 0 < top <= 1"):
            cluster_count(torch.ones(9), cells_of(3, 3), **options)

    def test_one_cell_per_token(self):
        with pytest.raises(DataError, match="9 cells for 8 image tokens"):
            cluster_count(torch.ones(8), cells_of(3, 3))


class TestSinks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_models_own_norms(self, dtype):
        hidden, gain = torch.randn(2, 5, 64, dtype=dtype), torch.rand(64, dtype=dtype)
        llama, gemma = LlamaRMSNorm(64, eps=1e-5).to(dtype), GemmaRMSNorm(64, eps=1e-6).to(dtype)
        llama.weight.data, gemma.weight.data = gain, gain
        with torch.no_grad():
            expected = llama(hidden).abs().max(dim=-1).values, gemma(hidden).abs().max(dim=-1).values
        assert torch.allclose(sink_scores(hidden, gain, eps=1e-5), expected[0], atol=1e-5)
        assert torch.allclose(sink_scores(hidden, 1 + gain), expected[1], atol=1e-5)

    def test_a_planted_sink_passes_the_threshold_and_others_do_not(self):
        hidden = torch.randn(10, 4096)
        hidden[3, 1415] = 400.0
        assert (sink_scores(hidden) > 20).nonzero().flatten().tolist() == [3]
        assert (sink_scores(hidden, dims=[1415, 2533]) > 20).nonzero().flatten().tolist() == [3]
        assert not (sink_scores(hidden, dims=[2533]) > 20).any()

    def test_a_narrow_stream_cannot_reach_the_threshold(self):
        assert float(sink_scores(torch.eye(128) * 1e4).max()) <= math.sqrt(128) + 1e-3

    def test_half_precision_does_not_overflow(self):
        assert float(sink_scores(torch.tensor([60000.0, 1.0, 0.0, 0.0], dtype=torch.float16))) == pytest.approx(2.0)

    @pytest.mark.parametrize("dims", [[], [64], [-1]])
    def test_dimensions_must_exist(self, dims):
        with pytest.raises(SelectionError, match="expected one or more of 0 to 63"):
            sink_scores(torch.randn(2, 64), dims=dims)


def picture_grid(rows: int, cols: int) -> ImageGrid:
    size = (cols * 8, rows * 8)
    return grid_from_geometry(Geometry.resize(size, size), rows, cols, 8.0)


def token_map(*grids: ImageGrid) -> TokenMap:
    """Two padding positions, a bos, the pictures with a word after each, three words."""
    owners = [-1, -1, -1]
    for number, grid in enumerate(grids):
        owners += [number] * grid.n + [-1]
    owner = torch.tensor([*owners, -1, -1])
    mask = torch.ones(len(owner), dtype=torch.bool)
    mask[:2] = False
    return TokenMap(torch.arange(len(owner)), tuple("x" * len(owner)), mask, owner, grids, key="example")


class TestStructure:
    def by_loop(self, pattern, tokens, picture, exclude) -> pd.DataFrame:
        """One layer after the other, with SciPy and the hand-written clusters, on tokens really removed."""
        grid = tokens.grids[picture]
        rows = []
        for layer in range(len(pattern)):
            mean = sum(query for head in pattern[layer].numpy() for query in head) / pattern[0, ..., 0].numel()
            drop = [False] * grid.n if exclude is None else exclude[layer].tolist() if exclude.ndim > 1 else exclude
            own = [int(i) for i in range(len(tokens.ids)) if tokens.image_index[i] == picture]
            kept = [
                (mean[place], grid.cells[i].tolist(), grid.views[i])
                for i, place in enumerate(own)
                if grid.cells[i, 0] >= 0 and not drop[i]
            ]
            weights, cells, views = zip(*kept, strict=True)
            rows.append(
                {
                    "layer": layer,
                    "entropy": scipy.stats.entropy(weights),
                    "entropy_normalised": scipy.stats.entropy(weights) / math.log(len(weights)),
                    "entropy_change": scipy.stats.entropy(weights) - rows[-1]["entropy"] if rows else math.nan,
                    "clusters": clusters_by_hand(weights, cells, views=views),
                    "max_attention": max(weights),
                    "image_mass": sum(weights),
                    "tokens": len(weights),
                }
            )
        return pd.DataFrame(rows)

    @pytest.mark.parametrize("masked", ["nothing", "same", "by layer"])
    @pytest.mark.parametrize("kind", ["plain", "separators and tiles", "second of two"])
    def test_equals_a_loop(self, kind, masked):
        grid = picture_grid(9, 7)
        if kind == "separators and tiles":
            grid = join_grids([grid, 2, grid_from_geometry(Geometry.resize((56, 72), (56, 72)), 9, 7, 8.0, view=1), 1])
        tokens = token_map(picture_grid(3, 3), grid) if kind == "second of two" else token_map(grid)
        picture = len(tokens.grids) - 1
        pattern = attention(5, 4, 3, len(tokens.ids))
        exclude = {
            "nothing": None,
            "same": torch.rand(grid.n) < 0.2,
            "by layer": torch.rand(5, grid.n) < 0.2,
        }[masked]
        frame = structure(pattern, tokens, picture=picture, exclude=exclude)
        pd.testing.assert_frame_equal(frame, self.by_loop(pattern, tokens, picture, exclude), rtol=1e-10)

    def test_per_head_measures_each_head_alone(self):
        tokens = token_map(picture_grid(6, 6))
        pattern, exclude = attention(3, 2, 1, len(tokens.ids)), torch.rand(3, 36) < 0.2
        frame = structure(pattern, tokens, exclude=exclude, per_head=True, layers=[4, 7, 9])
        assert list(frame.columns[:2]) == ["layer", "head"]
        for head in range(2):
            alone = structure(pattern[:, [head]], tokens, exclude=exclude, layers=[4, 7, 9])
            mine = frame[frame["head"] == head].drop(columns="head").reset_index(drop=True)
            pd.testing.assert_frame_equal(mine, alone)
        by_head = exclude[:, None].expand(3, 2, 36)
        pd.testing.assert_frame_equal(
            structure(pattern, tokens, exclude=by_head, per_head=True, layers=[4, 7, 9]), frame
        )

    def test_a_picture_without_attention(self):
        tokens = token_map(picture_grid(4, 4))
        pattern = torch.zeros(2, 1, 1, len(tokens.ids))
        pattern[..., -1] = 1.0
        frame = structure(pattern, tokens)
        assert frame["entropy"].isna().all()
        assert frame[["clusters", "max_attention", "image_mass"]].eq(0).all(axis=None)
        assert frame["tokens"].tolist() == [16, 16]

    def test_what_does_not_belong_together_is_refused(self):
        tokens = token_map(picture_grid(4, 4))
        n = len(tokens.ids)
        with pytest.raises(DataError, match=f"{n + 1} keys"):
            structure(attention(2, 1, 1, n + 1), tokens)
        with pytest.raises(DataError, match="0 queries"):
            structure(attention(2, 1, 0, n), tokens)
        with pytest.raises(DataError, match="3 layer numbers"):
            structure(attention(2, 1, 1, n), tokens, layers=[0, 1, 2])
        with pytest.raises(SelectionError, match="picture 1 does not exist"):
            structure(attention(2, 1, 1, n), tokens, picture=1)
        with pytest.raises(DataError, match="a mask of shape"):
            structure(attention(2, 1, 1, n), tokens, exclude=torch.zeros(15, dtype=torch.bool))
