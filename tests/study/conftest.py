"""A small finished study, run once, and models on disk for others."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings
from tests.tiny import build

SMALL = Settings(models=("testbed:llava", "testbed:paligemma"), limit=24, batch_size=16, shard_size=18, draws=3)


@pytest.fixture(scope="session")
def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory, quiet: Console) -> Path:
    """The folder of a study of two embedded models on 24 standard and 96 hard questions."""
    folder = tmp_path_factory.mktemp("study") / "run"
    run_study(SMALL, folder, workers=1, console=quiet)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random LLaVA."""
    folder = tmp_path_factory.mktemp("models") / "random"
    model, processor = build("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def table(study: Path):
    """table("accuracy"): the tidy table of an experiment."""
    return lambda name: pd.read_parquet(study / "tables" / f"{name}.parquet")


@pytest.fixture(scope="session")
def examples(study: Path):
    """examples("accuracy"): the rows of an experiment, example by example."""
    return lambda name: pd.read_parquet(study / "examples" / f"{name}.parquet")
