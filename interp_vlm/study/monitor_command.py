"""The commands `interp-vlm monitor fit | score | evaluate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.probes.monitor import ReliabilityMonitor
    from interp_vlm.vlm import VLM

__all__ = ["monitor"]

monitor = typer.Typer(help="Reliability monitors: is this answer to be trusted?", no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--monitor", help="Folder that `monitor fit` wrote.")]
Model = Annotated[
    str | None, typer.Option(help="Hub id, local folder or testbed:NAME.", show_default="the one it was fitted on")
]
Data = Annotated[
    str, typer.Option(help="digits, pope:FILE, file:PATH or hf:ID, options after '?': pope:FILE?images=FOLDER.")
]
Device = Annotated[str | None, typer.Option(help="Where the model goes: cuda, auto, ...", show_default="the CPU")]
Limit = Annotated[int | None, typer.Option(help="Questions at most.", show_default="600 digit questions; else all")]
BatchSize = Annotated[int, typer.Option(help="Examples of one forward pass.", min=1)]


@monitor.command()
def fit(
    model: Annotated[str, typer.Option(help="Hub id, local folder or testbed:NAME.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for the monitor.")],
    precision: Annotated[
        float | None, typer.Option(help="Choose a threshold: reliable answers are right in this share.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Choose a threshold: this share of right answers is called reliable.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the guarantee of --precision.")] = 0.9,
    held_out: Annotated[
        float, typer.Option(help="Share of the pictures that choose the threshold and fit nothing.")
    ] = 0.4,
    limit: Limit = None,
    layers: Annotated[str | None, typer.Option(help="Layers to probe, such as 8,12,16.", show_default="all")] = None,
    seed: Annotated[int, typer.Option(help="Of digit scenes, folds and the pictures held out.", min=0)] = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Fit a monitor on questions with known answers: probe every layer, keep the best, calibrate it, save it.

    Example: interp-vlm monitor fit --model testbed:llava --data "digits?difficulty=hard" --recall 0.9 --out runs/mine
    """
    import numpy as np

    from interp_vlm.data import load as load_data
    from interp_vlm.errors import DataError
    from interp_vlm.study.monitoring import judged, probed, set_aside, write_report
    from interp_vlm.vlm import load

    if precision is not None and recall is not None:
        raise DataError("both --precision and --recall", expected="one threshold", remedy="leave one out")
    chosen = "all" if layers is None else _numbers(layers)
    _check_place(out)
    vlm = load(model, device_map=device)
    examples = load_data(data, limit=limit, seed=seed)
    with _bar("asking", len(examples)) as done:
        found = judged(vlm, examples, chosen, batch_size=batch_size, progress=done)
    aside = set_aside(found.groups, held_out if precision or recall else 0.0, seed)
    own, held = found.part(np.flatnonzero(~aside)), found.part(np.flatnonzero(aside))
    report = probed(own, seed)
    made = report.monitor(own.hidden, vlm, kinds=[example.kind for example in own.examples])
    problem = None
    if precision or recall:
        of_held: dict[str, Any] = {
            "scores": made.probability(held.hidden[:, held.layers.index(made.layer)]),
            "labels": held.right, "groups": held.groups, "seed": seed,
        }  # fmt: skip
        try:
            if precision:
                made = made.at_precision(precision, confidence=confidence, **of_held)
            else:
                made = made.at_recall(recall or 0.0, **of_held)
        except DataError as error:
            problem = error
    made.save(out)
    write_report(out, report, found.groups)
    signals = report.baseline_frame()
    typer.echo(_summary(made, signals[signals["signal"] != "control task"]))
    typer.echo(f"monitor: {out.resolve()}")
    if problem is not None:
        raise DataError(
            f"the monitor was saved without a threshold: {problem.problem}",
            expected=problem.expected,
            remedy=problem.remedy,
        )


@monitor.command()
def score(
    folder: Folder,
    source: Annotated[
        str, typer.Option("--in", help="JSON Lines with image, question and (if wanted) id; - is stdin.")
    ],
    model: Model = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures.", show_default="the folder of --in")
    ] = None,
    out: Annotated[str, typer.Option(help="JSON Lines with answer, confidence, score, reliable; - is stdout.")] = "-",
    on_error: Annotated[
        str, typer.Option(help="record: an error takes the answer's place; raise: stop there.")
    ] = "record",
    device: Device = None,
) -> None:
    """Answer questions and say how far each answer is to be trusted: a line out for each line in, as they come.

    Example: interp-vlm monitor score --monitor runs/mine --in questions.jsonl --images photos --out scored.jsonl
    """
    from interp_vlm.errors import DataError
    from interp_vlm.study.monitor_stream import ON_ERROR, score_lines

    if on_error not in ON_ERROR:
        raise DataError(f"--on-error {on_error}", expected=" or ".join(ON_ERROR))
    if source != "-" and not Path(source).is_file():
        raise DataError(f"--in {source} is no file", expected="a JSON Lines file, or - for standard input")
    if "-" not in (source, out) and Path(out).exists() and Path(out).samefile(source):
        raise DataError(f"--out {out} is the file of --in", expected="another file")
    place = images or (Path() if source == "-" else Path(source).parent)
    if not place.is_dir():
        raise DataError(f"image folder {place} does not exist", expected="a folder of pictures")
    made, vlm = _opened(folder, model, device)
    with _bar("scoring", None) as done, _reading(source) as lines, _writing(out) as write:
        for line in score_lines(made, vlm, lines, place, on_error=on_error):
            write(line)
            done(1)


