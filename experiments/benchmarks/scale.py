"""What a study gains from a second worker on Ray, and how much memory each worker takes.

    python experiments/benchmarks/scale.py                    # 600 questions, some minutes
    python experiments/benchmarks/scale.py --limit 60         # smaller; needs two free cores either way

The same study runs with one worker and with two, in turns, each on a Ray cluster of this machine that is started for
it, each worker on one thread. `whole` is the time on the wall from the command to its end. `start` is the part of it
before the first unit is handed out: Ray and the workers start, load the model, and one describes it. `work` is the time
from there to the last table of numbers; then come the figures and the report. Tables and rows of examples of all runs
must be the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from interp_vlm.study.ray_pool import RayCrew
from interp_vlm.study.runner import run_study
from interp_vlm.study.settings import Settings
from interp_vlm.study.work import Task, measure, prepare, summarise

NEEDED = 1.7


class Timed(RayCrew):
    """A crew that knows when the first unit was handed out, and when the last table came back."""

    first = last = 0.0

    def run(self, tasks: Iterable[Task | None]) -> Iterator[tuple[Task, Any]]:
        def watched() -> Iterator[Task | None]:
            for task in tasks:
                if task is not None and task.call in (prepare, measure):
                    self.first = self.first or time.time()
                yield task

        for task, result in super().run(watched()):
            if task.call is summarise:
                self.last = time.time()
            yield task, result


def study(settings: Settings, workers: int, folder: Path) -> tuple[dict[str, float], list[int]]:
    """Seconds of the whole study and of its parts, and the peak memory of each worker in bytes; in a new process."""
    begun = time.time()
    words = [sys.executable, __file__, "--once", settings.as_json(), str(workers), str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    whole, told = time.time() - begun, json.loads(done.stdout.splitlines()[-1])
    return {"whole": whole, "start": told["first"] - begun, "work": told["last"] - told["first"]}, told["peaks"]


def once(settings: Settings, workers: int, folder: Path) -> dict[str, Any]:
    """What that process does, and when its first unit was handed out and its last table came back."""
    crew = Timed(settings, "local", workers)
    run_study(settings, folder, crew=crew, console=Console(quiet=True))
    return {"first": crew.first, "last": crew.last, "peaks": list(crew.peaks.values())}


def results(folder: Path) -> dict[str, bytes]:
    """The tables and rows of examples, as bytes."""
    return {path.name: path.read_bytes() for part in ("tables", "examples") for path in (folder / part).iterdir()}


def compare(limit: int, rounds: int, claims: tuple[str, ...] = ("all",)) -> dict[str, Any]:
    """Seconds by number of workers and round, and the largest peak of any worker."""
    settings = Settings(models=("testbed:llava",), limit=limit, claims=claims)
    seconds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    peaks: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        expected: dict[str, bytes] = {}
        for turn in range(rounds):
            for workers in (1, 2) if turn % 2 == 0 else (2, 1):
                out = Path(folder) / f"{turn}-{workers}"
                took, held = study(settings, workers, out)
                seconds[workers].append(took)
                peaks += held
                expected = expected or results(out)
                assert results(out) == expected, "two workers gave other tables than one"
    return {
        "questions": settings.n,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "seconds": seconds,
        "peaks": peaks,
        "same_bytes": True,
        **{
            f"{span}_ratios": [one[span] / two[span] for one, two in zip(seconds[1], seconds[2], strict=True)]
            for span in ("whole", "work")
        },
    }


def rows(quick: bool = False) -> list[dict[str, Any]]:
    """What `make bench` shows: the gain in time, and the memory of a worker."""
    found = compare(6, 1, ("A1",)) if quick else compare(600, 1)
    setting = f"{found['questions']} questions, testbed:llava, {found['cores']} cores, load {found['load']}"
    gains = [
        {
            "what": f"{what}, two workers on Ray",
            "against": "one worker on Ray",
            "value": float(np.median(found[ratios])),
            "low": min(found[ratios]),
            "high": max(found[ratios]),
            "unit": "times sooner",
            "note": f"time on the wall; {setting}; needed {NEEDED}; the same bytes",
        }
        for what, ratios in (("a study", "whole_ratios"), ("a study without its start and its report", "work_ratios"))
    ]
    peaks = np.array(found["peaks"]) / 2**30
    memory = {
        "what": "peak memory of a worker",
        "against": "",
        "value": float(peaks.max()),
        "low": float(peaks.min()),
        "high": float(peaks.max()),
        "unit": "GiB",
        "note": f"{len(peaks)} workers; Python, torch and the model included",
    }
    starts = [took["start"] for each in found["seconds"].values() for took in each]
    start = {
        "what": "start of Ray, its workers and the model",
        "against": "",
        "value": float(np.median(starts)),
        "low": min(starts),
        "high": max(starts),
        "unit": "s",
        "note": "from the command to the first unit handed out; part of a study, whatever its size",
    }
    return [*gains, start, memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=600, help="questions")
    parser.add_argument("--rounds", type=int, default=1, help="how often each runs")
    parser.add_argument("--claims", default="all", help="as interp-vlm study takes them: A1 is a small study")
    parser.add_argument("--once", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        settings, workers, folder = options.once
        print(json.dumps(once(Settings.from_json(settings), int(workers), Path(folder))))
        return
    print(json.dumps(compare(options.limit, options.rounds, tuple(options.claims.split(",")))))


if __name__ == "__main__":
    main()
