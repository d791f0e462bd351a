"""The work of a study on a Ray cluster: the same tasks, done by actors on any number of machines.

Ray starts the actors, starts them again when they or their machines die, and carries arguments and results. What is
done and who writes it stays as in one process: an actor returns a finished unit as the bytes of its Parquet file, and
the study's own process alone writes it. So a unit that is done twice changes nothing, and the machines need no disk
in common for the run folder.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Any

from interp_vlm.errors import InterpVLMError, StudyError
from interp_vlm.study.bound import REMEDY, TooLittleMemory, bounded, in_bytes, in_words, spare
from interp_vlm.study.folder import versions
from interp_vlm.study.settings import Settings
from interp_vlm.study.work import Failure, Task, Unfit, UnitsFailed, hold, warm

__all__ = ["TRIES", "RayCrew"]

TRIES = 3
"""How often a unit is tried, whether it fails or its worker dies; an error of this library is final at once."""

PATIENCE = 300.0  # seconds without any worker before a study gives up: a machine may take minutes to come
OBJECT_STORE = 256 * 2**20  # bytes; what a unit takes and gives is small
KEPT = 4  # arguments that many tasks share; those of one model are used together
REACH = 10.0  # seconds in which the cluster's head must answer


class Worker:
    """The actor: one process that holds one model."""

    def __init__(self, settings: Settings, folder: str, memory: int | None) -> None:
        with suppress(OSError):
            os.chdir(folder)  # relative paths mean what they mean to the study
        hold(settings)
        self._memory, self._spare = memory, 0

    def ready(self) -> tuple[str, dict[str, str]]:
        """The name of this machine and the versions that this worker runs."""
        if self._memory is not None:
            self._spare = spare(self._memory)
        return socket.gethostname(), _versions()

    def warm(self, model: str) -> None:
        """Load a model while the study draws its examples."""
        with suppress(TooLittleMemory), bounded(self._memory, self._spare):
            warm(model)

    def do(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
        """The result of a task, and the most memory that this worker ever held, in bytes."""
        with bounded(self._memory, self._spare):
            return call(*arguments), _peak()


@dataclass(frozen=True, eq=False)
class _Try:
    """A task and how often it failed before."""

    task: Task
    failed: int = 0


class RayCrew(AbstractContextManager["RayCrew"]):
    """Runs tasks in Ray actors; stands in for `Crew` in `run_study`.

    Args:
        settings: of the study.
        address: "local" for a cluster of this machine that ends with the study, "auto" for the running cluster that
            this machine belongs to, or HOST:PORT of the head of such a cluster.
        workers: actors; by default as many as the cluster has room for: one for every `gpus_per_worker` GPUs, or one a
            core for the embedded models, or one a machine.
        gpus_per_worker: GPUs of an actor; a share for several actors on one.
        memory_per_worker: bytes of main memory, or a size such as "2GiB", that an actor needs, and beyond which its
            system gives it none (Linux). The engine's own budget is a share of what is left of it.

    Attributes:
        peaks: by worker, the most memory that it held, in bytes.
        repeated: how often a unit was done again.

    Raises:
        StudyError: for numbers that make no sense, here; on entering, when Ray is missing, the cluster cannot be
            reached or has no room for a worker; in `run`, when a worker runs other versions, when none is left, and
            after everything else is done when a unit failed `TRIES` times.

    Example:
        >>> crew = RayCrew(Settings(models=("testbed:llava",)), "local", workers=2)
        >>> crew.title
        '2 workers on Ray'
    """

    def __init__(
        self,
        settings: Settings,
        address: str,
        workers: int | None = None,
        gpus_per_worker: float = 0.0,
        memory_per_worker: str | int | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise StudyError(f"workers is {workers}", expected="a whole number from 1")
        whole = gpus_per_worker <= 1 or gpus_per_worker == floor(gpus_per_worker)
        if not (0 <= gpus_per_worker < float("inf") and whole):
            raise StudyError(
                f"gpus_per_worker is {gpus_per_worker}", expected="0, a share up to 1, or a whole number of GPUs"
            )
        on_gpu = settings.device not in (None, "cpu")
        if on_gpu != (gpus_per_worker > 0):
            found = f"--device {settings.device}" if on_gpu else f"--gpus-per-worker {gpus_per_worker:g}"
            missing = "--gpus-per-worker" if on_gpu else "--device cuda"
            raise StudyError(f"{found} on Ray without {missing}", remedy=f"pass {missing} too")
        self._settings, self._address, self._asked, self._gpus = settings, address, workers, gpus_per_worker
        self._memory = None if memory_per_worker is None else in_bytes(memory_per_worker)
        self._room = self._died = 0
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, _Try]] = {}
        self._sent: dict[int, tuple[Any, Any]] = {}  # with the argument, so that its id stays its own
        self._messages = redirect_stdout(sys.stderr)  # Ray prints what it sees of dead workers
        self.peaks: dict[str, int] = {}
        self.repeated = 0

    @property
    def title(self) -> str:
        """Who works, in words."""
        number = self._asked or self._room
        return f"{number or ''} worker{'s' * (number != 1)} on Ray".strip()

    @property
    def summary(self) -> str:
        """What the work took, in a line."""
        peak = f"at most {in_words(max(self.peaks.values()))} each" if self.peaks else "nothing to do"
        if self._memory is not None:
            peak += f" of {in_words(self._memory)}"
        again = f"; {self.repeated} times a unit was done again" if self.repeated else ""
        return f"{self.title}, {peak}{again}"

    def as_json(self) -> str:
        """The same for machines: bytes of memory by worker, the bound on it, and how often a unit was done again."""
        found = {"peak_memory": self.peaks, "memory_per_worker": self._memory, "repeated": self.repeated}
        return json.dumps(found, indent=1) + "\n"

    def __enter__(self) -> RayCrew:
        ray = _connected(self._address, self._asked or os.cpu_count() or 1)
        self._messages.__enter__()
        try:
            self._room = _room(ray.nodes(), self._settings, self._gpus, self._memory)
            if not self._room:
                raise self._crowded(ray.nodes())
            needs = {"num_gpus": self._gpus} | ({} if self._memory is None else {"memory": self._memory})
            # Spread, so that a machine lost takes few with it; restarted by Ray wherever there is room again.
            actor = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=0, scheduling_strategy="SPREAD", **needs)(
                Worker
            )
            for _ in range(self._asked or self._room):
                worker = actor.remote(self._settings, str(Path.cwd()), self._memory)
                self._await(worker)
                worker.warm.remote(self._settings.models[0])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        import ray
        from ray.exceptions import RayError

        for worker in (*self._idle, *self._starting.values(), *(worker for worker, _ in self._busy.values())):
            with suppress(RayError):
                ray.kill(worker)
        for held in (self._idle, self._starting, self._busy, self._sent):
            held.clear()
        ray.shutdown()
        self._messages.__exit__(None, None, None)

    def run(self, tasks: Iterable[Task | None]) -> Iterator[tuple[Task, Any]]:
        """Run tasks and yield each with its result as it is finished, in any order.

        Args:
            tasks: `None` among them says that the next one waits for the result of another.

        Raises:
            StudyError: see the class; `UnitsFailed`, at the end, with every unit that failed.
            Unfit: a machine without the model, or with another one; what was done stays.
            InterpVLMError: what a task that is no unit of work (a model that cannot be loaded) raised on purpose.
        """
        left, again, failures = iter(tasks), deque[_Try](), list[Failure]()

        def following() -> _Try | None:
            if again:
                return again.popleft()
            task = next(left, None)
            return None if task is None else _Try(task)

        coming = following()
        while coming or self._busy:
            if coming and self._idle:
                self._give(self._idle.pop(), coming)
                coming = following()
                continue
            for tried, done in self._finished():
                if not isinstance(done, Exception):
                    yield tried.task, done
                elif isinstance(done, TooLittleMemory) and not tried.task.examples:
                    raise TooLittleMemory(f"{Failure(tried.task, done, 1).unit}: {done}")
                elif isinstance(done, Unfit) or (isinstance(done, InterpVLMError) and not tried.task.examples):
                    raise done
                elif isinstance(done, InterpVLMError) or tried.failed + 1 == TRIES:
                    failures.append(Failure(tried.task, _told(done), tried.failed + 1))
                else:
                    again.append(replace(tried, failed=tried.failed + 1))
                    self.repeated += 1
            coming = coming or following()
        if failures:
            raise UnitsFailed(failures)

    def _await(self, worker: Any) -> None:
        """Take a worker in as soon as it runs, for the first time or again."""
        self._starting[worker.ready.options(max_task_retries=-1).remote()] = worker

    def _give(self, worker: Any, tried: _Try) -> None:
        arguments = [self._once(argument) for argument in tried.task.arguments]
        self._busy[worker.do.remote(tried.task.call, *arguments)] = (worker, tried)

    def _once(self, argument: Any) -> Any:
        """What many tasks share (examples set aside) is sent to each machine once."""
        import ray

        if not isinstance(argument, Mapping):
            return argument
        if id(argument) not in self._sent:
            while len(self._sent) >= KEPT:  # the cluster forgets it when no task needs it any more
                del self._sent[next(iter(self._sent))]
            self._sent[id(argument)] = (ray.put(argument), argument)
        return self._sent[id(argument)][0]

    def _crowded(self, nodes: Iterable[Mapping[str, Any]]) -> StudyError:
        """What a worker needs, and what the machines have."""
        found = [
            f"{have.get('CPU', 0):g} cores, {have.get('GPU', 0):g} GPUs and {in_words(int(have.get('memory', 0)))}"
            for have in (node["Resources"] for node in nodes if node["Alive"])
        ]
        memory = "" if self._memory is None else f" and {in_words(self._memory)} of memory"
        return StudyError(
            f"the Ray cluster {self._address} has no room for a worker (its machines have {'; '.join(found)})",
            expected=f"a machine with a core, {self._gpus:g} GPUs{memory} for each",
            remedy="add a machine, or lower --gpus-per-worker or --memory-per-worker",
        )

    def _finished(self) -> list[tuple[_Try, Any]]:
        """Wait until something happens; the tasks that ended with it, with their results or exceptions."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        done, _ = ray.wait([*self._busy, *self._starting], num_returns=1, timeout=PATIENCE)
        if not done and not self._busy:
            raise StudyError(
                f"the Ray cluster {self._address} gave no worker for {PATIENCE:.0f} s",
                remedy="add a machine with a free core, and go on with --resume",
            )
        ended = []
        for ref in done:
            if ref in self._starting:
                worker = self._starting.pop(ref)
                _check(ref)
                self._idle.append(worker)
                continue
            worker, tried = self._busy.pop(ref)
            try:
                result, peak = ray.get(ref)
            except RayTaskError as error:
                self._died = 0
                self._idle.append(worker)
                ended.append((tried, error.cause if isinstance(error.cause, Exception) else error))
            except RayError as error:  # the worker died, or its machine, perhaps with the result
                self._died += 1
                if self._died > TRIES * (self._asked or self._room):
                    raise StudyError(
                        f"{self._died} times a worker died before any unit was finished ({_last(error)})", remedy=REMEDY
                    ) from error
                self._await(worker)
                ended.append((tried, error))
            else:
                self._died = 0
                self._idle.append(worker)
                self.peaks[worker._actor_id.hex()] = max(peak, self.peaks.get(worker._actor_id.hex(), 0))
                ended.append((tried, result))
        return ended


