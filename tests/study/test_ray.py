"""Studies on a real Ray cluster of three nodes on this machine: whatever is killed, the same tables, byte for byte."""

import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listens on the loopback alone

import numpy
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

from interp_vlm.cli import main
from interp_vlm.engine.memory import left_to_process
from interp_vlm.errors import ModelError, StudyError
from interp_vlm.study import ray_pool
from interp_vlm.study.material import load_material, shards
from interp_vlm.study.ray_pool import TRIES, RayCrew
from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings
from interp_vlm.study.work import Crew, Task, Unfit, UnitsFailed, measure
from interp_vlm.vlm import load

SETTINGS = Settings(models=("testbed:llava",), limit=12, shard_size=6, claims=("A1",), seed=5)
NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
MAIN = "from interp_vlm.cli import main; main()"
DRIVER = """
import sys
from pathlib import Path
from interp_vlm.study.ray_pool import RayCrew
from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings

settings = Settings.from_json(Path(sys.argv[1]).read_text())
run_study(settings, Path(sys.argv[2]), crew=RayCrew(settings, sys.argv[3]))
"""


@pytest.fixture(scope="module")
def cluster():
    """A head that works nothing, and two nodes with a core each."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
    for _ in range(2):
        made.add_node(num_cpus=1, **NODE)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, quiet) -> Path:
    """The same study in this process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_study(SETTINGS, folder, workers=1, console=quiet)
    return folder


