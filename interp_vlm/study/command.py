"""The command `interp-vlm study`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from interp_vlm.study.ray_pool import RayCrew
    from interp_vlm.study.settings import Settings

__all__ = ["crew_on_ray", "study"]


def study(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Hub id, local folder or testbed:NAME; repeat for several.", show_default="the three embedded ones"
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="digits, pope:FILE, file:PATH or hf:ID, options after '?': pope:FILE?images=FOLDER."),
    ] = "digits",
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, new or empty.", show_default="runs/study-1, or the next free number"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions at most.", show_default="300 digit questions; all of other data")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in --out, which was stopped.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of scenes, random patches and resampling.")] = 0,
    skip_broken: Annotated[
        bool,
        typer.Option("--skip-broken", help="Leave pictures that cannot be read out, and count them in the report."),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Examples of one forward pass.")] = 48,
    device: Annotated[
        str | None, typer.Option(help="Where the models go: cuda, auto, ...", show_default="the CPU")
    ] = None,
    claims: Annotated[
        str,
        typer.Option(
            help="all, none, or ids and TOML files of your own: A1,A9,mine.toml. "
            "Ids run only the experiments that they need; none runs all and judges nothing."
        ),
    ] = "all",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, or workers on Ray.",
            show_default="one a core for the embedded models, else 1; all that the Ray cluster has room for",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Work on Ray: local, auto (the cluster of this machine), or HOST:PORT of a cluster's head."),
    ] = None,
    gpus_per_worker: Annotated[float, typer.Option(help="GPUs of each worker on Ray; a share is allowed.")] = 0.0,
    memory_per_worker: Annotated[
        str | None,
        typer.Option(
            help="Main memory of each worker on Ray, such as 2GiB, which it cannot exceed.", show_default="no bound"
        ),
    ] = None,
) -> None:
    """Study what the answers of one or more models rest on, judge published claims about it, and write a report.

    Every experiment works on held-out examples. Each claim gets a verdict: supported, contradicted, underpowered (with
    the n that it would need) or not applicable. Ends with the path of the report.

    Example: interp-vlm study --model testbed:llava --limit 60 --out runs/first
    """
    from interp_vlm.errors import StudyError
    from interp_vlm.study.folder import free_folder
    from interp_vlm.study.runner import run_study
    from interp_vlm.study.settings import EMBEDDED, Settings

    if resume and out is None:
        raise StudyError("--resume without --out", expected="the folder of the study to go on with")
    if workers is not None and workers < 1:
        raise StudyError(f"workers is {workers}", expected="a whole number from 1")
    settings = Settings(
        models=tuple(model or EMBEDDED), data=data, limit=limit, seed=seed, batch_size=batch_size,
        on_error="skip" if skip_broken else "raise", device=device,
        claims=tuple(name.strip() for name in claims.split(",")),
    )  # fmt: skip
    crew = crew_on_ray(settings, ray, workers, gpus_per_worker, memory_per_worker)
    folder = free_folder(Path("runs")) if out is None else out
    try:
        report = run_study(settings, folder, resume=resume, workers=workers, crew=crew)
    except KeyboardInterrupt:
        typer.echo(f"stopped; go on with --resume --out {folder}", err=True)
        raise
    if crew is not None:
        typer.echo(crew.summary, err=True)
    typer.echo(f"report: {report.resolve()}")


def crew_on_ray(
    settings: Settings, address: str | None, workers: int | None, gpus: float, memory: str | None
) -> RayCrew | None:
    """The workers that the options name; None without Ray.

    Raises:
        StudyError: options that make no sense, or none without Ray.
    """
    from interp_vlm.errors import StudyError
    from interp_vlm.study.ray_pool import RayCrew

    if address is not None:
        return RayCrew(settings, address, workers, gpus, memory)
    for option, given in (("--gpus-per-worker", f"{gpus:g}" if gpus else ""), ("--memory-per-worker", memory)):
        if given:
            raise StudyError(f"{option} {given} without --ray", remedy="pass --ray local too")
    return None
