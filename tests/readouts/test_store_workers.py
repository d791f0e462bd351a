"""Stores that many processes write and read at once: the bytes and the numbers of a single one, whoever is killed."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

import interp_vlm as iv
from interp_vlm.data.scorers import vqa as scored
from interp_vlm.readouts.shards import Block, fill, read_indices, replace_whole, write_shard

ROOT = Path(__file__).parent.parent.parent
COUNT, SHARD = 14, 2
SITES = ["resid_post", "attn_out"]
WHAT = {"sites": SITES, "batch_size": 1, "shard_examples": SHARD}


@pytest.fixture(scope="module")
def spawn():
    """Starts a function in a process of its own, forked from one that has done the slow imports."""
    context = multiprocessing.get_context("forkserver")
    slow = ("interp_vlm.probes.layerwise", "interp_vlm.testbed", "sklearn.linear_model", "transformers.models.llava")
    context.set_forkserver_preload([*slow, "interp_vlm.vlm"])
    started = []

    def start(function, *arguments):
        started.append(context.Process(target=function, args=arguments))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def vlm():
    return iv.load("testbed:llava")


@pytest.fixture(scope="module")
def examples():
    return iv.data.digit_scenes(n=COUNT)


@pytest.fixture(scope="module")
def whole(vlm, examples, tmp_path_factory) -> Path:
    """The store that this process writes alone."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    iv.store.write(folder, vlm, examples, **WHAT)
    return folder


