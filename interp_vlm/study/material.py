"""What a study works on: examples by condition, the pictures that only serve as reference, and pairs of scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from interp_vlm.data.digits import Pair, digit_pairs, digit_scenes
from interp_vlm.data.example import Example
from interp_vlm.study.settings import Settings

__all__ = ["Material", "Shard", "load_material", "shards"]

HARD_FACTOR = 4  # hard scenes per standard one: they cost one pass each, and errors are what is counted there
PAIR_SHARE = 4  # one pair of scenes for so many questions
REFERENCE_PICTURES = 64
FITTING_FACTOR = 2  # hard scenes per standard one for choosing neurons
FITTING_SHARE = 5  # elsewhere one picture in so many, as in the studied work's split
AS_GIVEN = "as given"


@dataclass(frozen=True, eq=False)
class Shard:
    """The unit of work and of resumption: some examples (or pairs) of one condition.

    Attributes:
        number: its place among the shards of an experiment.
        condition: "standard" or "hard" for digit scenes, "as given" for other data.
        items: examples, or pairs of examples.
    """

    number: int
    condition: str
    items: tuple[Example | Pair, ...]

    @property
    def examples(self) -> list[Example]:
        """The items that are examples."""
        return [item for item in self.items if isinstance(item, Example)]

    @property
    def pairs(self) -> list[Pair]:
        """The items that are pairs."""
        return [item for item in self.items if isinstance(item, Pair)]

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of its examples; of a pair, of the clean one."""
        return tuple(item.clean.id if isinstance(item, Pair) else item.id for item in self.items)


@dataclass(frozen=True, eq=False)
class Material:
    """The examples of a study.

    Attributes:
        conditions: examples by condition; the first serves the interventions, the last the prediction of errors.
        pairs: scenes that differ in one object; none for data other than digit scenes.
        reference: examples whose pictures serve as reference for masking and for nothing else.
        fitting: examples on which probes choose the neurons to ablate, about other pictures than all the rest.
        skipped: what could not be read, a line each.
        source: the data in words.
    """

    conditions: Mapping[str, tuple[Example, ...]]
    pairs: tuple[Pair, ...]
    reference: tuple[Example, ...]
    fitting: tuple[Example, ...]
    skipped: tuple[str, ...]
    source: str

    @property
    def interventions(self) -> dict[str, tuple[Example, ...]]:
        """The condition on which interventions are made."""
        return dict([next(iter(self.conditions.items()))])

    @property
    def errors(self) -> dict[str, tuple[Example, ...]]:
        """The condition with the most errors, on which correctness is predicted."""
        return dict([list(self.conditions.items())[-1]])

    @property
    def fingerprint(self) -> str:
        """A hash of every example's id, question and answer: what must be the same when a study is resumed."""
        digest = hashlib.sha256()
        examples = [example for listed in self.conditions.values() for example in listed]
        both = [example for pair in self.pairs for example in (pair.clean, pair.corrupt)]
        for example in (*examples, *self.reference, *self.fitting, *both):
            digest.update(repr((example.id, example.group, example.question, example.answers)).encode())
        return digest.hexdigest()[:16]


def load_material(settings: Settings) -> Material:
    """Read or draw the examples that the settings name.

    Raises:
        DataError: for data that cannot be read.
    """
    return _digits(settings) if settings.data == "digits" else _read(settings)


def _digits(settings: Settings) -> Material:
    n, seed = settings.n, settings.seed
    assert n is not None
    reference = digit_scenes("validation", min(2 * n, 6 * REFERENCE_PICTURES), seed)
    return Material(
        conditions={
            "standard": tuple(digit_scenes("test", n, seed, "standard")),
            "hard": tuple(digit_scenes("test", HARD_FACTOR * n, seed, "hard")),
        },
        pairs=tuple(digit_pairs("test", max(1, n // PAIR_SHARE), seed, "standard")),
        reference=_one_per_picture(reference),
        # Validation glyphs under another seed: neither the reference nor any tested scene.
        fitting=tuple(digit_scenes("validation", FITTING_FACTOR * n, seed + 1, "hard")),
        skipped=(),
        source="held-out digit scenes (handwritten digits that no training picture showed)",
    )


def _read(settings: Settings) -> Material:
    from interp_vlm.data import load

    found = load(settings.data, limit=settings.limit, seed=settings.seed, on_error=settings.on_error)
    skipped = tuple(f"{item.id}: {item.path} ({item.reason})" for item in found.skipped)
    groups = list(dict.fromkeys(example.group for example in found))
    # One picture in ten is set aside: a mean over the pictures that are masked would leak into the mask.
    held = min(REFERENCE_PICTURES, len(groups) // 10 or int(len(groups) > 1))
    order = np.random.default_rng(settings.seed).permutation(len(groups))
    reference = {groups[index] for index in order[:held]}
    fitting = {groups[index] for index in order[held : held + len(groups) // FITTING_SHARE]}
    return Material(
        conditions={AS_GIVEN: tuple(example for example in found if example.group not in reference | fitting)},
        pairs=(),
        reference=_one_per_picture([example for example in found if example.group in reference]),
        fitting=tuple(example for example in found if example.group in fitting),
        skipped=skipped,
        source=settings.data,
    )


def _one_per_picture(examples: Iterable[Example]) -> tuple[Example, ...]:
    return tuple({example.group: example for example in reversed(list(examples))}.values())[::-1]


def shards(conditions: Mapping[str, Sequence[Example] | Sequence[Pair]], size: int) -> list[Shard]:
    """Cut examples into shards of about `size`, the questions of a picture together.

    The cut depends on the examples and the size alone, so that a resumed study cuts as the stopped one did.

    Example:
        >>> examples = digit_scenes(n=18)
        >>> [len(shard.items) for shard in shards({"standard": examples}, 10)]
        [12, 6]
    """
    cut: list[Shard] = []
    for condition, items in conditions.items():
        groups: dict[str, list[Example | Pair]] = {}
        for item in items:
            groups.setdefault(item.group if isinstance(item, Example) else item.clean.group, []).append(item)
        current: list[Example | Pair] = []
        for group in groups.values():
            current += group
            if len(current) >= size:
                cut.append(Shard(len(cut), condition, tuple(current)))
                current = []
        if current:
            cut.append(Shard(len(cut), condition, tuple(current)))
    return cut
