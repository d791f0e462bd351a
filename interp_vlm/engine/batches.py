"""Many examples in batches of about equal length, cut smaller where the device has no room for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from interp_vlm.engine.memory import asked_for, out_of_memory, release
from interp_vlm.errors import DataError
from interp_vlm.models.encode import encode
from interp_vlm.models.registry import family_for
from interp_vlm.tokens.batch import Batch

if TYPE_CHECKING:
    from interp_vlm.data.example import Example
    from interp_vlm.vlm import VLM

__all__ = ["SLACK", "WAITING", "Batches", "batches", "in_parts"]

SLACK = 1 / 16
"""A prompt may be this share longer than the shortest one of its batch: so much is padded at most."""

WAITING = 8
"""Batches' worth of encoded examples that may wait, in the memory of the CPU, for others of their length."""

T = TypeVar("T")

# For each model, the positions of the smallest batch that the device had no room for.
_TOO_LARGE: WeakKeyDictionary[VLM, int] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Batches:
    """Examples in batches of about equal length; made by `iv.batches`.

    Going through them yields, for each batch, the numbers of its examples and the batch.

    Attributes:
        vlm: the model.
        examples: questions about pictures.
        size: the most examples of one batch.
    """

    vlm: VLM
    examples: Sequence[Example]
    size: int

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Batch]]:
        def moved(_rows: range, part: Batch) -> Batch:
            return part.to(self.vlm.device, self.vlm.dtype)

        for pack in self._packs():
            for rows, batch in in_parts(self.vlm, _joined(pack.ones, self.vlm.tokenizer), moved):
                yield tuple(pack.numbers[rows.start : rows.stop]), batch

    def map(self, function: Callable[[tuple[int, ...], Batch], T]) -> Iterator[tuple[tuple[int, ...], T]]:
        """Call a function of the examples' numbers and the batch, with smaller batches where memory runs out.

        A batch for which there is no room is cut in halves, and so are all later ones of that size for this model, as
        long as the process lives. What the function does besides its result is done again for the halves.

        Yields:
            The numbers of some examples, and the function's result.

        Raises:
            DataError: there is no room for a single example.

        Example:
            >>> import interp_vlm as iv
            >>> vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes(n=3)
            >>> found = iv.batches(vlm, examples, size=2).map(lambda _, batch: vlm.run(batch).logits)
            >>> [(numbers, len(logits)) for numbers, logits in found]
            [((0, 1), 2), ((2,), 1)]
        """
        for numbers, batch in self:
            yield from self._called(function, numbers, batch)

    def each(self, function: Callable[[tuple[int, ...], Batch], Sequence[T]]) -> Iterator[T]:
        """`map` of a function that says something of each example: one by one, in the order of the examples.

        Example:
            >>> import interp_vlm as iv
            >>> vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes(n=3)
            >>> answers = iv.batches(vlm, examples).each(lambda _, batch: vlm.run(batch).answers)
            >>> len(list(answers))
            3
        """
        waiting: dict[int, T] = {}
        due = 0
        for numbers, found in self.map(function):
            waiting.update(zip(numbers, found, strict=True))
            while due in waiting:
                yield waiting.pop(due)
                due += 1

    def _called(
        self, function: Callable[[tuple[int, ...], Batch], T], numbers: tuple[int, ...], batch: Batch
    ) -> Iterator[tuple[tuple[int, ...], T]]:
        def called(rows: range, part: Batch) -> T:
            return function(numbers[rows.start : rows.stop], part)

        for rows, found in in_parts(self.vlm, batch, called):
            yield numbers[rows.start : rows.stop], found

    def _packs(self) -> Iterator[_Pack]:
        """The examples, encoded once each, as packs of those that go together; their order depends on them alone."""
        waiting: list[_Pack] = []
        for number, example in enumerate(self.examples):
            one = self._encoded(number, example)
            pack = next((pack for pack in waiting if pack.takes(one)), None)
            if pack is None:
                pack = _Pack()
                waiting.append(pack)
            pack.add(number, one)
            if len(pack.numbers) == self.size:
                waiting.remove(pack)
                yield pack
            elif sum(len(pack.numbers) for pack in waiting) > WAITING * self.size:
                yield waiting.pop(0)
        yield from waiting

    def _encoded(self, number: int, example: Example) -> Batch:
        """One example by itself, on the CPU."""
        model: Any = self.vlm.model
        try:
            return encode(
                model.config, family_for(type(model).__name__), self.vlm.processor, [example.image], [example.question]
            )
        except DataError as error:
            name = f"example {number} ({getattr(example, 'id', example.question)!r})"
            raise DataError(f"{name}: {error.problem}", expected=error.expected, remedy=error.remedy) from error


