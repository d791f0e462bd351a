"""The engine's benchmark at small sizes: all tools compute the same; no test looks at a clock."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


engine = load(ROOT / "experiments" / "benchmarks" / "engine.py")


@pytest.fixture(scope="module")
def bench():
    return engine.Bench(engine.QUICK)


@pytest.mark.parametrize("edit", [engine.Edit(1, (29,), (3, 4), (0, 5)), engine.Edit(0, (20, 25), (2, 5, 9), (7,))])
def test_every_tool_gives_our_logits_and_another_layer_does_not(bench, edit):
    ours = bench.vlm.run(bench.batch, edit.knockout()).logits
    for theirs in (bench.by_nnsight, bench.by_hooks):
        engine.agree(ours, theirs(edit))
        with pytest.raises(SystemExit, match="do not compute the same"):
            engine.agree(ours, theirs(engine.Edit(2, (bench.length - 1,), edit.keys, edit.heads)))


def test_work_of_a_cone_is_that_of_its_rows(bench):
    s, start = bench.shape, 20
    rows = range(start, bench.length)
    wanted = sum(bench.per_row() + 2 * s.width * (row + 1) for row in rows) * (s.layers - 1)
    assert bench.work(1, start) == wanted
    assert bench.cells(1, start) == (s.layers - 1) * len(rows)


def test_peak_of_memory():
    assert engine.peak(lambda: [torch.zeros(1000), torch.zeros(500).sum()][0]) == 6004
    assert engine.peak(lambda: torch.zeros(250)) == 1000


def test_the_picture_is_drawn_from_plans(tmp_path):
    cone = load(ROOT / "experiments" / "light_cone.py")
    figure = cone.draw()
    titles = [axes.get_title().split()[0] for axes in figure.axes]
    assert titles == ["last_row", "suffix", "resume"]


def test_a_capture_holds_no_more_than_a_forward_and_what_it_returns(bench):
    sites = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "mlp_post"]

    def forward():
        with torch.no_grad():
            bench.bare(**bench.batch.inputs)

    def capture():
        return bench.vlm.capture(bench.fresh(), sites)

    cache = capture()
    asked = sum(part.nbytes for part in (*(cache[site] for site in sites), cache.positions, cache.mask))
    assert engine.peak(capture) <= engine.peak(forward) + asked
    assert asked > engine.peak(forward)  # values held twice would not fit