def _connected(address: str, cores: int) -> Any:
    """Ray, connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":  # Ray's ports, which ask for no password, then listen on the loopback alone
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise StudyError(
            f"--ray {address}, but Ray is not installed ({error})", remedy='pip install "interp-vlm[ray]"'
        ) from error
    import logging

    if address not in ("local", "auto"):
        _reach(address)
    here: dict[str, Any] = {"num_cpus": cores, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    try:
        ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False, **(here if address == "local" else {}))
    except (OSError, ValueError, RuntimeError, RayError) as error:
        if "Version mismatch" in str(error):
            raise StudyError(
                f"the Ray cluster {address} runs other versions than this machine ({' '.join(str(error).split())})",
                expected="the same Ray and Python on every machine",
                remedy="install the same here, for example with -c constraints.txt, or use --ray local",
            ) from error
        raise StudyError(
            f"the Ray cluster {address} cannot be used ({_last(error)})",
            expected="a running cluster of the same Ray and Python, with this machine in it",
            remedy="ray start --address=HOST:PORT on this machine, or use --ray local",
        ) from error
    return ray


def _reach(address: str) -> None:
    """Whether anybody listens there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in address:
        raise StudyError(f"--ray {address!r}", expected="local, auto, or HOST:PORT of a cluster's head")
    try:
        socket.create_connection((host, int(port)), timeout=REACH).close()
    except (OSError, OverflowError) as error:
        raise StudyError(
            f"the Ray cluster {address} cannot be reached ({error})",
            expected="the address that ray start --head printed",
            remedy="start the cluster, or use --ray local",
        ) from error


