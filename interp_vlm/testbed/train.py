"""Train a tiny vision-language model on digit scenes: first its eyes, then everything together.

Stage A aligns image tokens with the words for what they show. Stage B learns to answer, on scenes and masks that go
from easy to hard. Everything is counted in steps and drawn from the seed, so a training repeats.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from interp_vlm.data.digit_canvas import DIFFICULTIES
from interp_vlm.data.digit_glyphs import SPLITS
from interp_vlm.errors import ModelError
from interp_vlm.testbed import NAMES
from interp_vlm.testbed.build import GRID, build, prompt
from interp_vlm.testbed.feed import MIX, pictures, questions, rendering, scenes
from interp_vlm.testbed.initial import balance_gemma, match_content, place_patches
from interp_vlm.testbed.objectives import Alignment, answer_logits, image_features
from interp_vlm.testbed.optimise import Rates, load_state, optimisers, read_facts, save_state, schedule

__all__ = ["RECIPES", "Recipe", "train"]


@dataclass(frozen=True)
class Recipe:
    """Numbers of a training.

    Attributes:
        align: steps of stage A.
        joint: steps of stage B.
        curriculum: shares of stage B between which the background comes into the text's sight.
        mix: share of each question kind.
        align_images: pictures in a step of stage A.
        images: pictures in a step of stage B.
        per_image: questions on each picture.
        dense: crowded pictures added to each step of stage B, for the alignment loss alone.
        exact_from: share of stage B after which PaliGemma sees each question in a row of its own.
        inner: layer whose image tokens must tell their place in the grid (Qwen2-VL).
        validate: pictures in each check on validation glyphs.
    """

    align: int
    joint: int
    curriculum: tuple[float, float] = (0.12, 0.32)
    mix: dict[str, float] = field(default_factory=lambda: dict(MIX))
    align_images: int = 64
    images: int = 32
    per_image: int = 8
    dense: int = 16
    exact_from: float = 1.0
    inner: int | None = None
    validate: int = 64


_NO_LEFT_OF = {**{kind: share for kind, share in MIX.items() if kind != "left_of"}, "where": 0.12, "existence": 0.46}

RECIPES: dict[str, Recipe] = {
    "llava": Recipe(align=1000, joint=1700),
    "paligemma": Recipe(align=1000, joint=1600, curriculum=(0.15, 0.38), exact_from=0.82),
    "qwen2_vl": Recipe(align=850, joint=950, dense=8, mix=_NO_LEFT_OF, inner=2),
}
"""The recipe of each family."""

_SAVE_EVERY = 100


class _Training:
    """The state of a training, and one step of it."""

    def __init__(self, family: str, recipe: Recipe, seed: int) -> None:
        self.family, self.recipe, self.seed = family, recipe, seed
        self.model, self.processor = build(family, seed)
        match_content(self.model)
        place_patches(self.model)
        self.prompt = prompt(self.model, self.processor)
        self.heads = Alignment(self.model.config.text_config.hidden_size, self.processor.tokenizer, seed)
        self.facts: dict[str, Any] = {"family": family, "seed": seed, "seconds": 0.0, "embeddings": 1.0}
        self.done = 0
        self.pair: list[torch.optim.Optimizer] = []

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"model": self.model, "heads": self.heads}

    @property
    def steps(self) -> int:
        return self.recipe.align + self.recipe.joint

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint of the same family and seed."""
        found = read_facts(path)
        if (found["family"], found["seed"]) != (self.family, self.seed):
            raise ModelError(
                f"{path} is a checkpoint of {found['family']} with seed {found['seed']}",
                expected=f"one of {self.family} with seed {self.seed}",
                remedy="choose another folder, or remove it first",
            )
        self.done, self.facts, states = load_state(path, self.modules)
        if self.done in (0, self.recipe.align):
            return  # the stage that begins now makes its own optimisers
        self._start_stage()
        for k, optimiser in enumerate(self.pair):
            optimiser.load_state_dict({**optimiser.state_dict(), "state": states[k]})

    def _start_stage(self) -> None:
        align = self.done < self.recipe.align
        rates = Rates(1.2e-2, 6e-3) if align else Rates(6e-3, 1.5e-3, self.facts["embeddings"])
        self.pair = optimisers(self.model, self.heads, rates)

    def step(self) -> dict[str, float]:
        """One step of whichever stage is due."""
        if self.done == self.recipe.align and self.family == "paligemma":
            rng = np.random.default_rng([self.seed, 3])
            sample = pictures(self.processor, scenes(rng, 64, rendering(0)))
            self.facts["embeddings"] = balance_gemma(self.model, sample.pixels)
        if self.done in (0, self.recipe.align):
            self._start_stage()
        align = self.done < self.recipe.align
        start, length = (0, self.recipe.align) if align else (self.recipe.align, self.recipe.joint)
        at = self.done - start
        rng = np.random.default_rng([self.seed, 1 if align else 2, at])
        loss, facts = self._align(rng, at / length) if align else self._joint(rng, at / length)
        for optimiser in self.pair:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        for optimiser in self.pair:
            schedule(optimiser, at, length, warm_up=min(100, length // 8 + 1))
            optimiser.step()
        self.done += 1
        return {"loss": loss.item(), **facts}

    def _align(self, rng: np.random.Generator, share: float) -> tuple[torch.Tensor, dict[str, float]]:
        drawn = scenes(rng, self.recipe.align_images, rendering(max(0.0, 1 - share / 0.5)), dense=0.75)
        shown = pictures(self.processor, drawn)
        return self.heads(image_features(self.model, shown.pixels), shown, self.model.get_input_embeddings().weight)

    def _joint(self, rng: np.random.Generator, share: float) -> tuple[torch.Tensor, dict[str, float]]:
        r = self.recipe
        low, high = r.curriculum
        most = 2 if share < low else 3 if share < high else 5
        separate = share >= r.exact_from
        n, per_image = (r.images // 2, r.per_image // 2) if separate else (r.images, r.per_image)
        drawn = scenes(rng, n, rendering(0, (1, most)))
        crowded = scenes(rng, r.dense, rendering(0), dense=1.0)
        shown = pictures(self.processor, drawn + crowded)
        features = image_features(self.model, shown.pixels)
        alignment, right = self.heads(features, shown, self.model.get_input_embeddings().weight)
        sight = min(1.0, max(0.0, (share - low) / (high - low)))
        visible = (shown.digits[:n] >= 0) | (torch.from_numpy(rng.random((n, GRID**2))) < sight)
        asked = questions(self.processor.tokenizer, self.prompt.after, drawn, rng, per_image, r.mix)
        logits, states = answer_logits(
            self.model, self.prompt, features[:n], asked, visible,
            both_ways=self.family == "paligemma", separate=separate, inner=r.inner,
        )  # fmt: skip
        answer = F.cross_entropy(logits.flatten(0, 1), asked.answers.flatten())
        loss = answer + 0.5 * alignment
        if states is not None:
            loss = loss + 0.2 * self.heads.place(states, self.heads.inner_cells)
        return loss, {"answer": answer.item(), **right}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy by kind on validation glyphs at standard difficulty."""
        rng = np.random.default_rng([self.seed, 4])
        drawn = scenes(rng, self.recipe.validate, DIFFICULTIES["standard"], split="validation")
        shown = pictures(self.processor, drawn)
        asked = questions(self.processor.tokenizer, self.prompt.after, drawn, rng, 8, self.recipe.mix)
        features = image_features(self.model, shown.pixels)
        logits, _ = answer_logits(self.model, self.prompt, features, asked, separate=self.family == "paligemma")
        right = (logits.argmax(-1) == asked.answers).flatten().tolist()
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for kind, hit in zip((kind for row in asked.kinds for kind in row), right, strict=True):
            by_kind[kind].append(hit)
        return {"all": float(np.mean(right)), **{kind: float(np.mean(hits)) for kind, hits in sorted(by_kind.items())}}


@contextmanager
def _bar(show: bool, title: str, done: int, total: int) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, disable=not show) as progress:
        task = progress.add_task(title, total=total, completed=done, note="")
        yield lambda completed, **fields: progress.update(task, completed=completed, **fields)


def train(
    family: str,
    out: str | Path,
    seed: int = 0,
    *,
    resume: bool = False,
    recipe: Recipe | None = None,
    progress: bool = True,
    until: int | None = None,
    measure: int = 3000,
) -> Path:
    """Train one family and save it as a folder like those of the Hugging Face hub, in half precision.

    A checkpoint is kept in `OUT/.training` on the way; it is removed when the model is saved.

    Args:
        family: one of `interp_vlm.testbed.NAMES`.
        out: folder to write.
        seed: of the weights and of every scene and question.
        resume: go on from the checkpoint, if there is one.
        recipe: other numbers than the family's own.
        progress: show a progress bar.
        until: stop after so many steps, leaving the checkpoint.
        measure: questions at each difficulty for the figures of the model card; 0 leaves it without figures.

    Returns:
        The folder.

    Raises:
        ModelError: if there is no such family, or `out` is a file or holds another model.
    """
    if family not in NAMES:
        raise ModelError(
            f"the testbed has no family {family!r}", expected=" or ".join(NAMES), remedy="choose one of them"
        )
    out = Path(out)
    if out.is_file() or ((out / "config.json").exists() and not resume):
        raise ModelError(f"{out} exists already", expected="a new folder", remedy="choose another, or remove it first")
    scratch = out / ".training"
    state, log = scratch / "state.safetensors", scratch / "log.jsonl"
    if out.joinpath("config.json").exists() and not state.exists():
        return _measured(out, measure, progress)  # trained before
    scratch.mkdir(parents=True, exist_ok=True)
    training = _Training(family, recipe or RECIPES[family], seed)
    if resume and state.exists():
        training.restore(state)
    else:
        log.unlink(missing_ok=True)
    stop = min(training.steps, until if until is not None else training.steps)
    began = time.monotonic() - training.facts["seconds"]
    with _bar(progress, f"training testbed:{family}", training.done, training.steps) as report:
        while training.done < stop:
            facts = training.step()
            if training.done % _SAVE_EVERY == 0 or training.done in (stop, training.recipe.align):
                training.facts["seconds"] = time.monotonic() - began
                if training.done > training.recipe.align:
                    training.facts["validation"] = facts["validation"] = training.validate()  # type: ignore[assignment]
                save_state(state, training.done, training.modules, training.pair, training.facts)
                with log.open("a") as file:
                    file.write(
                        json.dumps({"step": training.done, "seconds": round(training.facts["seconds"], 1), **facts})
                        + "\n"
                    )
            report(training.done, note=f"loss {facts['loss']:.3f}")
    if training.done < training.steps:
        return out
    _save(training, out)
    shutil.rmtree(scratch)
    return _measured(out, measure, progress)


def _measured(out: Path, n: int, progress: bool) -> Path:
    if n and "figures" not in json.loads((out / "card.json").read_text()):
        from interp_vlm.testbed.measure import write_card

        write_card(out, n, progress=progress)
    return out


def _save(training: _Training, out: Path) -> None:
    """Write model, processor and the facts of the training; the configuration last, as it marks the folder as whole."""
    from importlib.metadata import version

    staged = out / ".training" / "model"
    training.model.to(torch.float16)
    training.model.config.dtype = torch.float16
    training.model.save_pretrained(staged)
    training.processor.save_pretrained(staged)
    facts = {
        "family": training.family,
        "seed": training.seed,
        "steps": {"align": training.recipe.align, "joint": training.recipe.joint},
        "seconds": round(training.facts["seconds"]),
        "mix": training.recipe.mix,
        "data": {
            "glyphs": SPLITS,
            "source": "UCI optical recognition of handwritten digits, as in scikit-learn; split by glyph",
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "scikit-learn", "numpy")},
    }
    (staged / "card.json").write_text(json.dumps(facts, indent=1) + "\n")
    for file in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
        file.chmod(0o644)
        file.replace(out / file.name)
