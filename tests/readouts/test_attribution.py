"""Attribution patching against exact patching, hand-made products and SciPy."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

import interp_vlm as iv
from interp_vlm.readouts.attribution_audit import Audit, chosen_cells, rank_correlation
from interp_vlm.readouts.metrics import MetricContext
from tests.engine.settings import Setting
from tests.tiny import FAMILIES

PAIR = iv.logit_difference(5, 9)
SITES = ("resid_pre", "resid_mid", "resid_post", "z", "mlp_post")


def nudged(batch, size):
    """The same examples with a little noise on their pictures."""
    pixels = batch.inputs["pixel_values"]
    noise = torch.randn(pixels.shape, dtype=pixels.dtype, generator=torch.Generator().manual_seed(0))
    return dataclasses.replace(batch, inputs={**batch.inputs, "pixel_values": pixels + size * noise})


def patched(vlm, corrupt, cache, site, layer, position, **where):
    """The exact change of the metric, by one whole run."""
    patch = iv.ActivationPatch(site, [layer], [position], source=cache, allow_empty=True, **where)
    sweep = iv.sweep(vlm, corrupt, [patch], PAIR, engine="full")
    return (sweep.values - sweep.baseline)[0]


@pytest.fixture(scope="module")
def trained():
    """A trained model with six pairs of pictures."""
    vlm = iv.load("testbed:llava")
    pairs = iv.data.digit_pairs(n=6)
    batches = [
        vlm.encode([getattr(pair, side).image for pair in pairs], [getattr(pair, side).question for pair in pairs])
        for side in ("clean", "corrupt")
    ]
    metric = iv.logit_difference([pair.clean.answer for pair in pairs], [pair.corrupt.answer for pair in pairs])
    return vlm, *batches, metric


class TestEstimates:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_error_falls_with_the_square_of_the_difference(self, family):
        setting = Setting(family)
        vlm, corrupt = setting.vlm, setting.batch
        position = max(int(tokens.image[3]) for tokens in corrupt.tokens)  # no padding in any example
        for site in SITES:
            errors, effects = [], []
            for size in (4e-2, 1e-2):
                clean = nudged(corrupt, size)
                found = iv.attribution(vlm, clean, corrupt, site, PAIR, layers=[0, 1])
                exact = patched(vlm, corrupt, vlm.capture(clean, site), site, 1, position)
                estimate = found.values[:, 1].reshape(*found.mask.shape, -1).sum(dim=-1)[found.positions == position]
                errors.append(float((estimate - exact).norm()))
                effects.append(float(exact.norm()))
            # A wrong slope would leave an error that falls like the difference itself, to a quarter. Hugging Face's
            # norms compute in single precision: what is below that is rounding.
            assert errors[1] <= max(errors[0] / 8, 2e-6), (site, errors, effects)
            assert errors[1] <= max(0.3 * effects[1], 2e-6), (site, errors, effects)

    @pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_vl", "qwen3_vl"])
    def test_heads_add_up_to_attention_and_neurons_to_the_mlp(self, family):
        setting = Setting(family)
        found = {
            site: iv.attribution(setting.vlm, setting.corrupt, setting.batch, site, PAIR)
            for site in ("z", "attn_out", "mlp_post", "mlp_out")
        }
        mask = found["z"].mask[:, None].expand_as(found["attn_out"].values)
        for whole, parts in (("attn_out", found["z"].values.sum(dim=-1)), ("mlp_out", found["mlp_post"].values)):
            wanted = found[whole].values[mask]
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(parts[mask], wanted, rtol=1e-8, atol=1e-9)
        assert bool(found["z"].values[~found["z"].mask[:, None].expand(-1, 3, -1)].isnan().all())

    def test_they_are_the_product_of_change_and_slope(self, trained):
        vlm, clean, corrupt, metric = trained
        found = iv.attribution(vlm, clean, corrupt, "resid_post", metric, layers=-1, positions="all")
        theirs, ours = (vlm.capture(batch, "resid_post", "all", -1)["resid_post"][:, 0] for batch in (clean, corrupt))
        leaf = ours.clone().requires_grad_()
        head, norm = (vlm.model.get_submodule(getattr(vlm.anatomy, name)) for name in ("head", "final_norm"))
        context = MetricContext(vlm.run(corrupt).logits, corrupt, vlm.tokenizer)
        answers = leaf[torch.arange(len(corrupt)), found.mask.sum(dim=1) - 1]
        slope = torch.autograd.grad(metric(head(norm(answers)), context).sum(), leaf)[0]
        wanted = ((theirs - ours) * slope).sum(dim=-1)
        torch.testing.assert_close(found.values[:, 0][found.mask], wanted[found.mask], rtol=1e-4, atol=1e-4)
        assert torch.equal(found.corrupt, metric(vlm.run(corrupt).logits, context))
        assert torch.equal(found.clean, metric(vlm.run(clean).logits, context))

    def test_positions_of_unlike_prompts_are_paired_in_order(self, trained):
        vlm, _, corrupt, metric = trained
        longer = vlm.encode([own[0] for own in corrupt.images], ["what digit is red ? is there a blue 4 ?"] * 6)
        found = iv.attribution(vlm, longer, corrupt, "resid_post", metric, positions="image", audit=4)
        cells = found.audit.cells
        row = cells[cells["example"] == 2].iloc[0]
        number = corrupt.tokens[2].image.tolist().index(int(row["position"]))
        cache = vlm.capture(longer, "resid_post")
        patch = iv.ActivationPatch(
            "resid_post", [int(row["layer"])], [int(row["position"])], source=cache,
            source_positions=[int(longer.tokens[2].image[number])], allow_empty=True,
        )  # fmt: skip
        sweep = iv.sweep(vlm, corrupt, [patch], metric)
        assert float((sweep.values - sweep.baseline)[0, 2]) == pytest.approx(row["exact"], abs=1e-4)

    def test_what_does_not_go_together_is_an_error(self, trained):
        vlm, clean, corrupt, metric = trained
        with pytest.raises(iv.InterventionError, match="the source has 2 examples"):
            iv.attribution(vlm, clean[:2], corrupt, "resid_post", metric)
        shorter = vlm.encode([own[0] for own in clean.images], ["what ?"] * 6)
        with pytest.raises(iv.InterventionError, match="positions for the examples"):
            iv.attribution(vlm, shorter, corrupt, "resid_post", metric)
        with pytest.raises(iv.InterventionError, match="'pattern' has no gradients"):
            iv.attribution(vlm, clean, corrupt, "pattern", metric)
        with pytest.raises(iv.InterventionError, match="metric 'flipped' cannot be differentiated"):
            iv.attribution(vlm, clean, corrupt, "z", iv.flipped)
        with pytest.raises(iv.InterventionError, match="audit=-1"):
            iv.attribution(vlm, clean, corrupt, "z", metric, audit=-1)
        with pytest.raises(iv.InterventionError, match="every estimate is 0"):
            iv.attribution(vlm, corrupt, corrupt, "z", metric, audit=3)


class TestResult:
    def test_tables_agree_with_the_values(self, trained):
        vlm, clean, corrupt, metric = trained
        found = iv.attribution(vlm, clean, corrupt, "z", metric, layers=[3, 1])
        frame = found.frame()
        assert len(frame) == int(found.mask.sum()) * 2 * vlm.anatomy.n_heads
        for row in frame.sample(20, random_state=0).itertuples():
            column = found.positions[row.example].tolist().index(row.position)
            assert found.values[row.example, found.layers.index(row.layer), column, row.head] == pytest.approx(
                row.value
            )
            assert corrupt.tokens[row.example].pieces[row.position] == row.piece
        best = found.top(3)
        means = frame.groupby(["layer", "position", "head"])["value"].mean()
        assert best["value"].abs().tolist() == sorted(means.abs(), reverse=True)[:3]

    def test_single_neurons_sum_to_their_cell(self, trained):
        vlm, clean, corrupt, metric = trained
        found = iv.attribution(vlm, clean, corrupt, "mlp_post", metric, layers=[1, 2], positions="last")
        position = int(found.positions[0, 0])
        units = found.units(2, position)
        assert units.shape == (6, vlm.anatomy.d_mlp)
        torch.testing.assert_close(units.sum(dim=-1), found.values[:, 1, 0])
        with pytest.raises(iv.InterventionError, match="layer 0, position"):
            found.units(0, position)
        with pytest.raises(iv.InterventionError, match="'mlp_post'"):
            iv.attribution(vlm, clean, corrupt, "z", metric, layers=1).units(1, position)

    def test_figures_show_every_layer_and_position(self, trained):
        vlm, clean, corrupt, metric = trained
        found = iv.attribution(vlm, clean, corrupt, "resid_post", metric)
        drawn = found.plot().axes[0].images[0].get_array()
        places = len(set(found.positions[found.mask].tolist()))
        assert drawn.shape == (4, places)
        assert float(drawn[3, -1]) == pytest.approx(float(found.values[:, 3][found.positions == places - 1].mean()))
        heads = iv.attribution(vlm, clean, corrupt, "z", metric, positions="last")
        assert heads.plot().axes[0].images[0].get_array().shape == (4, vlm.anatomy.n_heads)


class TestAudit:
    @pytest.mark.parametrize("site", ["resid_post", "z"])
    def test_exact_cells_are_those_of_whole_runs(self, trained, site):
        vlm, clean, corrupt, _ = trained
        found = iv.attribution(vlm, clean, corrupt, site, PAIR, audit=8, seed=3)
        cache = vlm.capture(clean, site)
        cells = found.audit.cells
        assert cells["cell"].nunique() == 8
        for row in cells.sample(6, random_state=0).itertuples():
            where = {"heads": [row.head]} if site == "z" else {}
            exact = patched(vlm, corrupt, cache, site, row.layer, row.position, **where)[row.example]
            assert float(exact) == pytest.approx(row.exact, abs=2e-4)
            column = found.positions[row.example].tolist().index(row.position)
            value = found.values[row.example, found.layers.index(row.layer), column]
            assert float(value[row.head] if where else value) == pytest.approx(row.estimate, rel=1e-5)

    @pytest.mark.parametrize("examples", [1, 3, 6])
    def test_the_rank_correlation_is_scipys(self, trained, examples):
        vlm, clean, corrupt, _ = trained
        found = iv.attribution(vlm, clean[:examples], corrupt[:examples], "resid_mid", PAIR, audit=24).audit
        cells = found.cells[(found.cells["estimate"] != 0) | (found.cells["exact"] != 0)]
        wanted = [scipy.stats.spearmanr(own["estimate"], own["exact"])[0] for _, own in cells.groupby("example")]
        assert found.spearman.value == pytest.approx(np.mean(wanted), abs=1e-12)
        assert found.spearman.low <= found.spearman.value <= found.spearman.high
        assert ("over cells" in found.spearman.method) == (examples < 5)

    def test_cells_are_spread_over_the_ranks_and_repeat_with_the_seed(self):
        rng = np.random.default_rng(0)
        estimates = rng.normal(size=(3, 5, 40))
        estimates[:, 0] = 0
        estimates[0, :, 30:] = np.nan
        size = np.nanmean(np.abs(estimates), axis=0)
        cells = chosen_cells(estimates, 20, seed=1)
        assert cells == chosen_cells(estimates, 20, seed=1) != chosen_cells(estimates, 20, seed=2)
        assert len(set(cells)) == 20
        assert all(layer > 0 for layer, _ in cells)
        ranks = np.sort([(size > size[cell]).sum() for cell in cells])
        assert (ranks < 16).sum() >= 10
        assert ranks[-1] > 120
        assert len(chosen_cells(estimates, 1000, seed=1)) == 160

    def test_a_low_correlation_is_said(self, trained):
        vlm, clean, corrupt, metric = trained
        found = iv.attribution(vlm, clean, corrupt, "z", metric, audit=16)
        assert "LOW" not in repr(found)
        assert "not audited" in repr(dataclasses.replace(found, audit=None))
        rising = np.arange(12.0)[:, None]
        worse = Audit(found.audit.cells, rank_correlation(rising, -rising, seed=0))
        assert worse.spearman.value == pytest.approx(-1)
        assert "LOW" in repr(dataclasses.replace(found, audit=worse))
        nothing = Audit(found.audit.cells, rank_correlation(rising, 0 * rising + 1, seed=0))
        assert nothing.low
        assert "no rank correlation" in str(nothing)