def _room(nodes: Iterable[Mapping[str, Any]], settings: Settings, gpus: float, memory: int | None) -> int:
    """How many workers the machines of the cluster can hold."""
    room = 0
    for node in nodes:
        found = node["Resources"] if node["Alive"] else {}
        cores = floor(found.get("CPU", 0))
        most = floor(found.get("GPU", 0) / gpus) if gpus else (cores if settings.small else 1)
        room += min(cores, most, cores if memory is None else floor(found.get("memory", 0) / memory))
    return room


def _check(ready: Any) -> None:
    """Refuse a worker that cannot start, or that runs other versions than this process."""
    import ray
    from ray.exceptions import RayError

    try:
        machine, there = ray.get(ready)
    except RayError as error:
        if isinstance(getattr(error, "cause", None), InterpVLMError):
            raise error.cause from None  # type: ignore[attr-defined]
        raise StudyError(
            f"a worker cannot start ({_last(error)})", expected="interp_vlm installed on every machine of the cluster"
        ) from error
    here = _versions()
    changed = [
        f"{name} is {version} here and {there.get(name)} there"
        for name, version in here.items()
        if version != there.get(name)
    ]
    if changed:
        raise StudyError(
            f"the worker on {machine} runs other versions: {'; '.join(changed)}",
            expected="the same on every machine",
            remedy="install the same versions there, for example with -c constraints.txt",
        )


def _told(error: Exception) -> Exception:
    """The error of a unit that is given up; a worker that died cannot say why itself."""
    from ray.exceptions import RayError, RayTaskError

    if not isinstance(error, RayError) or isinstance(error, RayTaskError):
        return error
    return StudyError(f"its worker died, perhaps for want of memory ({_last(error)})", remedy=REMEDY)


def _last(error: Exception) -> str:
    """What went wrong: Ray's own messages hold whole tracebacks."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions()}


def _peak() -> int:
    """The most memory that this process ever held, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