def batches(vlm: VLM, examples: Sequence[Example], size: int = 16) -> Batches:
    """Many examples in batches of about equal length, whatever the sizes of their pictures.

    Examples go together whose pictures have the same canvas (as many tiles, of the same pixels) and whose prompts
    differ by at most a sixteenth of their length. So a picture is never padded, and a prompt hardly; where not enough
    examples go together, a batch is smaller. Every picture is processed once. The order of the batches depends on the
    examples and `size` alone.

    Args:
        vlm: the model.
        examples: questions about pictures, with `image` and `question`.
        size: the most examples of one batch.

    Returns:
        `Batches`: go through it for the numbers of the examples and the batch; `.map(function)` and
        `.each(function)` also make do with smaller batches where memory runs out.

    Raises:
        DataError: a size below 1; later, an example that cannot be encoded (it names the example).

    Example:
        >>> import interp_vlm as iv
        >>> vlm, examples = iv.load("testbed:llava"), iv.data.digit_scenes(n=3)
        >>> [numbers for numbers, batch in iv.batches(vlm, examples, size=2)]
        [(0, 1), (2,)]
    """
    if size < 1:
        raise DataError(f"batches of {size} examples", expected="at least 1")
    return Batches(vlm, examples, size)


def in_parts(
    vlm: VLM, batch: Batch, function: Callable[[range, Batch], T], *, whole: str = ""
) -> Iterator[tuple[range, T]]:
    """Call a function of a batch; where memory runs out, of its halves, and so on; see `Batches.map`.

    Args:
        vlm: the model.
        batch: encoded examples.
        function: of the rows and the batch of them.
        whole: why the batch cannot be cut; empty where it can.

    Yields:
        Some of the batch's rows, in order, and the function's result for them.

    Raises:
        DataError: there is no room for a single example, or for a batch that cannot be cut.
    """
    left = [range(len(batch))] if whole else _fitting(vlm, batch)
    while left:
        rows = left.pop(0)
        part = _rows(batch, rows)
        try:
            found = function(rows, part)
        except Exception as error:
            if not out_of_memory(error):
                if len(rows) < len(batch):
                    error.add_note(f"in {len(rows)} of the {len(batch)} examples of a batch too large for the memory")
                raise
            if whole or len(rows) == 1:
                raise _refusal(vlm, part, whole, error) from error
        else:
            yield rows, found
            del found
            continue
        # After the `except`, so that the error's traceback no longer holds what did not fit.
        vlm._engine.clean.forget(part)
        _TOO_LARGE[vlm] = len(rows) * _width(batch)
        del part
        release()
        left = [each for span in (rows, *left) for each in _fitting(vlm, batch, span)]


def _fitting(vlm: VLM, batch: Batch, rows: range | None = None) -> list[range]:
    """Rows of a batch, halved until none has as many positions as there was no room for."""
    rows = range(len(batch)) if rows is None else rows
    if len(rows) < 2 or len(rows) * _width(batch) < _TOO_LARGE.get(vlm, math.inf):
        return [rows]
    middle = (rows.start + rows.stop + 1) // 2
    halves = range(rows.start, middle), range(middle, rows.stop)
    return [each for half in halves for each in _fitting(vlm, batch, half)]


