"""The benchmarks run at small sizes, and both sides compute the same; no test looks at a clock."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"
main = SimpleNamespace(**runpy.run_path(str(FOLDER / "__main__.py"), run_name="benchmarks"))


def module(name: str):
    """A benchmark, loaded as `make bench` loads it."""
    return main.load(FOLDER / f"{name}.py")


@pytest.fixture(scope="module")
def rows():
    return module("probes").rows(quick=True)


def test_every_way_of_scikit_learn_gives_the_same_aurocs():
    found = module("probes").measure(240, 60, 1, 1, rivals=("grid", "grid, float64"))
    assert [rival["what"] for rival in found["rivals"]] == ["grid", "grid, float64"]
    for rival in found["rivals"]:
        assert rival["same_C"] == rival["folds"] == 5
        assert rival["largest_auroc_difference"] <= 1e-3
        assert len(rival["ratios"]) == 1
    assert set(found["probe_layers"]) == {"without permutations", "with 199 permutations"}


def test_the_table_names_every_row(rows):
    assert {path.stem for path in main.benchmarks()} >= {"monitor", "probes"}
    assert all(callable(main.load(path).rows) for path in main.benchmarks())
    console = Console(record=True, width=200)
    console.print(main.table(rows))
    text = console.export_text()
    assert "scikit-learn, pipeline" in text
    assert "times faster" in text
    assert "AUROCs within" in text
