"""The report: one self-contained page, written from the tables."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp_vlm.study.experiments import EXPERIMENTS
from interp_vlm.study.folder import RunFolder, write_bytes
from interp_vlm.study.sections.claims import ClaimSection
from interp_vlm.study.sections.claims import section as claims_section
from interp_vlm.study.sections.front import Card, front
from interp_vlm.study.sections.section import Panel, Section
from interp_vlm.study.sections.words import listed
from interp_vlm.study.settings import EMBEDDED, Settings, short_names

if TYPE_CHECKING:
    import pandas as pd

    from interp_vlm.study.material import Material

__all__ = ["Picture", "command_line", "draw", "write_report"]

_DPI = 200


@dataclass(frozen=True)
class Picture:
    """A panel of the report once it is drawn: its file name without ending, its caption, and the PNG."""

    name: str
    caption: str
    png: bytes


def draw(experiment: str, table: pd.DataFrame, models: Sequence[str]) -> tuple[Section, tuple[Picture, ...]]:
    """One experiment's section of the report, without its panels, and these as pictures.

    Args:
        experiment: its name.
        table: its tidy table, of all models.
        models: their short names, in order.
    """
    section: Section = import_module(f"interp_vlm.study.sections.{experiment}").section(table, models)
    return replace(section, panels=()), tuple(map(_drawn, section.panels))


def _drawn(panel: Panel) -> Picture:
    buffer = io.BytesIO()
    panel.figure.savefig(buffer, format="png", dpi=_DPI)
    return Picture(panel.name, panel.caption, buffer.getvalue())


def write_report(
    folder: RunFolder,
    settings: Settings,
    material: Material,
    facts: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, pd.DataFrame],
    drawn: Mapping[str, tuple[Section, tuple[Picture, ...]]],
) -> Path:
    """Write the figures and `report.html`.

    Args:
        folder: the run folder.
        settings: of the study.
        material: what it worked on.
        facts: of each model.
        tables: the tidy table of each experiment that was done.
        drawn: what `draw` made of each that has rows.

    Returns:
        The path of the report.
    """
    names = list(short_names(settings.models).values())
    sections = {name: drawn[name][0] for name in settings.experiments if name in drawn}
    absent = [
        (name, EXPERIMENTS[name].absent if name not in tables else "no example could be used for it")
        for name in settings.experiments
        if name not in drawn
    ]
    cards = front(tables, sections, names)
    claims = claims_section(tables["claims"], names) if "claims" in tables else None
    pictures = {name: [_saved(picture, folder) for picture in drawn[name][1]] for name in sections}
    page = _page(settings, material, facts, cards, claims, sections, pictures, absent, folder)
    path = folder.path / "report.html"
    write_bytes(path, page.encode())
    return path


def _page(
    settings: Settings,
    material: Material,
    facts: Mapping[str, Mapping[str, Any]],
    cards: Sequence[Card],
    claims: ClaimSection | None,
    sections: Mapping[str, Section],
    pictures: Mapping[str, list[dict[str, str]]],
    absent: Sequence[tuple[str, str]],
    folder: RunFolder,
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    shown = [{**_shallow(section), "name": name, "panels": pictures[name]} for name, section in sections.items()]
    names = short_names(settings.models)
    models = [
        {**facts[model], "name": names[model], "parameters": _millions(facts[model])} for model in settings.models
    ]
    environment = Environment(
        loader=PackageLoader("interp_vlm", "study"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(
        title=f"What the answers of {listed(names.values())} rest on",
        cards=[{**_shallow(card), "panel": _saved(_drawn(card.panel), folder)} for card in cards],
        lead="" if cards else " ".join(section.summary for section in sections.values() if section.summary),
        claims=claims,
        names=list(names.values()),
        source=material.source,
        skipped=material.skipped,
        sections=shown,
        absent=absent,
        models=models,
        embedded=_embedded(settings, names),
        command=command_line(settings),
    )


def _shallow(part: Section | Card) -> dict[str, Any]:
    return {item.name: getattr(part, item.name) for item in fields(part)}


def _saved(picture: Picture, folder: RunFolder) -> dict[str, str]:
    """The caption of a picture, saved, and the PNG encoded for the page."""
    write_bytes(folder.path / "figures" / f"{picture.name}.png", picture.png)
    return {"caption": picture.caption, "png": base64.b64encode(picture.png).decode("ascii")}


def _millions(facts: Mapping[str, Any]) -> str:
    count = facts["parameters"]
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _embedded(settings: Settings, names: Mapping[str, str]) -> str:
    own = [names[model] for model in settings.models if model in EMBEDDED]
    if not own:
        return ""
    who = "These are" if len(own) == len(settings.models) else f"{listed(own)} {'is' if len(own) == 1 else 'are'}"
    return f"{who} {'one of' if len(own) == 1 and len(settings.models) > 1 else 'models of'}"


def command_line(settings: Settings) -> str:
    """The command that repeats a study of these settings."""
    words = ["interp-vlm", "study"]
    if settings.models != EMBEDDED:
        words += [word for model in settings.models for word in ("--model", model)]
    defaults = Settings()
    for name in ("data", "limit", "seed", "batch_size", "device"):
        if getattr(settings, name) != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    if settings.claims != defaults.claims:
        words += ["--claims", ",".join(settings.claims)]
    if settings.on_error == "skip":
        words.append("--skip-broken")
    return shlex.join(words)