def contents(folder):
    """Every file, also the locks."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def until(true, *processes):
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        assert [process.exitcode for process in processes] == [None] * len(processes)
        time.sleep(0.01)


def write(scene: Path, name: str) -> None:
    """What a worker does; the one named victim stops in the middle of its first shard."""
    torch.set_num_threads(1)
    seen, done = [], []

    def vqa(answer, example):
        seen.append(example.id)
        (scene / f"{name}.working").touch()
        while name == "victim":
            time.sleep(1.0)
        return scored(answer, example)

    vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes(n=COUNT)
    (scene / f"{name}.ready").touch()
    until((scene / "start").exists)
    store = iv.store.write(scene / "store", vlm, examples, **WHAT, scorer=vqa, progress=done.append)
    (scene / f"{name}.json").write_text(json.dumps([seen, sum(done), len(store)]))


def test_a_writer_killed_in_the_middle_of_a_shard(spawn, vlm, examples, whole, tmp_path):
    """A victim holds a shard; two others do all the rest, wait for it, and do it too once the victim is dead."""
    folder, shards = tmp_path / "store", COUNT // SHARD
    victim, *_ = processes = [spawn(write, tmp_path, name) for name in ("victim", "one", "two")]
    until(lambda: len(list(tmp_path.glob("*.ready"))) == 3, *processes)
    (tmp_path / "start").touch()
    until(lambda: len(list(folder.glob("shards/*.parquet"))) == shards - 1, *processes)
    until((tmp_path / "victim.working").exists, *processes)
    with pytest.raises(iv.DataError, match=rf"unfinished \({shards - 1} of {shards} shards so far\); .* wait for the"):
        iv.store.open(folder)
    (held,) = {f"{number:05d}" for number in range(shards)} - {path.stem for path in folder.glob("shards/*.parquet")}
    with pytest.raises(iv.DataError, match=rf"holds the shard .*{held}\.safetensors, and for 0\.5 s none was finished"):
        iv.store.write(folder, vlm, examples, **WHAT, patience=0.5)
    assert [process.exitcode for process in processes] == [None] * 3
    victim.kill()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    ones, twos = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert min(len(ones[0]), len(twos[0])) >= SHARD
    assert sorted(ones[0] + twos[0]) == sorted(example.id for example in examples), "lost or done twice"
    assert (ones[1:], twos[1:]) == ([COUNT, COUNT], [COUNT, COUNT])
    assert contents(folder) == contents(whole)
    assert len(contents(folder)) == 2 * shards + 3


def scribble(folder: Path, name: str) -> None:
    def write(number):
        with (folder / f"{name}.log").open("a") as log:
            log.write(f"{number}\n")
        for kind in ("safetensors", "parquet"):
            replace_whole(folder / f"{number:05d}.{kind}", lambda path: path.write_text(str(number)))

    fill(folder, 400, write, 60.0, lambda number: None)


def test_many_shards_are_each_written_once(spawn, tmp_path):
    victim, *_ = processes = [spawn(scribble, tmp_path, name) for name in ("a", "b", "c", "d")]
    until((tmp_path / "00100.parquet").exists)
    victim.kill()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] in ([-signal.SIGKILL, 0, 0, 0], [0] * 4)
    logs = {path.stem: path.read_text().split() for path in tmp_path.glob("*.log")}
    times = Counter(number for log in logs.values() for number in log)
    assert sorted(map(int, times)) == list(range(400))
    assert {number for number, count in times.items() if count > 1} <= set(logs["a"][-1:])
    assert {path.read_text() for path in tmp_path.glob("00300.*") if path.suffix != ".lock"} == {"300"}


def test_who_joins_must_do_the_same(vlm, examples, whole, tmp_path):
    class Enough(Exception):
        pass

    def stop(number):
        raise Enough

    folder = tmp_path / "store"
    with pytest.raises(Enough):
        iv.store.write(folder, vlm, examples, **WHAT, progress=stop)
    begun = contents(folder)
    assert sum(name.endswith(".parquet") for name in begun) == 1

    exact = iv.load("testbed:llava", dtype=torch.float64)
    with pytest.raises(iv.DataError, match="begun differently: precision was float32 and is float64; write it as it"):
        iv.store.write(folder, exact, examples, **WHAT)
    other = iv.VLM(exact.model.float(), exact.processor, name=vlm.name)
    next(other.model.parameters()).data += 0.01
    with pytest.raises(iv.ModelError, match="written by another model: weights '"):
        iv.store.write(folder, other, examples, **WHAT)
    with pytest.raises(iv.DataError, match="begun differently: fingerprint"):
        iv.store.write(folder, vlm, examples[::-1], **WHAT)
    with pytest.raises(iv.DataError, match="begun differently: dtype was float16 and is bfloat16"):
        iv.store.write(folder, vlm, examples, **WHAT, dtype="bfloat16")
    with pytest.raises(iv.DataError, match="begun differently: shard_examples was 2 and is 3"):
        iv.store.write(folder, vlm, examples, **{**WHAT, "shard_examples": 3})
    assert contents(folder) == begun

    settings = json.loads((folder / "store.json").read_text())
    here, settings["transformers"] = settings["transformers"], "4.0.0"
    (folder / "store.json").write_text(json.dumps(settings))
    with pytest.raises(iv.DataError, match=f"begun differently: transformers was 4.0.0 and is {here}; write it as"):
        iv.store.write(folder, vlm, examples, **WHAT)
    (folder / "store.json").write_bytes(begun["store.json"])
    iv.store.write(folder, vlm, examples, **WHAT)
    assert contents(folder) == contents(whole)
    # nothing is left to write: the versions of who reads do not matter
    (folder / "store.json").write_text(json.dumps(settings))
    assert len(iv.store.write(folder, vlm, examples, **WHAT)) == COUNT


@pytest.mark.parametrize("name", ["shards/00001.safetensors", "shards/00001.parquet", "index.parquet"])
def test_a_damaged_file_is_named_and_written_again(vlm, examples, whole, tmp_path, name):
    folder = tmp_path / "store"
    shutil.copytree(whole, folder)
    if name != "index.parquet":
        (folder / "index.parquet").unlink()  # a kill left the shards alone
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])

    def use():
        iv.store.write(folder, vlm, examples, **WHAT).layer("resid_post", 0)

    with pytest.raises(iv.DataError, match=rf"{name} cannot be read .*; delete .* and write the store again with the"):
        use()
    (folder / name).with_suffix(".parquet").unlink()  # what the error says
    use()
    assert contents(folder) == contents(whole)


SHARDS, EACH, LAYERS, WIDTH = 6, 50, 16, 4096
QUICK = {"permutations": 0, "resamples": 1000, "folds": 2, "inner_folds": 2, "C": (1e-3,)}


@pytest.fixture(scope="module")
def large(vlm, whole, tmp_path_factory) -> iv.store.Store:
    """300 examples x 16 layers x 2 positions x 4,096 numbers, 75 MiB; a layer of one position is 4.7 in float32."""
    folder = tmp_path_factory.mktemp("large") / "store"
    (folder / "shards").mkdir(parents=True)
    draws = torch.Generator().manual_seed(0)
    for number in range(SHARDS):
        values = torch.randn(EACH, LAYERS, 2, WIDTH, generator=draws)
        right = torch.rand(EACH, generator=draws) < 0.5
        values[:, :, 1, 0] += 4.0 * torch.linspace(0.0, 1.0, LAYERS) * right[:, None]
        rows = [
            {"id": str(EACH * number + row), "group": str((EACH * number + row) // 2), "kind": "", "question": "q",
             "expected": "yes", "answer": "yes", "score": float(right[row]), "confidence": 0.5}
            for row in range(EACH)
        ]  # fmt: skip
        both = torch.ones(EACH, 2, dtype=torch.bool)
        block = Block({"resid_post": values}, {"resid_post": range(LAYERS)}, both.long(), both, rows)
        write_shard(folder / "shards", number, [block], torch.float16)
    index = pd.concat(read_indices(folder / "shards", SHARDS), ignore_index=True)
    index.assign(correct=index["score"] > 0.5).to_parquet(folder / "index.parquet", index=False)
    settings = json.loads((whole / "store.json").read_text())
    settings |= {"sites": {"resid_post": list(range(LAYERS))}, "examples": SHARDS * EACH, "shard_examples": EACH}
    (folder / "store.json").write_text(json.dumps(settings))
    return iv.store.open(folder)


def peak() -> float:
    """The most memory that this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def probe(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    store = iv.store.open(folder)
    iv.probe_layers(store, position_index=1, layers=[0, 1], **QUICK)  # imports and buffers
    first = peak()
    report = iv.probe_layers(store, position_index=1, **QUICK)
    streamed = peak()
    together = torch.stack([store.layer("resid_post", layer) for layer in range(LAYERS)])
    np.savez(out, scores=report.scores, peaks=[first, streamed, peak()], size=together.nbytes)


def test_probes_of_several_readers_stream_from_the_store(spawn, large, tmp_path):
    outs = [tmp_path / "one.npz", tmp_path / "two.npz"]
    readers = [spawn(probe, large.folder, out) for out in outs]
    held = torch.stack([large.layer("resid_post", layer)[:, 1] for layer in range(LAYERS)], dim=1).float()
    index = large.index
    report = iv.probe_layers(
        held, index["correct"], index["group"], site="resid_post", position="before_answer", **QUICK
    )
    assert report.auroc[0].value < 0.65
    assert report.peak.value > 10
    for reader, out in zip(readers, outs, strict=True):
        reader.join(120)
        assert reader.exitcode == 0
        found = np.load(out)
        np.testing.assert_array_equal(found["scores"], report.scores)
        first, streamed, everything = found["peaks"]
        assert streamed - first < 30  # all layers at once would be 75; the pages of the open file come and go
        assert everything - streamed > 60  # the measure sees what is held


def test_the_script_of_the_documentation_with_a_ray_worker_killed(tmp_path):
    page = (ROOT / "docs" / "scale.md").read_text()
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "iv.store" in block]
    (tmp_path / "script.py").write_text(script + "\nassert report.peak.n == 72")
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    environment = {**os.environ, **quiet, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = tmp_path / "runs" / "store"
    with subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as driver:
        deadline = time.monotonic() + 120
        while len(list(folder.glob("shards/*.parquet"))) < 3 and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        own = {child.pid for child in psutil.Process(driver.pid).children(recursive=True)}
        running = (process for process in psutil.process_iter(["name"]) if process.pid in own)
        next(process for process in running if "ray::write" in process.info["name"]).kill()
        said = driver.communicate(timeout=120)[0]
    assert driver.returncode == 0, said.decode()
    examples = iv.data.digit_scenes(n=72, difficulty="hard")
    iv.store.write(tmp_path / "alone", iv.load("testbed:llava"), examples, ["resid_post"], shard_examples=4)
    assert contents(folder) == contents(tmp_path / "alone")
