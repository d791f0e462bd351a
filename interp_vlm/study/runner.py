"""From settings to a finished run folder: measure every shard once, summarise, report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from interp_vlm.study.agenda import Agenda, Course, Job
from interp_vlm.study.claim import fingerprint, load_claims
from interp_vlm.study.folder import RunFolder, write_bytes, write_frame
from interp_vlm.study.settings import Settings, short_names
from interp_vlm.study.work import Crew, Task, UnitsFailed, describe, joined, measure, prepare, summarise

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.study.claim import Claim
    from interp_vlm.study.experiment import Experiment
    from interp_vlm.study.material import Material, Shard
    from interp_vlm.study.ray_pool import RayCrew

__all__ = ["default_workers", "run_study"]


def default_workers(settings: Settings) -> int:
    """A process per core (up to four) for the embedded models, which are small; one for models that fill a machine."""
    return min(4, os.cpu_count() or 1) if settings.small else 1


def run_study(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    workers: int | None = None,
    console: Console | None = None,
    crew: RayCrew | None = None,
) -> Path:
    """Run a study, or go on with one.

    Args:
        settings: what decides the numbers.
        out: the run folder; it must be empty or new unless `resume`.
        resume: go on with the study in `out`; what was finished is not done again.
        workers: processes; by default see `default_workers`. The numbers do not depend on it.
        console: where progress is shown; by default standard error.
        crew: who works instead of processes of this machine.

    Returns:
        The path of the report.

    Raises:
        StudyError: the folder holds something else, or was started differently; a claim that cannot be read; on a
            cluster, units that failed (`UnitsFailed`) while all others were done.
        ModelError, DataError: a model or data that cannot be read; nothing has been written then.
    """
    claims = load_claims(settings.claims)
    folder, console = RunFolder(out), console or Console(stderr=True)
    with (
        folder.opened(settings, resume),
        crew or Crew(settings, workers or default_workers(settings)) as hands,
    ):
        # here, since these imports take seconds, in which the workers load a model
        from interp_vlm.study.material import load_material
        from interp_vlm.study.report import draw, write_report

        material = load_material(settings)
        with console.status("loading the models"):
            facts = _describe(hands, settings, material)
        same = {"examples": material.fingerprint, "claims": fingerprint(claims)}
        folder.begin(settings, {**same, **{model: known["weights"] for model, known in facts.items()}})
        plan = _plan(folder, settings, material, {model: known["weights"] for model, known in facts.items()})
        failed = folder.path / "failed.json"
        failed.unlink(missing_ok=True)
        try:
            _work(hands, plan, settings, console)
        except UnitsFailed as error:
            write_bytes(failed, error.as_json().encode())
            raise
        with console.status("tables and report"):
            tables = _tables(plan, folder, settings)
            if claims:
                tables["claims"] = _verdicts(claims, tables, facts, folder, settings)
            names = list(short_names(settings.models).values())
            sections = [Task(draw, (e, tables[e], names), e) for e in settings.experiments if len(tables.get(e, ()))]
            drawn = {task.label: section for task, section in hands.run(sections)}
            if crew is not None:
                write_bytes(folder.path / "workers.json", crew.as_json().encode())
            return write_report(folder, settings, material, facts, tables, drawn)


@dataclass(eq=False)
class _Planned:
    """One experiment of one model: its shards, where their rows go, and its table once it is there."""

    experiment: Experiment
    model: str
    shards: tuple[Shard, ...]
    paths: tuple[Path, ...]
    aside: Mapping[str, Any]
    weights: str
    table: pd.DataFrame | None = None

    def course(self, settings: Settings, advance: Callable[[int], object]) -> Course:
        """What is not done yet: what the shards share, the shards, the table."""
        units = [
            self._unit(shard, path, advance)
            for shard, path in zip(self.shards, self.paths, strict=True)
            if not path.is_file()
        ]
        items = sum(len(shard.items) for shard in self.shards)
        table = Job(self._summary, partial(setattr, self, "table"), items * self.experiment.closing)
        return Course([self._preparation() if units else [], units, [table]], settings.models.index(self.model))

    def _preparation(self) -> list[Job]:
        if self.experiment.prepare is None:
            return []
        ids = tuple(example.id for listed in self.aside.values() for example in listed)
        arguments = (self.model, self.experiment.name, self.aside, self.weights)
        task = Task(prepare, arguments, self._label, examples=ids)
        return [Job(lambda: task, partial(setattr, self, "aside"), len(ids))]

    def _unit(self, shard: Shard, path: Path, advance: Callable[[int], object]) -> Job:
        def make() -> Task:
            arguments = (self.model, self.experiment.name, shard, self.aside, self.weights)
            return Task(measure, arguments, self._label, path, shard.ids)

        def take(content: bytes) -> None:
            write_bytes(path, content)
            advance(self.weight(shard))

        return Job(make, take, self.weight(shard))

    def _summary(self) -> Task:
        return Task(summarise, (self.experiment.name, joined(self.paths)), self._label)

    @property
    def _label(self) -> str:
        return f"{self.experiment.name}/{self.model}"

    def weight(self, shard: Shard) -> int:
        """Forward passes of a shard."""
        return len(shard.items) * self.experiment.passes

    @property
    def total(self) -> int:
        """Forward passes of all shards."""
        return sum(map(self.weight, self.shards))

    @property
    def finished(self) -> int:
        """Forward passes whose rows are there."""
        return sum(self.weight(s) for s, path in zip(self.shards, self.paths, strict=True) if path.is_file())


def _describe(crew: Crew | RayCrew, settings: Settings, material: Material) -> dict[str, dict[str, Any]]:
    example = next(iter(material.conditions.values()))[0]
    found = {task.label: facts for task, facts in crew.run([Task(describe, (m, example), m) for m in settings.models])}
    return {model: found[model] for model in settings.models}


def _plan(folder: RunFolder, settings: Settings, material: Material, weights: Mapping[str, str]) -> list[_Planned]:
    from interp_vlm.study.experiments import EXPERIMENTS
    from interp_vlm.study.material import shards

    names, plan = short_names(settings.models), []
    for model in settings.models:
        for experiment in (EXPERIMENTS[name] for name in settings.experiments):
            aside = {name: getattr(material, name) for name in experiment.needs}
            if not all(aside.values()):
                continue
            cut = tuple(shards(experiment.material(material), settings.shard_size))
            paths = tuple(folder.part(experiment.name, names[model], shard.number) for shard in cut)
            if cut:
                plan.append(_Planned(experiment, model, cut, paths, aside, weights[model]))
    return plan


def _work(crew: Crew | RayCrew, plan: Sequence[_Planned], settings: Settings, console: Console) -> None:
    """Do what is not done, with a bar of the forward passes for each model, or one for the whole of a cluster.

    Model by model, so that each is loaded once. An experiment is summarised while others are measured.
    """
    names = short_names(settings.models)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    # written to a file, a bar would be one more line beside an error
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        titles = {planned: crew.title or names[planned.model] for planned in plan}
        bars = {
            title: progress.add_task(
                title,
                total=sum(planned.total for planned in plan if titles[planned] == title),
                completed=sum(planned.finished for planned in plan if titles[planned] == title),
            )
            for title in dict.fromkeys(titles.values())
        }
        agenda = Agenda([p.course(settings, partial(progress.advance, bars[titles[p]])) for p in plan])
        for task, result in crew.run(agenda):
            agenda.done(task, result)


def _tables(plan: Sequence[_Planned], folder: RunFolder, settings: Settings) -> dict[str, pd.DataFrame]:
    """Per experiment the examples and the tidy table of all models, written and returned."""
    import pandas as pd

    names, tables = short_names(settings.models), {}
    for experiment in dict.fromkeys(planned.experiment.name for planned in plan):
        own = [planned for planned in plan if planned.experiment.name == experiment]
        rows = [_named(joined(planned.paths), names[planned.model]) for planned in own]
        write_frame(folder.path / "examples" / f"{experiment}.parquet", pd.concat(rows, ignore_index=True))
        each = [_named(planned.table, names[planned.model]) for planned in own if planned.table is not None]
        table = tables[experiment] = pd.concat(each, ignore_index=True)
        _write_table(folder, experiment, table)
    return tables


def _verdicts(
    claims: Sequence[Claim],
    tables: Mapping[str, pd.DataFrame],
    facts: Mapping[str, Mapping[str, Any]],
    folder: RunFolder,
    settings: Settings,
) -> pd.DataFrame:
    """The table of claims, written and returned."""
    from interp_vlm.study.verdict import judge_claims

    names = short_names(settings.models)
    table = judge_claims(claims, tables, {names[model]: known for model, known in facts.items()})
    _write_table(folder, "claims", table)
    return table


def _write_table(folder: RunFolder, name: str, table: pd.DataFrame) -> None:
    write_frame(folder.path / "tables" / f"{name}.parquet", table)
    write_bytes(folder.path / "tables" / f"{name}.csv", table.to_csv(index=False).encode())


def _named(frame: pd.DataFrame, model: str) -> pd.DataFrame:
    frame.insert(0, "model", model)
    return frame
