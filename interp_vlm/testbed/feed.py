"""Training batches: scenes drawn from the training glyphs, as the tensors that the objectives need.

Each batch follows from (seed, stage, step) alone, so a resumed training sees what an unbroken one would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from interp_vlm.data.digit_canvas import COLOURS, DIFFICULTIES, Difficulty, Scene, draw_scene, render
from interp_vlm.data.digit_questions import Question, ask
from interp_vlm.testbed.build import GRID

__all__ = ["MIX", "Pictures", "Questions", "pictures", "pixels", "questions", "rendering", "scenes"]

MIX: dict[str, float] = {"existence": 0.4, "count": 0.16, "left_of": 0.1, "colour": 0.13, "digit": 0.13, "where": 0.08}
"""Share of each question kind in training."""

_NEGATIVES = (1.0, 1.0, 2.0)  # adversarial negatives twice as often: they alone need binding


@dataclass(frozen=True)
class Pictures:
    """Pictures with the contents of each image token.

    Attributes:
        pixels: as the model takes them.
        digits: the digit whose centre lies in each image token's cell, else -1.
        colours: its colour's index, else -1.
    """

    pixels: Tensor
    digits: Int[Tensor, "image patch"]
    colours: Int[Tensor, "image patch"]


@dataclass(frozen=True)
class Questions:
    """Questions about pictures, tokenised and padded on the right.

    Attributes:
        ids: question tokens followed by the prompt's end.
        lengths: number of tokens that are no padding.
        answers: the answer's token.
        kinds: kind of each question, picture by picture.
    """

    ids: Int[Tensor, "image question token"]
    lengths: Int[Tensor, "image question"]
    answers: Int[Tensor, "image question"]
    kinds: tuple[tuple[str, ...], ...]


def rendering(ease: float, objects: tuple[int, int] = (1, 5)) -> Difficulty:
    """Standard rendering, made easier: 1 is almost free of noise and opaque, 0 is the standard difficulty."""
    standard = DIFFICULTIES["standard"]
    return replace(
        standard,
        objects=objects,
        noise=(standard.noise[0], standard.noise[1] + ease * (0.03 - standard.noise[1])),
        alpha=(standard.alpha[0] + ease * (0.9 - standard.alpha[0]), 1.0),
    )


def scenes(
    rng: np.random.Generator, n: int, difficulty: Difficulty, *, dense: float = 0.0, split: str = "train"
) -> list[Scene]:
    """Draw scenes, a share of them dense."""
    return [draw_scene(rng, split, difficulty, dense=k < dense * n) for k in range(n)]


def pixels(processor: Any, images: UInt8[np.ndarray, "image row column channel"]) -> Tensor:
    """What the image processor makes of pictures of the canvas's own size, for a whole batch at once."""
    settings = processor.image_processor
    mean, std = (np.asarray(x, np.float32) for x in (settings.image_mean, settings.image_std))
    x = torch.from_numpy((images.astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    if not hasattr(settings, "merge_size"):
        return x.contiguous()
    n, channels = x.shape[:2]
    m, p = settings.merge_size, settings.patch_size
    x = x.reshape(n, channels, GRID, m, p, GRID, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, settings.temporal_patch_size, -1, -1)
    return x.reshape(n * (GRID * m) ** 2, -1)


def pictures(processor: Any, drawn: list[Scene]) -> Pictures:
    """Render scenes for a family's vision tower."""
    digits = np.full((len(drawn), GRID, GRID), -1)
    colours = np.full((len(drawn), GRID, GRID), -1)
    names = tuple(COLOURS)
    for k, scene in enumerate(drawn):
        for placed in scene.objects:
            digits[k][placed.cell] = placed.digit
            colours[k][placed.cell] = names.index(placed.colour)
    flat = (len(drawn), GRID**2)
    return Pictures(
        pixels(processor, render(drawn)),
        torch.from_numpy(digits).reshape(flat),
        torch.from_numpy(colours).reshape(flat),
    )


def _draw(scene: Scene, rng: np.random.Generator, kinds: list[str], shares: np.ndarray) -> Question:
    kind = kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
    yes = bool(rng.random() < 0.5)
    question = ask(scene, rng, kind, yes=yes, negatives=_NEGATIVES) or ask(
        scene, rng, "existence", yes=yes, negatives=_NEGATIVES
    )
    assert question is not None  # every scene allows an existence question of either answer
    return question


def questions(
    tokenizer: Any,
    after: Int[Tensor, " after"],
    drawn: list[Scene],
    rng: np.random.Generator,
    n: int,
    mix: dict[str, float],
) -> Questions:
    """Ask `n` questions about each scene."""
    kinds, shares = list(mix), np.cumsum(list(mix.values()))
    asked = [[_draw(scene, rng, kinds, shares) for _ in range(n)] for scene in drawn]
    vocabulary = tokenizer.get_vocab()
    tail = after.tolist()
    rows = [[[vocabulary[word] for word in q.text.split(" ")] + tail for q in row] for row in asked]
    longest = max(len(ids) for row in rows for ids in row)
    padded = [[ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids in row] for row in rows]
    return Questions(
        torch.tensor(padded),
        torch.tensor([[len(ids) for ids in row] for row in rows]),
        torch.tensor([[vocabulary[q.answer] for q in row] for row in asked]),
        tuple(tuple(q.kind for q in row) for row in asked),
    )