def _results(folder: Path) -> dict[str, bytes]:
    """The bytes of every part, table and row of examples, and of the report."""
    files = [folder / "report.html", *(path for path in folder.rglob("*") if path.suffix in (".parquet", ".csv"))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _same(folder: Path, whole: Path) -> None:
    found, expected = _results(folder), _results(whole)
    assert len(expected) > 20
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name
    assert not list(folder.rglob("*.tmp"))
    assert not (folder / "failed.json").exists()


def _at_work() -> list[psutil.Process]:
    """The workers that are in the middle of a unit: Ray writes what a process does in its title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::Worker.do"]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def _meanwhile(folder: Path, finished: int, act) -> threading.Thread:
    """Begins to call `act`, until it says that it is done, once so many units are finished."""

    def watch() -> None:
        deadline = time.monotonic() + 240
        while len(list(folder.glob("parts/*/*/*.parquet"))) < finished and time.monotonic() < deadline:
            time.sleep(0.002)
        while not act() and time.monotonic() < deadline:
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_worker_killed_in_the_middle_of_a_unit(cluster, whole, quiet, tmp_path):
    crew = RayCrew(SETTINGS, cluster.address, memory_per_worker="1GiB")
    killed = []

    def kill() -> bool:
        for process in _at_work()[:1]:
            process.kill()
            killed.append(process.pid)
            time.sleep(0.2)
        return crew.repeated > 0  # it was in the middle of one

    watch = _meanwhile(tmp_path / "run", 3, kill)
    run_study(SETTINGS, tmp_path / "run", crew=crew, console=quiet)
    watch.join()
    assert killed
    assert 1 <= crew.repeated <= len(killed)
    assert len(crew.peaks) == 2
    assert all(2**27 < peak <= 2**30 for peak in crew.peaks.values())
    assert json.loads((tmp_path / "run/workers.json").read_text()) == {
        "peak_memory": crew.peaks, "memory_per_worker": 2**30, "repeated": crew.repeated
    }  # fmt: skip
    assert re.search(r"2 workers on Ray, at most 0\.\d\d GiB each of 1\.00 GiB; [1-9]", crew.summary)
    _same(tmp_path / "run", whole)


def test_a_node_removed_in_the_middle_of_the_study(cluster, whole, quiet, tmp_path):
    crew = RayCrew(SETTINGS, cluster.address)
    lost = next(iter(cluster.worker_nodes))

    def remove() -> bool:
        cluster.remove_node(lost, allow_graceful=False)
        return True

    watch = _meanwhile(tmp_path / "run", 3, remove)
    try:
        run_study(SETTINGS, tmp_path / "run", crew=crew, console=quiet)
    finally:
        watch.join()
        cluster.add_node(num_cpus=1, **NODE)
    assert not lost.any_processes_alive()
    assert crew.repeated >= 1
    _same(tmp_path / "run", whole)


def test_the_driver_killed_and_resumed(cluster, whole, quiet, tmp_path):
    folder, settings = tmp_path / "run", tmp_path / "settings.json"
    settings.write_text(SETTINGS.as_json())
    command = [sys.executable, "-c", DRIVER, str(settings), str(folder), cluster.address]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
        while len(list(folder.glob("parts/*/*/*.parquet"))) < 3 and driver.poll() is None:
            time.sleep(0.002)
        driver.kill()
        driver.wait()
        assert driver.returncode == -signal.SIGKILL, driver.stderr.read().decode()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("parts/*/*/*.parquet")}
    assert 3 <= len(done) < len(list(whole.glob("parts/*/*/*.parquet")))
    crew = RayCrew(SETTINGS, cluster.address)  # finds room again: the workers of a driver end with it
    run_study(SETTINGS, folder, resume=True, crew=crew, console=quiet)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "a finished part was done again"
    _same(folder, whole)


class Spoiling(RayCrew):
    """Empties a picture once the study has read its data: what a failing disk does."""

    picture: Path

    def run(self, tasks):
        self.picture.write_bytes(b"")
        return super().run(tasks)


def test_a_failing_unit_is_reported_with_its_examples_and_the_rest_completes(cluster, quiet, tmp_path):
    rows = ["id,image,question,answer"]
    for number in range(12):
        Image.new("RGB", (40, 40), (20 * number, 90, 60)).save(tmp_path / f"{number}.png")
        rows += [f"q{number},{number}.png,is there a red 7 ?,no"]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    settings = Settings(models=SETTINGS.models, data=f"file:{tmp_path / 'data.csv'}", shard_size=3, claims=("A1",))
    run_study(settings, tmp_path / "whole", workers=1, console=quiet)
    parts = {path.name for path in (tmp_path / "whole").glob("parts/accuracy/*/*")}
    spoilt = pd.read_parquet(tmp_path / "whole/parts/accuracy/llava/0001.parquet")["example"].tolist()

    crew = Spoiling(settings, cluster.address)
    crew.picture = tmp_path / f"{spoilt[1].removeprefix('q')}.png"
    content = crew.picture.read_bytes()
    with pytest.raises(UnitsFailed, match=f"accuracy/llava/0001, examples {spoilt[0]} to {spoilt[-1]}") as caught:
        run_study(settings, tmp_path / "run", crew=crew, console=quiet)
    assert "--resume" in str(caught.value)
    failed = json.loads((tmp_path / "run/failed.json").read_text())
    assert failed[0]["examples"] == spoilt
    assert crew.picture.name in failed[0]["error"]
    assert {path.name for path in (tmp_path / "run").glob("parts/accuracy/*/*")} == parts - {"0001.parquet"}

    crew.picture.write_bytes(content)
    run_study(settings, tmp_path / "run", resume=True, workers=1, console=quiet)  # without Ray
    found, expected = _results(tmp_path / "run"), _results(tmp_path / "whole")
    assert {name for name in expected if found.get(name) != expected[name]} <= {"report.html"}
    assert not (tmp_path / "run/failed.json").exists()


def test_what_fails_always_is_tried_three_times_and_what_is_wrong_once(cluster):
    with RayCrew(SETTINGS, cluster.address, workers=1) as crew:
        tasks = [
            Task(operator.truediv, (1, 0), path=Path("parts/accuracy/m/0000.parquet"), examples=("a", "b")),
            Task(os._exit, (1,), path=Path("parts/accuracy/m/0001.parquet"), examples=("c",)),
            Task(operator.truediv, (6, 3)),
        ]
        found = []
        with pytest.raises(UnitsFailed, match=f"tried {TRIES} times: accuracy/m/0000, examples a to b") as caught:
            found.extend(result for _, result in crew.run(tasks))
        assert found == [2.0]
        assert [(failure.unit, failure.tries) for failure in caught.value.failures] == [
            ("accuracy/m/0000", TRIES),
            ("accuracy/m/0001", TRIES),
        ]
        assert isinstance(caught.value.failures[0].error, ZeroDivisionError)
        assert crew.repeated == 2 * (TRIES - 1)
        with pytest.raises(ModelError, match="no/such-model"):
            list(crew.run([Task(load, ("no/such-model",))]))
        assert crew.repeated == 2 * (TRIES - 1)


def _filled(pieces: int) -> int:
    """Holds so many pieces of 16 MiB, and says how many there were."""
    return len([torch.ones(2**22) for _ in range(pieces)])


def test_a_worker_cannot_exceed_its_memory_and_says_which_examples_needed_more(cluster):
    bound = 768 * 2**20
    with RayCrew(SETTINGS, cluster.address, workers=1, memory_per_worker="768MiB") as crew:
        needy = Task(_filled, (80,), path=Path("parts/accuracy/m/0000.parquet"), examples=("a", "b"))
        tables = Task(numpy.ones, (2**28,), path=Path("parts/accuracy/m/0001.parquet"), examples=("c",))
        found = []
        with pytest.raises(UnitsFailed, match="tried once: accuracy/m/0000, examples a to b") as caught:
            found.extend(result for _, result in crew.run([needy, tables, Task(_filled, (4,))]))
        assert found == [4], "the worker goes on"
        assert crew.repeated == 0
        assert all(bound - 2**28 < peak <= bound for peak in crew.peaks.values())
        for failure, who in zip(caught.value.failures, ("DefaultCPUAllocator", "Unable to allocate"), strict=True):
            assert "a worker's memory of 0.75 GiB on" in str(failure.error)
            assert who in str(failure.error)
            assert "raise --memory-per-worker" in str(failure.error)
        (_, left), *_ = crew.run([Task(left_to_process, ())])
        assert 0 < left < bound, "the engine's budget is a share of what is left"
        with pytest.raises(StudyError, match=r"^_filled tables of m: a worker's memory of 0\.75 GiB on"):
            list(crew.run([Task(_filled, (80,), "tables of m")]))
    with RayCrew(SETTINGS, cluster.address, workers=1) as crew:
        assert [result for _, result in crew.run([replace(needy), Task(left_to_process, ())])] == [80, sys.maxsize]
        assert max(crew.peaks.values()) > bound


def test_a_bound_that_no_worker_or_machine_can_keep(cluster):
    small = RayCrew(SETTINGS, cluster.address, workers=1, memory_per_worker="100MiB")
    with small, pytest.raises(StudyError, match=r"is 0\.10 GiB, and a worker without a model holds 0\.\d\d GiB; raise"):
        list(small.run([Task(operator.add, (1, 1))]))
    with pytest.raises(StudyError, match=r"no room for a worker .* 1 cores, 0 GPUs .* 9000\.00 GiB of memory for each"):
        RayCrew(SETTINGS, cluster.address, memory_per_worker="9000GiB").__enter__()
    with pytest.raises(StudyError, match="memory_per_worker is 'much'; expected bytes, or a size such as '2GiB'"):
        RayCrew(SETTINGS, "local", memory_per_worker="much")


def test_workers_that_die_one_after_another_end_the_study(cluster, monkeypatch):
    monkeypatch.setattr(ray_pool, "TRIES", 1)
    with (
        RayCrew(SETTINGS, cluster.address, workers=1) as crew,
        pytest.raises(StudyError, match=r"2 times a worker died before any unit was finished .*--memory-per-worker"),
    ):
        list(crew.run([Task(os._exit, (1,), examples=(name,)) for name in "abc"]))


def test_a_machine_without_the_model_ends_the_study(cluster, random_model, tmp_path):
    """By its Hub name, a model lies in each machine's own cache; here the only machine with room has an empty one."""
    snapshot = tmp_path / "full/hub/models--org--tiny/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "full/hub/models--org--tiny/refs").mkdir()
    (tmp_path / "full/hub/models--org--tiny/refs/main").write_text("0123")
    shutil.copytree(random_model, snapshot)
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)
    caches = [{"HF_HOME": str(tmp_path / name), "HF_HUB_OFFLINE": "1"} for name in ("empty",)]
    nodes = [cluster.add_node(num_cpus=1, env_vars=env, **NODE) for env in caches]
    shard = shards(load_material(SETTINGS).conditions, 6)[0]
    try:
        with RayCrew(replace(SETTINGS, models=("org/tiny",)), cluster.address, workers=1) as crew:
            tasks = [Task(measure, ("org/tiny", "accuracy", shard, {}, "?"), examples=shard.ids) for _ in range(2)]
            with pytest.raises(Unfit, match=r"org/tiny cannot be loaded on .*expected the same files everywhere"):
                list(crew.run(tasks))
    finally:
        for node in nodes:
            cluster.remove_node(node)
        for _ in range(2):
            cluster.add_node(num_cpus=1, **NODE)


