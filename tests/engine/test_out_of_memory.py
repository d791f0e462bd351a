"""Memory that really runs out: the kernel limits a process of its own, and batches are halved until they fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def happened():
    """What happened in each case, see `out_of_memory.py`."""
    script = Path(__file__).with_name("out_of_memory.py")
    # every tensor a mapping of its own, so that what is free again is not counted as held
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.pop("case"): line for line in map(json.loads, done.stdout.splitlines())}


def test_batches_are_halved_until_they_fit_and_that_is_remembered(happened):
    found = happened["mapped"]
    fits = found["second"][0]
    assert fits < 128
    assert found["first"] == [*halves(128, fits), *[fits] * (128 // fits)]
    assert found["second"] == [fits] * (128 // fits)  # what did not fit is not tried again
    assert found["passed"] == [fits] * (128 // fits)
    assert found["gap"] < 1e-5
    assert found["same"]


def test_a_sweep_of_a_large_batch_goes_on_with_its_halves(happened):
    found = happened["swept"]
    assert found["sizes"][0] == 128 > found["sizes"][-2]
    assert found["parts"][0] == [128 // found["sizes"][-2]] * 2
    assert found["gap"] < 1e-5


def test_a_batch_is_not_cut_where_something_belongs_to_its_rows(happened):
    assert happened["swept"]["parts"][1] == [1, 1]  # a list of answers, one for each
    assert "too little memory on cpu for 128 examples" in happened["swept"]["refused"]
    assert "to='mean') takes its values from the whole batch; take smaller batches" in happened["swept"]["refused"]
    assert happened["swept"]["sizes"][-1] == 128


def test_samples_are_the_same_in_halves(happened):
    assert happened["sampled"]["sizes"][0] == 128 > happened["sampled"]["sizes"][-1]
    assert happened["sampled"]["same"]


def test_a_store_is_the_same_in_halves(happened):
    found = happened["stored"]
    assert max(found["sizes"]) < 128
    assert found["gap"] < 1e-5
    assert found["same"]


def test_one_example_that_does_not_fit_is_an_error_that_says_so(happened):
    refused = happened["one"]["refused"]
    assert happened["one"]["sizes"] == [1]
    assert "too little memory on cpu for one example ('is there a" in refused
    assert "pictures: 400x400, 2516 positions; it failed at a piece of " in refused
    assert "take a smaller picture" in refused


def halves(size, last):
    """The sizes before the last."""
    return [] if size == last else [size, *halves(size // 2, last)]
