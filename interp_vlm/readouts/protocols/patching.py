"""The patching effect of "What Do VLMs NOTICE?", for pairs of pictures and for pairs of questions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm import stats
from interp_vlm.engine.memory import Budget
from interp_vlm.errors import DataError, InterventionError, SelectionError
from interp_vlm.interventions.base import Indices, indices
from interp_vlm.interventions.patch import ActivationPatch
from interp_vlm.readouts.protocols.pictures import picture_numbers, pixels
from interp_vlm.readouts.scores import full_precision, log_sums
from interp_vlm.readouts.spelling import prompt_ends, spellings
from interp_vlm.sites import site as site_named
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.selector import Selector
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.vlm import VLM

__all__ = ["PatchingEffect", "notice"]

Answers = str | int | Sequence[str | int]
"""One answer for every example (a word or a token id), or one for each."""


@dataclass(frozen=True, eq=False)
class PatchingEffect:
    """What putting back one activation of the clean run does to the corrupt run.

    Values are those of the patched run, with one head in the head axis where the heads were patched together.

    Attributes:
        corruption: "semantic image pairs" or "symmetric token replacement".
        site: what was patched.
        places: names of the positions that were patched, one set at a time.
        layers: the layers, one at a time.
        heads: the heads, one at a time, or None.
        difference: logit of the correct answer minus that of the incorrect one, (place, layer, head, example).
        probability: of the correct answer, (place, layer, head, example).
        clean_difference: the difference without corruption, (example,).
        corrupt_difference: the difference of the corrupt run, (example,).
        clean_probability: of the correct answer without corruption, (example,).
        corrupt_probability: of the correct answer in the corrupt run, (example,).
        pictures: number of each example's clean picture; examples of one picture are resampled together.
    """

    corruption: str
    site: str
    places: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    difference: Float[Tensor, "place layer head example"]
    probability: Float[Tensor, "place layer head example"]
    clean_difference: Float[Tensor, " example"]
    corrupt_difference: Float[Tensor, " example"]
    clean_probability: Float[Tensor, " example"]
    corrupt_probability: Float[Tensor, " example"]
    pictures: tuple[int, ...]

    @property
    def effect(self) -> Float[Tensor, "place layer head example"]:
        """The published patching effect: (patched - corrupt) / (clean - corrupt), of the logit differences.

        1 where the patch undoes the corruption, 0 where it does nothing; not finite where clean and corrupt are equal.
        """
        return (self.difference - self.corrupt_difference) / (self.clean_difference - self.corrupt_difference)

    @property
    def probability_change(self) -> Float[Tensor, "place layer head example"]:
        """Probability of the correct answer, patched minus corrupt."""
        return self.probability - self.corrupt_probability

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row per place, layer, head (where heads were patched one at a time) and example."""
        import pandas as pd

        place, layer, head, example = (index.ravel() for index in np.indices(self.difference.shape))
        named = {} if self.heads is None else {"head": np.asarray(self.heads)[head]}
        per_example = ("clean_difference", "corrupt_difference", "clean_probability", "corrupt_probability")
        per_cell = ("difference", "effect", "probability", "probability_change")
        return pd.DataFrame(
            {
                "place": np.asarray(self.places, dtype=object)[place], "layer": np.asarray(self.layers)[layer], **named,
                "example": example, "picture": np.asarray(self.pictures)[example],
                **{name: getattr(self, name).double().cpu().numpy()[example] for name in per_example},
                **{name: getattr(self, name).double().cpu().numpy().ravel() for name in per_cell},
            }
        )  # fmt: skip

    def summary(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """The effect over all examples: one row per place, layer and head.

        Returns:
            `effect`, the ratio of the means (stable where single pairs hardly differ), with `low`, `high`, `n`,
            `groups` (pictures, the unit of the bootstrap), `level`, `method`, `seed` and `reason`; `mean_of_effects`,
            the mean of the published per-example ratios; and `probability_change`, a mean.
        """
        import pandas as pd

        whole = (self.clean_difference - self.corrupt_difference).double().cpu().numpy()
        effect, change, rows = self.effect.double().cpu(), self.probability_change.double().cpu(), []
        moved = (self.difference - self.corrupt_difference).double().cpu()
        for cell, where in self._cells():
            found = stats.ratio_of_means(moved[cell].numpy(), whole, self.pictures, level=level, seed=seed)
            rows.append(
                {
                    **where, "effect": found.value, "low": found.low, "high": found.high,
                    "mean_of_effects": float(effect[cell].mean()), "probability_change": float(change[cell].mean()),
                    "n": found.n, "groups": found.groups, "level": found.level, "method": found.method,
                    "seed": found.seed, "reason": found.reason,
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, ax: Any = None) -> Figure:
        """The effect (ratio of means) as a heat map: layer by place, or layer by head where there is one place."""
        from matplotlib import pyplot

        whole = float((self.clean_difference - self.corrupt_difference).double().mean())
        means = (self.difference - self.corrupt_difference).double().mean(dim=-1).cpu().numpy() / whole
        if self.heads is not None and len(self.places) > 1:
            raise InterventionError(
                f"effects of {len(self.heads)} heads at {len(self.places)} places",
                expected="one place to plot heads",
                remedy="plot .summary() instead",
            )
        across, below = self.places, "positions patched"
        grid = means[:, :, 0].T
        if self.heads is not None:
            across, below, grid = tuple(map(str, self.heads)), f"head, at {', '.join(self.places)}", means[0]
        longest = max(map(len, across))
        size = (max(4.8, 1.8 + 0.34 * len(across)), max(2.2, 1.0 + 0.16 * len(self.layers)) + 0.07 * longest)
        figure = pyplot.figure(figsize=size, layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        reach = max(1.0, float(np.nanmax(np.abs(grid))))
        drawn = axes.imshow(grid, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        axes.invert_yaxis()
        _label(axes, across, self.layers)
        axes.set_xlabel(below)
        axes.set_ylabel(f"layer ({self.site})")
        axes.set_title(f"{self.corruption}, {self._size()}", fontsize="medium")
        figure.colorbar(drawn, ax=axes, label="patching effect", pad=0.02)
        if ax is None:
            pyplot.close(figure)
        return figure

    def _cells(self) -> list[tuple[tuple[int, int, int], dict[str, Any]]]:
        """Every cell that was patched: its index and its name."""
        numbers: Sequence[int | None] = (None,) if self.heads is None else self.heads
        return [
            (
                (place, layer, head),
                {"place": self.places[place], "layer": self.layers[layer]}
                | ({} if number is None else {"head": number}),
            )
            for place in range(len(self.places))
            for layer in range(len(self.layers))
            for head, number in enumerate(numbers)
        ]

    def _size(self) -> str:
        return f"{len(self.pictures)} {'pair' if len(self.pictures) == 1 else 'pairs'}"

    def __repr__(self) -> str:
        heads = "" if self.heads is None else f", heads {len(self.heads)}"
        shape = f"places {len(self.places)}, layers {len(self.layers)}{heads}"
        ends = f"{float(self.corrupt_difference.mean()):.3g} corrupt, {float(self.clean_difference.mean()):.3g} clean"
        return f"PatchingEffect({self.corruption}, {self._size()}; {self.site!r}: {shape}; logit difference {ends})"


def notice(
    vlm: VLM,
    clean: Batch | Sequence[Batch],
    corrupt: Batch | Sequence[Batch],
    correct: Answers,
    incorrect: Answers,
    *,
    site: str = "attn_out",
    positions: Mapping[str, Any] | Sequence[Any] | Selector | None = None,
    layers: Indices = "all",
    heads: Indices | None = None,
    engine: str = "auto",
    memory: Budget = None,
) -> PatchingEffect:
    """Put activations of the clean run into the corrupt one, a place and layer at a time: what brings the answer back?

    The pairs are either semantic image pairs (the same question about two pictures) or symmetric token replacements
    (two questions of equally many tokens about the same picture).

    Args:
        vlm: the model.
        clean: encoded examples, one batch or several that are laid end to end.
        corrupt: their corruptions, one for each, in batches of the same sizes.
        correct: right answer of the clean examples: words (all their single-token spellings count) or token ids (as
            published).
        incorrect: right answer of the corrupt ones.
        site: "attn_out" and "mlp_out" as published for LLaVA, "z" for heads, or a place in the residual stream.
        positions: roles or selectors to patch, one set at a time, or a mapping from names to them; by default every
            token after the last picture by itself, counted from the end.
        layers: an int, a range, a list or "all"; one at a time.
        heads: at "z", heads to patch one at a time; by default all together.
        engine, memory: as in `iv.sweep`.

    Returns:
        A `PatchingEffect` with `.effect` (place, layer, head, example), `.probability_change`, `.frame()`,
        `.summary()` and `.plot()`.

    Raises:
        InterventionError: for pairs that are neither, or both; heads at another site than "z"; a site outside the
            decoder.
        SelectionError: for an answer that is no single token, or the same on both sides.
        DataError: for another number of answers than examples.

    Source:
        Golovanevsky et al. 2024, arXiv 2406.16320 (NAACL 2025), and its code, wrudman/NOTICE at 031b27d
        (LLAVA/patching_utils.py) and 0a3e172 (BLIP/patching_utils.py); the normalisation is that of Zhang and Nanda
        2023, arXiv 2309.16042. What is done otherwise here is listed in docs/protocols.md.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> pair = iv.data.digit_pairs(n=1)[0]
        >>> clean = vlm.encode(pair.clean.image, pair.clean.question)
        >>> corrupt = vlm.encode(pair.corrupt.image, pair.corrupt.question)
        >>> answers = pair.clean.answer, pair.corrupt.answer
        >>> found = iv.protocols.notice(vlm, clean, corrupt, *answers, site="resid_post", positions=["image", "last"])
        >>> found.corruption, found.effect.shape
        ('semantic image pairs', torch.Size([2, 4, 1, 1]))
    """
    cleans, corrupts = ([side] if isinstance(side, Batch) else list(side) for side in (clean, corrupt))
    corruption = _corruption(cleans, corrupts)
    if site_named(site).part != "decoder" or "k" in site_named(site).axes:
        raise InterventionError(f"site {site!r}", expected="activations of the decoder, for example 'attn_out'")
    if heads is not None and site != "z":
        raise InterventionError(f"heads of {site!r}", expected="site 'z', where heads are apart")
    named = _places([tokens for batch in cleans for tokens in batch.tokens], positions)
    at_layers = indices(layers, vlm.anatomy.n_layers, "layer")
    at_heads = None if heads is None else indices(heads, vlm.anatomy.n_heads, "head")
    cells = list(itertools.product(named.values(), at_layers, [None] if at_heads is None else at_heads))
    readers = _readers(vlm, cleans, corrupts, correct, incorrect)
    columns = zip(*(_measure(vlm, reader, site, cells, engine, memory) for reader in readers), strict=True)
    patched, patched_p, *ends = (torch.cat(parts, dim=-1) for parts in columns)
    shape = (len(named), len(at_layers), -1, patched.shape[-1])
    return PatchingEffect(
        corruption=corruption, site=site, places=tuple(named), layers=at_layers, heads=at_heads,
        difference=patched.view(shape), probability=patched_p.view(shape),
        clean_difference=ends[0], clean_probability=ends[1], corrupt_difference=ends[2], corrupt_probability=ends[3],
        pictures=picture_numbers(cleans),
    )  # fmt: skip


def _measure(
    vlm: VLM, read: _Answers, site: str, cells: Sequence[tuple[Any, int, int | None]], engine: str, memory: Budget
) -> tuple[Tensor, ...]:
    """Difference and probability of a batch: patched, each (cell, example), clean, and corrupt, each (example,)."""
    cache = vlm.capture(read.clean, site, layers=sorted({layer for _, layer, _ in cells}))
    patches = [
        # what the last layer leaves at other positions than the last reaches no answer: a result here, no mistake
        [ActivationPatch(site, [layer], place, None if head is None else [head], source=cache, allow_empty=True)]
        for place, layer, head in cells
    ]
    column: dict[int, tuple[Tensor, Tensor]] = {}
    for number, outcome in vlm._engine.runs(read.corrupt, patches, engine, memory):
        column[number] = read(outcome.logits, read.corrupt)
    patched = [torch.stack([column[number][side] for number in range(len(cells))]) for side in (0, 1)]
    ends = [read(vlm.run(batch, engine=engine).logits, batch) for batch in (read.clean, read.corrupt)]
    return *patched, *ends[0], *ends[1]


class _Answers:
    """A batch of pairs; reads the logit difference of their two answers and the probability of the correct one."""

    def __init__(self, vlm: VLM, clean: Batch, corrupt: Batch, pairs: Sequence[tuple[str | int, str | int]]) -> None:
        self.clean, self.corrupt = clean, corrupt
        self._ids = {
            batch: [
                _token_ids(vlm, pair, end) for pair, end in zip(pairs, prompt_ends(batch, vlm.tokenizer), strict=True)
            ]
            for batch in (clean, corrupt)
        }

    def __call__(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        scores = full_precision(logits)
        right, wrong = log_sums(scores, self._ids[batch]).unbind(dim=-1)
        return right - wrong, (right - scores.logsumexp(dim=-1)).exp()


def _readers(
    vlm: VLM, cleans: Sequence[Batch], corrupts: Sequence[Batch], correct: Answers, incorrect: Answers
) -> list[_Answers]:
    """The pairs of answers, dealt to the batches."""
    count = sum(map(len, cleans))
    pairs = iter(list(zip(_listed(correct, count), _listed(incorrect, count), strict=True)))
    return [
        _Answers(vlm, clean, corrupt, list(itertools.islice(pairs, len(clean))))
        for clean, corrupt in zip(cleans, corrupts, strict=True)
    ]


def _listed(answers: Answers, count: int) -> list[str | int]:
    if isinstance(answers, str | int):
        return [answers] * count
    if len(answers) != count:
        raise DataError(f"{len(answers)} answers for {count} examples", expected="one for each example")
    return list(answers)


def _token_ids(vlm: VLM, pair: tuple[str | int, ...], end: str) -> list[tuple[int, ...]]:
    ids = [(answer,) if isinstance(answer, int) else spellings(vlm.tokenizer, end, answer) for answer in pair]
    if set(ids[0]) & set(ids[1]):
        raise SelectionError(f"{pair[0]!r} and {pair[1]!r} are the same answer", expected="two different answers")
    return ids


def _corruption(cleans: Sequence[Batch], corrupts: Sequence[Batch]) -> str:
    """Which of the two published corruptions the pairs are."""
    sizes = [list(map(len, side)) for side in (cleans, corrupts)]
    if sizes[0] != sizes[1]:
        raise InterventionError(
            f"{sum(sizes[0])} clean and {sum(sizes[1])} corrupt examples, in batches of {sizes[0]} and {sizes[1]}",
            expected="pairs, in batches of the same sizes",
        )
    found = set()
    rows = [(*pair, row) for pair in zip(cleans, corrupts, strict=True) for row in range(len(pair[0]))]
    for number, (clean, corrupt, row) in enumerate(rows):
        other_picture = pixels(clean.images[row]) != pixels(corrupt.images[row])
        other_text = clean.prompts[row] != corrupt.prompts[row]
        if other_picture == other_text:
            same = "differ in picture and question" if other_text else "are the same"
            raise InterventionError(
                f"the two examples of pair {number} {same}",
                expected="two pictures and one question, or one picture and two questions",
            )
        lengths = clean.tokens[row].length, corrupt.tokens[row].length
        if other_text and lengths[0] != lengths[1]:
            raise InterventionError(
                f"the questions of pair {number} have {lengths[0]} and {lengths[1]} tokens",
                expected="equally many, so that positions correspond",
                remedy="replace a word by one of as many tokens",
            )
        found.add("symmetric token replacement" if other_text else "semantic image pairs")
    if len(found) != 1:
        raise InterventionError(
            f"pairs of {' and '.join(sorted(found)) or 'nothing'}", expected="pairs of one kind of corruption"
        )
    return found.pop()


def _places(
    examples: Sequence[TokenMap], positions: Mapping[str, Any] | Sequence[Any] | Selector | None
) -> dict[str, Any]:
    """The positions to patch, by name."""
    if positions is not None:
        if isinstance(positions, Mapping):
            return dict(positions)
        return {str(place): place for place in ([positions] if isinstance(positions, str | Selector) else positions)}
    found = {}
    for back in range(-min(map(_text_after_picture, examples)), 0):
        pieces = {tokens.pieces[int(tokens.all[back])] for tokens in examples}
        found[f"{back}{' ' + repr(pieces.pop().strip(' ')) if len(pieces) == 1 else ''}"] = select.positions(back)
    return found


def _text_after_picture(tokens: TokenMap) -> int:
    pictured = tokens.image
    return int((tokens.all > (pictured.max() if len(pictured) else -1)).sum())


def _label(axes: Any, across: Sequence[str], layers: Sequence[int]) -> None:
    """Name the columns and as many layers as there is room for."""
    # "$" would begin a formula
    axes.set_xticks(range(len(across)), [name.replace("$", r"\$") for name in across])
    if max(map(len, across)) > 3:
        axes.tick_params(axis="x", labelrotation=90, labelsize=8)
    step = max(1, len(layers) // 12)
    axes.set_yticks(range(0, len(layers), step), list(map(str, layers[::step])))