def test_a_cluster_of_another_ray_is_refused(cluster):
    """What its head says of itself is what another version would say."""
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray._raylet import GcsClient

    client = GcsClient(address=cluster.address)
    told = client.internal_kv_get(b"CLUSTER_METADATA", namespace=KV_NAMESPACE_CLUSTER)
    other = json.dumps({**json.loads(told), "ray_version": "2.9.3"}).encode()
    client.internal_kv_put(b"CLUSTER_METADATA", other, True, KV_NAMESPACE_CLUSTER)
    try:
        with pytest.raises(
            StudyError, match=r"runs other versions than this machine .*Ray: 2\.9\.3 .*constraints\.txt"
        ):
            RayCrew(SETTINGS, cluster.address).__enter__()
    finally:
        client.internal_kv_put(b"CLUSTER_METADATA", told, True, KV_NAMESPACE_CLUSTER)


def test_workers_of_other_versions_are_refused(cluster, quiet, tmp_path):
    other = tmp_path / "site" / "transformers-4.0.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    path = os.pathsep.join([str(other.parent), *sys.path])
    node = cluster.add_node(num_cpus=1, resources={"odd": 1}, env_vars={"PYTHONPATH": path}, **NODE)
    try:
        with pytest.raises(StudyError, match=r"other versions: transformers is 5\S+ here and 4\.0\.0 there"):
            run_study(SETTINGS, tmp_path / "run", crew=RayCrew(SETTINGS, cluster.address, 3), console=quiet)
    finally:
        cluster.remove_node(node)
    assert not list((tmp_path / "run").glob("parts/*"))