def _rows(batch: Batch, rows: range) -> Batch:
    return batch if len(rows) == len(batch) else batch[rows.start : rows.stop]


def _width(batch: Batch) -> int:
    return batch.inputs["input_ids"].shape[1]


def _refusal(vlm: VLM, batch: Batch, whole: str, error: Exception) -> DataError:
    sizes = ", ".join(f"{picture.width}x{picture.height}" for own in batch.images for picture in own) or "none"
    about = f"{batch.questions[0]!r}, pictures: {sizes}, " if len(batch) == 1 else ""
    needed = asked_for(error)
    return DataError(
        f"too little memory on {vlm.device} for {'one example' if len(batch) == 1 else f'{len(batch)} examples'} "
        f"({about}{_width(batch)} positions{f'; it failed at a piece of {needed}' if needed else ''})",
        expected=f"room for all of them, since {whole}" if whole and len(batch) > 1 else "room for one example",
        remedy="take smaller batches" if whole and len(batch) > 1 else
        "take a smaller picture, a smaller `memory=` in a sweep, another device, or load the model with a device_map "
        "that offloads a part of it",
    )  # fmt: skip


@dataclass(eq=False)
class _Pack:
    """Encoded examples that go together, by their numbers."""

    numbers: list[int] = field(default_factory=list)
    ones: list[Batch] = field(default_factory=list)

    def takes(self, one: Batch) -> bool:
        lengths = [_width(each) for each in (*self.ones, one)]
        return max(lengths) <= (1 + SLACK) * min(lengths) and _canvas(one) == _canvas(self.ones[0])

    def add(self, number: int, one: Batch) -> None:
        self.numbers.append(number)
        self.ones.append(one)


def _by_token(batch: Batch, name: str) -> bool:
    """Whether a tensor has one number per position of the prompt."""
    return batch.inputs[name].shape == batch.inputs["input_ids"].shape


def _canvas(batch: Batch) -> dict[str, tuple[int, ...]]:
    """The shapes of one row of each tensor that is not about the prompt: where they differ, rows would be padded."""
    return {name: tuple(value.shape[1:]) for name, value in batch.inputs.items() if not _by_token(batch, name)}


def _joined(ones: Sequence[Batch], tokenizer: Any) -> Batch:
    """Single examples as one batch, padded on the left: what the processor makes of them together."""
    width = max(map(_width, ones))
    ones = [_padded(one, width - _width(one), tokenizer) for one in ones]
    inputs = {name: torch.cat([one.inputs[name] for one in ones]) for name in ones[0].inputs}
    filled = dict.fromkeys(inputs, 0)
    rows = []
    for one in ones:
        rows.append({name: (filled[name], filled[name] + stop) for name, (_, stop) in one.image_rows[0].items()})
        filled.update({name: stop for name, (_, stop) in rows[-1].items()})
    return Batch(
        inputs, tuple(one.tokens[0] for one in ones), tuple(one.images[0] for one in ones),
        tuple(one.questions[0] for one in ones), tuple(one.prompts[0] for one in ones), image_rows=tuple(rows),
    )  # fmt: skip


def _padded(one: Batch, count: int, tokenizer: Any) -> Batch:
    """A single example with `count` positions of padding before its prompt."""
    if not count:
        return one

    def longer(value: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(value, (count, 0), value=fill)

    pad, (row,) = tokenizer.pad_token_id, one.tokens
    piece = tokenizer.decode([pad], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    tokens = replace(
        row,
        ids=longer(row.ids, pad),
        pieces=(piece,) * count + row.pieces,
        attention_mask=longer(row.attention_mask, 0),
        image_index=longer(row.image_index, -1),
    )
    inputs = {
        name: longer(value, pad if name == "input_ids" else 0) if _by_token(one, name) else value
        for name, value in one.inputs.items()
    }
    return replace(one, inputs=inputs, tokens=(tokens,))
