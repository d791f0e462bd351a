"""What every token of one encoded example is: picture, question, template; and where its picture tokens lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.tokens.grid import ImageGrid
from interp_vlm.tokens.locate import NOWHERE, Located, locate

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["ROLES", "TokenMap", "build_maps"]

ROLES = ("image", "question", "last", "text", "template", "bos", "all")


@dataclass(frozen=True, eq=False)
class TokenMap:
    """The tokens of one example of a batch, by role. All positions are absolute in the padded row.

    `image`, `question`, `template` and `bos` are disjoint and cover every position that is not padding.

    Attributes:
        ids: (pos,) the row as the model gets it, padding included.
        pieces: the decoded text of each position.
        attention_mask: (pos,) False at padding.
        image_index: (pos,) number of the picture that an image token belongs to, -1 elsewhere.
        grids: one per picture.
        key: depends on the unpadded ids and the pictures alone; seeds random selections.
        question_text: the bare question.
        found: where the question lies, as indices into the unpadded row.
        bos_token_id: None for a tokenizer without one.
        pictures: the original pictures, for display alone.
    """

    ids: Int[Tensor, " pos"]
    pieces: tuple[str, ...]
    attention_mask: Bool[Tensor, " pos"]
    image_index: Int[Tensor, " pos"]
    grids: tuple[ImageGrid, ...]
    key: str
    question_text: str = ""
    found: Located = NOWHERE
    bos_token_id: int | None = None
    pictures: tuple[Image, ...] = field(default=(), repr=False)

    @property
    def length(self) -> int:
        """Number of positions that are not padding."""
        return int(self.attention_mask.sum())

    @property
    def all(self) -> Int[Tensor, " found"]:
        """Every position that is not padding."""
        return self.attention_mask.nonzero().flatten()

    @property
    def image(self) -> Int[Tensor, " found"]:
        """The image tokens of every picture, separators with the image token's id included."""
        return (self.image_index >= 0).nonzero().flatten()

    @property
    def text(self) -> Int[Tensor, " found"]:
        """Everything that is neither image nor padding."""
        return (self.attention_mask & (self.image_index < 0)).nonzero().flatten()

    @property
    def question(self) -> Int[Tensor, " found"]:
        """The tokens that carry the bare question."""
        return self.all[torch.tensor(self.found.tokens, dtype=torch.long)]

    @property
    def last(self) -> Int[Tensor, " 1"]:
        """The last prompt token, where the answer is read."""
        return self.all[-1:]

    @property
    def bos(self) -> Int[Tensor, " found"]:
        """The beginning-of-sequence tokens (PaliGemma's stands after the picture); empty when there is none."""
        if self.bos_token_id is None:
            return self.ids.new_empty(0)
        at_bos = self.attention_mask & (self.ids == self.bos_token_id) & (self.image_index < 0)
        return at_bos.nonzero().flatten()

    @property
    def template(self) -> Int[Tensor, " found"]:
        """Text that is neither question nor bos: what the prompt template adds."""
        rest = self.attention_mask & (self.image_index < 0)
        rest[self.question] = False
        rest[self.bos] = False
        return rest.nonzero().flatten()

    def role(self, name: str) -> Int[Tensor, " found"]:
        """The positions of a role by its name."""
        if name not in ROLES:
            raise SelectionError(f"role {name!r} does not exist", expected=f"one of {', '.join(ROLES)}")
        return getattr(self, name)

    @property
    def grid(self) -> ImageGrid:
        """The grid of the only picture."""
        if len(self.grids) != 1:
            raise SelectionError(
                f"the example has {len(self.grids)} pictures", expected="one picture", remedy="use .grids[number]"
            )
        return self.grids[0]

    def span(self, text: str) -> Int[Tensor, " found"]:
        """The tokens that carry any occurrence of `text` in the question, exact but for letter case."""
        if not text.strip():
            raise SelectionError(f"span({text!r}) names nothing", expected="some text of the question")
        found = re.finditer(re.escape(text.strip()), self.question_text, re.IGNORECASE)
        return self.tokens_of([match.span() for match in found])

    def tokens_of(self, spans: Sequence[tuple[int, int]]) -> Int[Tensor, " found"]:
        """The tokens that carry any of these character ranges [start, end) of the question."""
        carrying = [any(left < end and right > start for start, end in spans) for left, right in self.found.spans]
        return self.question[torch.tensor(carrying, dtype=torch.bool)]

    def picture_tokens(self, number: int = 0) -> Int[Tensor, " found"]:
        """The positions of one picture's tokens, in the order of its grid."""
        if not 0 <= number < len(self.grids):
            raise SelectionError(
                f"picture {number} does not exist", expected=f"0 to {len(self.grids) - 1} ({len(self.grids)} pictures)"
            )
        return (self.image_index == number).nonzero().flatten()

    def plot(
        self,
        image: Image | None = None,
        *,
        positions: Int[Tensor, " found"] | None = None,
        number: int = 0,
        tiles: bool = False,
    ) -> Figure:
        """The patch grid over the original picture, as a matplotlib figure.

        Args:
            image: the original picture; the one that was encoded, where the map knows it.
            positions: these tokens are marked, for example `selector.positions(tokens)`.
            number: which picture.
            tiles: draw the tiles instead of the view of the whole picture.
        """
        from interp_vlm.tokens.token_plot import plot_grid

        return plot_grid(self, image, number, positions, tiles)

    def _repr_html_(self) -> str:
        from interp_vlm.tokens.token_html import token_map_html

        return token_map_html(self)

    def __repr__(self) -> str:
        parts = [f"{name} {len(self.role(name))}" for name in ("image", "question", "template", "bos")]
        padding = len(self.ids) - self.length
        return f"TokenMap({self.length} tokens: {', '.join(parts)}; padding {padding}; {self.question_text!r})"