@monitor.command()
def evaluate(
    folder: Folder,
    data: Data,
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Where the table goes too: a .csv, .json or .parquet file.")] = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of digit scenes and resampling.", min=0)] = 1,
    batch_size: BatchSize = 16,
    device: Device = None,
) -> None:
    """Measure a monitor on questions with known answers: AUROC, Brier score, risk by coverage, precision.

    Beside it stands the model's own confidence. Pictures that the monitor was fitted on are left out.

    Example: interp-vlm monitor evaluate --monitor runs/mine --data "digits?difficulty=hard" --limit 600
    """
    from interp_vlm.data import load as load_data
    from interp_vlm.errors import DataError
    from interp_vlm.study import monitoring

    if out is not None and out.suffix not in (".csv", ".json", ".parquet"):
        raise DataError(f"--out {out}", expected="a .csv, .json or .parquet file")
    made, vlm = _opened(folder, model, device)
    examples = load_data(data, limit=limit, seed=seed)
    known = monitoring.fitted_pictures(folder)
    new = [example for example in examples if example.group not in known]
    if not new:
        raise DataError(
            f"the monitor was fitted on all pictures of {data}", expected="other pictures", remedy="give other data"
        )
    with _bar("asking", len(new)) as done:
        table = monitoring.evaluate(made, vlm, new, batch_size=batch_size, seed=seed, progress=done)
    if len(new) < len(examples):
        typer.echo(f"left out: {len(examples) - len(new)} questions about pictures that the monitor was fitted on")
    strange = sorted({example.kind for example in new} - set(made.kinds)) if made.kinds else []
    if strange:
        typer.echo(f"kinds of question that it was not fitted on: {', '.join(strange)}")
    typer.echo(_lines(table))
    if out is not None:
        from interp_vlm.study.folder import write_bytes, write_frame

        if out.suffix == ".parquet":
            write_frame(out, table)
        else:
            text = table.to_csv(index=False) if out.suffix == ".csv" else table.to_json(orient="records", indent=1)
            write_bytes(out, str(text).encode())
        typer.echo(f"table: {out.resolve()}")


def _opened(folder: Path, model: str | None, device: str | None) -> tuple[ReliabilityMonitor, VLM]:
    from interp_vlm.probes.monitor import ReliabilityMonitor
    from interp_vlm.vlm import load

    made = ReliabilityMonitor.load(folder)
    revision = {"revision": made.model.revision} if made.model.revision else {}
    vlm = load(model or made.model.name, device_map=device, **revision)
    return made.bind(vlm), vlm


def _check_place(out: Path) -> None:
    """Refuse a folder that cannot be made before hours of work go into what it should hold."""
    from interp_vlm.errors import DataError

    try:
        new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        if new:
            out.rmdir()
    except OSError as error:
        raise DataError(f"cannot make the folder {out} ({error.strerror})", remedy="choose another --out") from error


def _numbers(text: str) -> list[int]:
    from interp_vlm.errors import DataError

    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise DataError(f"--layers {text}", expected="whole numbers with commas, such as 8,12,16") from None


@contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def _reading(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield sys.stdin.buffer
    else:
        with Path(source).open("rb") as file:
            yield file


@contextmanager
def _writing(out: str) -> Iterator[Callable[[bytes], object]]:
    """A function that hands each line over at once; it ends quietly when the reader of the pipe has left."""
    from interp_vlm.errors import DataError

    def writer(file: BinaryIO) -> Callable[[bytes], object]:
        return lambda line: (file.write(line), file.flush())

    if out == "-":
        try:
            yield writer(sys.stdout.buffer)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush at the end
            raise typer.Exit(0) from None
        return
    try:
        with Path(out).open("wb") as file:
            yield writer(file)
    except OSError as error:
        raise DataError(f"cannot write {out} ({error.strerror})", expected="a file that can be written") from error


def _summary(made: ReliabilityMonitor, signals: pd.DataFrame) -> str:
    rows = [
        f"  {line.signal:<36} AUROC {line.auroc:.3f} [{line.low:.3f}, {line.high:.3f}]" for line in signals.itertuples()
    ]
    head = (
        f"{made.model.name}: {made.site} at layer {made.layer}, n={made.n} questions about {made.pictures} pictures, "
        f"{made.labels.mean():.1%} right"
    )
    probe, best = signals.iloc[0], signals.iloc[signals["auroc"].argmax()]
    if best["signal"] != probe["signal"]:
        rows.append(f"  note: {best['signal']} tells right answers from wrong ones better than the probe")
    limit = "no threshold" if made.threshold is None else f"threshold: {made.threshold}"
    return "\n".join([head, *rows, limit])


def _lines(table: pd.DataFrame) -> str:
    """The table for people: a line a number."""
    lines = []
    for line in table.to_dict("records"):
        at = f" at coverage {line['coverage']}" if line["quantity"] == "risk" else ""
        name = ", ".join(part for part in (line["signal"], f"{line['quantity']}{at}") if part)
        value, low, high = (line[part] for part in ("value", "low", "high"))
        said = f"{value:.4g}{line['unit']} [{low:.4g}, {high:.4g}] n={line['n']}"
        lines.append(f"  {name:<64} {said if value == value else '- (' + line['note'] + ')'}")
    return "\n".join(lines)
