"""What a study gains from a second worker on Ray, and how much memory each worker takes.

    python experiments/benchmarks/scale.py                    # 600 questions, some minutes
    python experiments/benchmarks/scale.py --limit 60         # smaller; needs two free cores either way

The same study runs with one worker and with two, in turns, each on a Ray cluster of this machine that is started for
it, each worker on one thread. `whole` is the time on the wall from the command to the report: with the start of Ray and
of the workers, which takes some seconds whatever the study, and the report, which one process writes. `units` is the
time from the first unit handed out to the last one written. Tables and rows of examples of all runs must be the same
bytes.
"""

from __future__ import annotations

import argparse
import json
import os
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
from interp_vlm.study.work import Task, measure

NEEDED = 1.7


class Timed(RayCrew):
    """A crew that knows how long its units took together."""

    units = 0.0

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        tasks = list(tasks)
        start = time.perf_counter()
        yield from super().run(tasks)
        if tasks and tasks[0].call is measure:
            self.units = time.perf_counter() - start


def study(settings: Settings, workers: int, folder: Path) -> tuple[dict[str, float], list[int]]:
    """Seconds of the whole study and of its units, and the peak memory of each worker in bytes."""
    crew, start = Timed(settings, "local", workers), time.perf_counter()
    run_study(settings, folder, crew=crew, console=Console(quiet=True))
    return {"whole": time.perf_counter() - start, "units": crew.units}, list(crew.peaks.values())


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
            for span in ("whole", "units")
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
        for what, ratios in (("a study", "whole_ratios"), ("its units of work", "units_ratios"))
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
    return [*gains, memory]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=600, help="questions")
    parser.add_argument("--rounds", type=int, default=1, help="how often each runs")
    parser.add_argument("--claims", default="all", help="as interp-vlm study takes them: A1 is a small study")
    options = parser.parse_args()
    print(json.dumps(compare(options.limit, options.rounds, tuple(options.claims.split(",")))))


if __name__ == "__main__":
    main()