def build_maps(
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    prompts: Sequence[str],
    questions: Sequence[str],
    image_token_id: int,
    grids: Sequence[Sequence[ImageGrid]],
    keys: Sequence[str],
) -> tuple[TokenMap, ...]:
    """One token map per row of a padded batch, read off the processor's output.

    Args:
        tokenizer: the processor's tokenizer.
        inputs: what the processor returned; `input_ids` and, where rows are padded, `attention_mask`.
        prompts: the text that was handed to the processor.
        questions: the bare questions.
        image_token_id: the id that stands for one image token.
        grids: for each example its pictures' grids.
        keys: for each example a stable hash (see `TokenMap.key`).

    Raises:
        DataError: the image tokens do not match the grids, or the question is not in the prompt.
    """
    ids = inputs["input_ids"].detach().cpu()
    mask = inputs.get("attention_mask", torch.ones_like(ids)).detach().cpu().bool()
    per_row = {"prompts": prompts, "questions": questions, "grids": grids, "keys": keys}
    for name, given in per_row.items():
        if len(given) != len(ids):
            raise DataError(f"{len(given)} {name} for {len(ids)} rows", expected="one each")
    pieces = _Pieces(tokenizer)
    maps = []
    for row in range(len(ids)):
        question = questions[row]
        found = locate(tokenizer, ids[row][mask[row]].tolist(), prompts[row], question, image_token_id)
        if found is None:
            raise DataError(
                f"the question {question!r} is not in the prompt {prompts[row]!r}",
                expected="the prompt to contain the bare question",
                remedy="pass the question as it stands in the prompt, or an empty one",
            )
        image_index = _image_index(ids[row], mask[row], image_token_id, grids[row], row)
        bos = None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        found = _without(found, ids[row][mask[row]].tolist(), {bos, image_token_id})
        maps.append(
            TokenMap(
                ids[row].clone(), pieces.of(ids[row].tolist()), mask[row].clone(), image_index, tuple(grids[row]),
                keys[row], question, found, bos,
            )
        )  # fmt: skip
    return tuple(maps)


def _image_index(
    ids: Tensor, mask: Tensor, image_token_id: int, grids: Sequence[ImageGrid], row: int
) -> Int[Tensor, " pos"]:
    """Image tokens are dealt to the pictures in order; separators with other ids may stand between them."""
    places = (mask & (ids == image_token_id)).nonzero().flatten()
    wanted = [grid.n for grid in grids]
    if sum(wanted) != len(places):
        raise DataError(
            f"example {row} has {len(places)} image tokens",
            expected=f"{sum(wanted)} from its pictures' grids {wanted}",
            remedy="use the processor from the model's own folder, and no image token in the question",
        )
    index = torch.full_like(ids, -1)
    index[places] = torch.repeat_interleave(torch.arange(len(wanted)), torch.tensor(wanted, dtype=torch.long))
    return index


def _without(found: Located, ids: Sequence[int], special: set[int | None]) -> Located:
    """The question without bos or image tokens: a question may spell one out, but roles stay disjoint."""
    kept = [(token, span) for token, span in zip(*found, strict=True) if ids[token] not in special]
    return Located(tuple(token for token, _ in kept), tuple(span for _, span in kept))


class _Pieces:
    """Decoded text of single tokens, leading blanks kept, each id decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def of(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(self.known[token] if token in self.known else self._decode(token) for token in ids)

    def _decode(self, token: int) -> str:
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        raw = self.tokenizer.convert_ids_to_tokens(token)
        # SentencePiece decoders drop the blank that begins a sequence, and here every token begins one.
        if isinstance(raw, str) and raw.startswith("\u2581") and not text.startswith(" "):
            text = " " + text
        self.known[token] = text
        return text
