"""The work of a study, in this process or in worker processes: describe a model, measure a shard, summarise a model.

The embedded models run on one thread, so that the numbers do not depend on how many processes share the work.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_vlm.errors import ModelError, StudyError
from interp_vlm.study.folder import parquet
from interp_vlm.study.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.data.example import Example
    from interp_vlm.study.experiment import Bench
    from interp_vlm.study.material import Shard
    from interp_vlm.vlm import VLM

__all__ = [
    "Crew",
    "Failure",
    "Task",
    "Unfit",
    "UnitsFailed",
    "describe",
    "hold",
    "joined",
    "measure",
    "prepare",
    "summarise",
    "warm",
]


@dataclass(frozen=True, eq=False)
class Task:
    """A function of this module with its arguments, and what it is about.

    A unit of work also says which file its result belongs in, and which examples it is about.
    """

    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    label: str = ""
    path: Path = Path()
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Failure:
    """A task that was given up: its last error, and how often it was tried."""

    task: Task
    error: Exception
    tries: int

    @property
    def unit(self) -> str:
        """Its name: experiment, model and number of the shard."""
        name = "/".join(self.task.path.parts[-3:]).removesuffix(".parquet")
        return name or f"{self.task.call.__name__} {self.task.label}"


class UnitsFailed(StudyError):
    """Units of work that failed while all others were done."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        self.failures = sorted(failures, key=lambda failure: failure.unit)
        first = self.failures[0]
        tries = "once" if first.tries == 1 else f"{first.tries} times"
        examples = f", examples {first.task.examples[0]} to {first.task.examples[-1]}" if first.task.examples else ""
        others = f", and {len(failures) - 1} more" if len(failures) > 1 else ""
        super().__init__(
            f"a unit of work failed, tried {tries}: {first.unit}{examples} "
            f"({type(first.error).__name__}: {first.error}){others}",
            remedy="the rest is done and saved, the run folder's failed.json names every example; "
            "--resume tries these again",
        )

    def as_json(self) -> str:
        """Every failed unit with its examples and its error."""
        found = [
            {
                "unit": failure.unit,
                "examples": failure.task.examples,
                "tries": failure.tries,
                "error": f"{type(failure.error).__name__}: {failure.error}",
            }
            for failure in self.failures
        ]
        return json.dumps(found, indent=1) + "\n"


class Unfit(ModelError):
    """A machine lacks what the study was begun with, so that whatever it is given would fail there."""


class Crew(AbstractContextManager["Crew"]):
    """Runs tasks in `workers` processes, or in this one when there is a single worker.

    Args:
        settings: of the study.
        workers: number of processes.
    """

    title = ""

    def __init__(self, settings: Settings, workers: int) -> None:
        self._settings, self._workers, self._pool, self._threads = settings, workers, None, 0
        if workers == 1:
            _HELD.clear()
            _HELD["settings"] = settings
            if settings.small:
                import torch

                self._threads = torch.get_num_threads()
                torch.set_num_threads(1)
            return
        import multiprocessing

        self._pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(settings,)
        )

    def run(self, tasks: Iterable[Task | None]) -> Iterator[tuple[Task, Any]]:
        """Run tasks and yield each with its result as it is finished, in any order.

        Args:
            tasks: `None` among them says that the next one waits for the result of another.

        Raises:
            StudyError: when a worker process dies.
        """
        if self._pool is None:
            for task in filter(None, tasks):
                yield task, task.call(*task.arguments)
            return
        try:
            left, waiting = iter(tasks), dict[Future[Any], Task]()
            while True:
                # few at a time: arguments and results may be whole tables
                for task in filter(None, islice(left, 2 * self._workers - len(waiting))):
                    waiting[self._pool.submit(task.call, *task.arguments)] = task
                if not waiting:
                    return
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise StudyError(
                "a worker process died, perhaps for want of memory",
                remedy="go on with --resume, with fewer --workers",
            ) from error

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        _HELD.clear()
        if self._threads:
            import torch

            torch.set_num_threads(self._threads)


# One model at a time is held in each process: tasks come model by model.
_HELD: dict[str, Any] = {}