def test_a_model_with_other_weights_on_a_worker_is_refused():
    shard = shards(load_material(SETTINGS).conditions, 6)[0]
    with Crew(SETTINGS, 1) as crew, pytest.raises(ModelError, match=r"testbed:llava on .* has other weights"):
        list(crew.run([Task(measure, ("testbed:llava", "accuracy", shard, {}, "0" * 16))]))


def test_a_cluster_without_room_and_a_cluster_that_is_gone(cluster, monkeypatch):
    on_gpu = Settings(models=SETTINGS.models, device="cuda")
    with pytest.raises(
        StudyError, match=r"no room for a worker .* 0 GPUs .*expected a machine with a core, 1 GPUs for each"
    ):
        RayCrew(on_gpu, cluster.address, gpus_per_worker=1).__enter__()
    with RayCrew(SETTINGS, cluster.address) as crew:
        assert [result for _, result in crew.run([Task(operator.add, (1, 1))] * 2)] == [2, 2]
        monkeypatch.setattr(ray_pool, "PATIENCE", 1.0)
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        with pytest.raises(StudyError, match="gave no worker for 1 s"):
            list(crew.run([Task(time.sleep, (20,))] * 2))
    for _ in range(2):
        cluster.add_node(num_cpus=1, **NODE)


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("127.0.0.1:1", "cannot be reached"),
        ("nowhere", "'nowhere'; expected local, auto, or HOST:PORT"),
        ("ray://127.0.0.1:10001", "expected local, auto, or HOST:PORT"),
        ("127.0.0.1:99999999", "cannot be reached"),
    ],
)
def test_an_address_where_no_cluster_answers(address, named):
    with pytest.raises(StudyError, match=named):
        RayCrew(SETTINGS, address).__enter__()


def test_without_ray_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=re.escape('pip install "interp-vlm[ray]"')):
        RayCrew(SETTINGS, "local").__enter__()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--ray", "local", "--workers", "0"], "workers is 0"),
        (["--ray", "local", "--gpus-per-worker", "-1"], "gpus_per_worker is -1"),
        (["--ray", "local", "--gpus-per-worker", "1.5"], "gpus_per_worker is 1.5"),
        (["--ray", "local", "--gpus-per-worker", "1"], "without --device"),
        (["--ray", "local", "--device", "cuda"], "without --gpus-per-worker"),
        (["--gpus-per-worker", "1"], "without --ray"),
        (["--memory-per-worker", "2GiB"], "--memory-per-worker 2GiB without --ray"),
        (["--ray", "local", "--memory-per-worker", "2 apples"], "memory_per_worker is '2 apples'"),
    ],
)
@pytest.mark.parametrize("command", [("study",), ("compare", "testbed:llava")], ids=["study", "compare"])
def test_options_that_make_no_sense(monkeypatch, capsys, tmp_path, command, words, named):
    monkeypatch.setattr(sys, "argv", ["interp-vlm", *command, *words, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1), err
    assert err.startswith("error: ")
    assert named in err
    assert not list(tmp_path.iterdir())


def test_the_command_on_a_cluster_of_its_own(tmp_path):
    """From the command line to the report, with Ray's own messages kept off standard output."""
    words = ["--model", "testbed:llava", "--limit", "6", "--claims", "A1", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "study", *words, "--ray", "local", "--workers", "1"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == f"report: {(tmp_path / 'run' / 'report.html').resolve()}"
    assert "1 worker on Ray, at most 0." in done.stderr
