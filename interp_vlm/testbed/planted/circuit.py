"""A planted model and its pictures."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from interp_vlm.data.digit_canvas import CELL
from interp_vlm.testbed.build import GRID, build
from interp_vlm.testbed.planted.decoder import fill_decoder, rotation
from interp_vlm.testbed.planted.route import N_LAYERS, Route, lay_out, routes_of
from interp_vlm.testbed.planted.vision import HUES, fill_vision
from interp_vlm.tokens.batch import Batch
from interp_vlm.vlm import VLM

__all__ = ["Planted", "plant"]

_QUESTION = "what colour is the digit ?"
_ANSWERS = ("red", "blue")


@dataclass(frozen=True, eq=False)
class Planted:
    """A model of a real class with a known circuit, and the truth about it.

    Attributes:
        vlm: the model, ready to run.
        family: "llava", "paligemma" or "qwen2_vl".
        seed: of the route and of all random weights.
        route: the only way of the answer while nothing is intervened upon; empty in a null model. In Qwen2-VL an
            earlier line break of the template, the last token's own word, receives the colour too and keeps it.
        backups: ways that open when the last token does not learn that the route has read the patch. Knockout and zero
            ablation of the route wake them; patching, and mean ablation at the last token, do not: they say still that
            the patch was read.
        decoys: (layer, head) that attend to the coloured patch from the last token as sharply as the route does and
            change nothing. The second, the fourth and so on write the colour where nothing reads it; the others write
            none. A null model's would-be route and backup are counted behind them.
        bystanders: (layer, unit) that fire with the answer and change nothing.
        null: the answer is the same whatever the picture shows.
        detour: None, "question" or "prefix".
        patch: the coloured patch, as an index into the grid, row by row.
        signal: its token positions in the prompt.
        question: the question.
        answers: the two answers: the first for a red patch, the second for a blue one.
    """

    vlm: VLM
    family: str
    seed: int
    route: Route
    backups: tuple[Route, ...]
    decoys: tuple[tuple[int, int], ...]
    bystanders: tuple[tuple[int, int], ...]
    null: bool
    detour: str | None
    patch: int
    signal: tuple[int, ...]
    question: str = _QUESTION
    answers: tuple[str, str] = _ANSWERS

    def pairs(self, n: int, seed: int = 0) -> tuple[Batch, Batch, list[str], list[str]]:
        """Pictures in pairs that differ in the colour of the coloured patch alone.

        Args:
            n: number of pairs; half of the clean pictures (one more for an odd number) show the first answer.
            seed: of the pictures; those of another number of pairs begin alike.

        Returns:
            The clean and the corrupt batch, and the colours that they show: right for clean, wrong for corrupt. In a
            null model these are the colours all the same, and the model does not care.

        Example:
            >>> planted = plant("llava", seed=1)
            >>> clean, corrupt, right, wrong = planted.pairs(4)
            >>> [str(answer) for answer in planted.vlm.run(clean).answers] == right
            True
            >>> [str(answer) for answer in planted.vlm.run(corrupt).answers] == wrong
            True
        """
        clean, corrupt = [], []
        right = [self.answers[k % 2] for k in range(n)]
        wrong = [self.answers[1 - k % 2] for k in range(n)]
        for k in range(n):
            canvas = _grey(np.random.default_rng([seed, k]))
            clean.append(_coloured(canvas, self.patch, right[k]))
            corrupt.append(_coloured(canvas, self.patch, wrong[k]))
        return self.vlm.encode(clean, self.question), self.vlm.encode(corrupt, self.question), right, wrong


def plant(
    family: str = "llava",
    seed: int = 0,
    *,
    detour: str | None = None,
    backup: bool = False,
    decoys: int = 2,
    neurons: bool = True,
    null: bool = False,
) -> Planted:
    """Build a model whose answer takes a known route from the picture.

    Args:
        family: "llava", "paligemma" or "qwen2_vl": the real classes, with their real processors.
        seed: of the route (layers, heads, patch, relay, neurons) and of everything random.
        detour: None for a head that reads the patch from the last token; "question" for one by way of a word of the
            question; "prefix" for one by way of an earlier patch, which only PaliGemma's bidirectional prompt allows.
        backup: a second, straight way in a later layer, which is silent unless the first has not delivered.
        decoys: number of heads that attend to the patch and change nothing.
        neurons: two neurons turn the colour into the answer; without, the last head writes the answer itself.
        null: nothing is handed on, and the answer is always the first; heads attend as they would otherwise, and count
            among the decoys.

    Returns:
        The model and the truth about it; the same arguments give the same model.

    Raises:
        ModelError: for an unknown family or detour, a detour that the family's masks forbid, or too many decoys.

    Example:
        >>> print(plant("llava", seed=1, detour="question").route)
        position 49 -> position 56 at layer 1 (heads 0 and 3) -> position 58 at layer 4 (heads 0 and 2) -> neurons ...
    """
    words = len(_QUESTION.split())
    layout = lay_out(family, seed, detour=detour, backup=backup, decoys=decoys, neurons=neurons, null=null, words=words)
    model, processor = _model(family, seed)
    vlm = VLM(model, processor, name=f"planted:{family}:{seed}")
    tokens = vlm.encode(Image.new("RGB", (GRID * CELL, GRID * CELL)), _QUESTION).tokens[0]
    relay = layout.relay
    ids = {
        "last": int(tokens.ids[tokens.last]),
        "sink": int(tokens.ids[tokens.text[0]]),
        "relay": int(tokens.ids[tokens.question[relay]]) if detour == "question" else None,
        "answers": processor.tokenizer.convert_tokens_to_ids(list(_ANSWERS)),
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        turn = rotation(generator)
        fill_decoder(model, layout, turn, ids, null, generator)
        fill_vision(model, processor, relay if detour == "prefix" else None, turn, generator)
    route, backups = routes_of(layout, tokens.image, tokens.question, int(tokens.last))
    looking = layout.decoys
    if null:
        looking = (*looking, *sorted(route.heads), *layout.backup_heads)
        route, backups = Route(()), ()
    return Planted(
        vlm, family, seed, route, backups, looking, layout.bystanders, null, detour, layout.patch,
        (int(tokens.image[layout.patch]),),
    )  # fmt: skip


def _model(family: str, seed: int) -> tuple[Any, Any]:
    """An untrained model of the testbed's shape, with more layers and the slow rotary embedding of the real ones."""
    small, processor = build(family, seed)
    config = copy.deepcopy(small.config)
    text = config.get_text_config()
    text.num_hidden_layers = N_LAYERS
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0]] * N_LAYERS
    text.rope_parameters = {**text.rope_parameters, "rope_theta": 1e6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(small)(config)
    return model.eval(), processor


def _grey(rng: np.random.Generator) -> np.ndarray:
    """A canvas of grey cells with grey noise, as signed integers."""
    cells = rng.integers(60, 140, (GRID, GRID)).repeat(CELL, 0).repeat(CELL, 1)
    return cells + rng.integers(-15, 16, cells.shape)


def _coloured(canvas: np.ndarray, patch: int, colour: str) -> Image.Image:
    """The canvas as a picture, one cell of it in a colour under the same noise."""
    row, column = divmod(patch, GRID)
    cell = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    pixels = np.repeat(canvas[:, :, None], 3, axis=2)
    noise = canvas[cell] - int(canvas[cell].mean())
    pixels[cell] = np.round(np.array(HUES[colour]) * 255).astype(int) + noise.clip(-15, 15)[:, :, None]
    return Image.fromarray(pixels.astype(np.uint8))