def _prepare(settings: Settings) -> None:
    """Make a worker process ready."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # Ctrl-C reaches every process: end without a traceback
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    hold(settings)


def hold(settings: Settings) -> None:
    """Hold the settings in a process that only works: one thread, and no progress of its own."""
    import torch
    from transformers.utils import logging

    _HELD["settings"] = settings
    torch.set_num_threads(1)
    logging.disable_progress_bar()


def _leave_with_parent() -> None:
    """End this worker when the study that started it is killed: nobody else would."""
    import multiprocessing
    from multiprocessing.connection import wait as wait_for

    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _bench(model: str, aside: Mapping[str, Any] | None = None) -> Bench:
    from interp_vlm.study.experiment import Bench
    from interp_vlm.vlm import load

    if _HELD.get("model") != model:
        for name in ("bench", "model", "weights"):
            _HELD.pop(name, None)
        gc.collect()
        options = {} if _HELD["settings"].device is None else {"device_map": _HELD["settings"].device}
        _HELD["bench"], _HELD["model"] = Bench(load(model, **options), _HELD["settings"]), model
    bench: Bench = _HELD["bench"]
    missing = {name: value for name, value in (aside or {}).items() if not getattr(bench, name)}
    if missing:
        bench = _HELD["bench"] = replace(bench, **missing)
    return bench


def warm(model: str) -> None:
    """Load a model ahead of its first task, to which an error is left."""
    with suppress(Exception):
        _bench(model)


def describe(model: str, example: Example) -> dict[str, Any]:
    """Facts of a model, and a fingerprint of its weights.

    Args:
        model: as `iv.load` takes it.
        example: encoded to count its tokens.
    """
    vlm = _bench(model).vlm
    anatomy, tokens = vlm.anatomy, vlm.encode(example.image, example.question).tokens[0]
    return {
        "architecture": anatomy.architecture,
        "family": anatomy.family,
        "fusion": anatomy.fusion,
        "layers": anatomy.n_layers,
        "heads": anatomy.n_heads,
        "key_value_heads": anatomy.n_kv_heads,
        "width": anatomy.d_model,
        "prefix": anatomy.prefix,
        "parameters": sum(weight.numel() for weight in vlm.model.parameters()),
        "image_tokens": len(tokens.image),
        "prompt_tokens": len(tokens.all),
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "device": vlm.device.type,
        "weights": _weights(vlm),
    }


def _weights(vlm: VLM) -> str:
    """A fingerprint of a model's weights, from some of each."""
    from interp_vlm.engine.devices import weights

    digest = hashlib.sha256()
    for name, weight in weights(vlm.model):
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 64)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()[:16]


def prepare(model: str, experiment: str, aside: Mapping[str, tuple[Example, ...]], weights: str) -> Mapping[str, Any]:
    """What all shards of one model share: fields of the bench.

    Raises:
        Unfit: see `measure`.
    """
    from interp_vlm.study.experiments import EXPERIMENTS

    found = EXPERIMENTS[experiment].prepare
    return found(_known(model, aside, weights)) if found else aside


def measure(model: str, experiment: str, shard: Shard, aside: Mapping[str, Any], weights: str) -> bytes:
    """Measure one shard: its rows as a Parquet file, which the study's own process writes.

    Args:
        model: as `iv.load` takes it.
        experiment: its name.
        shard: what to measure.
        aside: fields of the bench: examples set aside, or what was found from them.
        weights: fingerprint of the model's weights where the study was begun.

    Raises:
        Unfit: when the model is not there, or has other weights than where the study was begun: another revision in
            this machine's cache, or a folder that has changed.
    """
    from interp_vlm.study.experiments import EXPERIMENTS

    return parquet(EXPERIMENTS[experiment].measure(_known(model, aside, weights), shard))


def _known(model: str, aside: Mapping[str, Any], weights: str) -> Bench:
    """The bench, with the model with which the study was begun."""
    try:
        bench = _bench(model, aside)
    except ModelError as error:
        raise Unfit(
            f"model {model} cannot be loaded on {socket.gethostname()} ({error.problem})",
            expected="the same files everywhere",
            remedy="put them at the same path, or into the cache of that machine, and go on with --resume",
        ) from error
    if "weights" not in _HELD:
        _HELD["weights"] = _weights(bench.vlm)
    if _HELD["weights"] != weights:
        raise Unfit(
            f"model {model} on {socket.gethostname()} has other weights than where the study was begun",
            expected="the same files everywhere",
            remedy="fetch the same revision there, and go on with --resume",
        )
    return bench


def summarise(experiment: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The tidy table of one model's rows."""
    from threadpoolctl import threadpool_limits

    from interp_vlm.study.experiments import EXPERIMENTS

    with threadpool_limits(limits=1):
        return EXPERIMENTS[experiment].summarise(rows, _HELD["settings"])


def joined(parts: Sequence[Path]) -> pd.DataFrame:
    """The rows of parts, in their order."""
    import pandas as pd

    frames = [_read(path) for path in parts]
    filled = [frame for frame in frames if len(frame)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise StudyError(f"{path} cannot be read ({error})", remedy="delete it and go on with --resume") from error
