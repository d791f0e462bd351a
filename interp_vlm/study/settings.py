"""The settings of a study: everything that decides its numbers, saved beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from interp_vlm.errors import StudyError

__all__ = ["EMBEDDED", "Settings", "short_names"]

EMBEDDED = ("testbed:llava", "testbed:paligemma", "testbed:qwen2_vl")
"""The models that are studied when none is named."""


@dataclass(frozen=True)
class Settings:
    """What decides the numbers of a study; how fast it runs (processes, progress) is no part of it.

    Attributes:
        models: names as `iv.load` takes them.
        data: "digits", or a source as `iv.data.load` takes it.
        limit: questions of the interventions; 300 for digit scenes and all of them for other data when not given.
        seed: of the scenes, the random patches and every resampling.
        batch_size: examples of one forward pass.
        shard_size: questions worked on between two saves; the questions of a picture stay together.
        fraction: share of the image tokens that is masked.
        draws: random masks of that size.
        window: width of the knockout's windows in layers; by default 9/32 of the depth.
        on_error: "raise" an error for pictures that cannot be read, or "skip" and count them.
        device: where Hugging Face puts the model (its `device_map`); by default the CPU.
        claims: "all", "none", or ids and paths as `load_claims` takes them; ids run only the experiments they need.
        samples: answers sampled for self-consistency.
        temperature: of the sampling.
        top_p: share of probability that is sampled from.

    Example:
        >>> Settings(models=("testbed:llava",)).n
        300
    """

    models: tuple[str, ...] = EMBEDDED
    data: str = "digits"
    limit: int | None = None
    seed: int = 0
    batch_size: int = 48
    shard_size: int = 96
    fraction: float = 0.30
    draws: int = 20
    window: int | None = None
    on_error: Literal["raise", "skip"] = "raise"
    device: str | None = None
    claims: tuple[str, ...] = ("all",)
    samples: int = 10
    temperature: float = 0.7
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if not self.models:
            raise StudyError("no model is named", expected="at least one", remedy="pass --model NAME")
        doubled = sorted({name for name in self.models if self.models.count(name) > 1})
        if doubled:
            raise StudyError(f"model {doubled[0]!r} is named twice", expected="each once")
        at_least = {"batch_size": 1, "shard_size": 1, "draws": 1, "seed": 0, "samples": 2}
        at_least |= {name: 1 for name in ("limit", "window") if getattr(self, name) is not None}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise StudyError(f"{name} is {getattr(self, name)}", expected=f"a whole number from {least}")
        if not 0 < self.fraction < 1:
            raise StudyError(f"fraction is {self.fraction}", expected="a share between 0 and 1")
        if not 0 < self.temperature < float("inf"):
            raise StudyError(f"temperature is {self.temperature}", expected="a number above 0")
        if not 0 < self.top_p <= 1:
            raise StudyError(f"top_p is {self.top_p}", expected="a share above 0, 1 at most")
        if not self.claims or (len(self.claims) > 1 and {"all", "none"} & set(self.claims)):
            named = ",".join(self.claims)
            raise StudyError(f"claims are {named!r}", expected='"all", "none", or ids and .toml files, as in A1,A9')

    @property
    def experiments(self) -> tuple[str, ...]:
        """The experiments to run: all of them, or those that the named claims need, and accuracy with them."""
        from interp_vlm.study.claim import load_claims
        from interp_vlm.study.experiments import EXPERIMENTS

        if self.claims in (("all",), ("none",)):
            return tuple(EXPERIMENTS)
        wanted = {"accuracy"}.union(*(claim.tables for claim in load_claims(self.claims)))
        return tuple(name for name in EXPERIMENTS if name in wanted)

    @property
    def small(self) -> bool:
        """Whether all models are embedded ones on the CPU: then one thread each is fastest, and exact to the bit."""
        return set(self.models) <= set(EMBEDDED) and self.device is None

    @property
    def n(self) -> int | None:
        """Questions of the interventions; None for all there are."""
        return 300 if self.limit is None and self.data == "digits" else self.limit

    def window_of(self, n_layers: int) -> int:
        """Width of a knockout's window: Zhang et al. (arXiv 2411.18620) take 9 of 32 layers."""
        return min(n_layers, self.window or max(1, round(n_layers * 9 / 32)))

    def as_json(self) -> str:
        """The settings as they are saved."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Settings as they were saved.

        Raises:
            StudyError: for a file that holds no settings.
        """
        try:
            saved: dict[str, Any] = json.loads(text)
            lists = {name: tuple(saved[name]) for name in ("models", "claims") if name in saved}
            return cls(**{**saved, **lists, "models": tuple(saved["models"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise StudyError(
                f"settings.json cannot be read ({error})",
                expected="the settings of a study",
                remedy="choose another --out",
            ) from error

    def differences(self, other: Settings) -> list[str]:
        """Fields in which two settings differ, in words."""
        pairs = ((item.name, getattr(self, item.name), getattr(other, item.name)) for item in fields(self))
        return [f"{name} was {_brief(old)} and is {_brief(new)}" for name, old, new in pairs if old != new]


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Models by a short name for figures, tables and file names; distinct for distinct models.

    Example:
        >>> short_names(["testbed:llava", "Qwen/Qwen2-VL-7B-Instruct"])
        {'testbed:llava': 'llava', 'Qwen/Qwen2-VL-7B-Instruct': 'Qwen2-VL-7B-Instruct'}
    """
    names = {
        model: re.sub(r"[^\w.-]+", "-", re.split(r"[:/\\]", model.rstrip("/\\"))[-1]).strip(".-") for model in models
    }
    taken: dict[str, str] = {}
    for number, (model, name) in enumerate(names.items()):
        lowered = {other.lower() for other in taken.values()}
        taken[model] = f"{name}-{number}" if not name or name.lower() in lowered else name
    return taken


def _brief(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else repr(value)
