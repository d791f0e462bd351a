"""The attention knockout protocol of "Cross-modal Information Flow in Multimodal Large Language Models"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_vlm import stats
from interp_vlm.engine.memory import Budget
from interp_vlm.errors import DataError, InterventionError, SelectionError
from interp_vlm.interventions.knockout import AttentionKnockout
from interp_vlm.interventions.vary import windows
from interp_vlm.readouts.metrics import MetricContext
from interp_vlm.readouts.protocols.pictures import picture_numbers
from interp_vlm.readouts.scores import full_precision
from interp_vlm.readouts.spelling import normalised
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.selector import Evidence, Selector
from interp_vlm.tokens.token_map import TokenMap

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from interp_vlm.vlm import VLM

__all__ = ["FLOWS", "InformationFlow", "first_token_probability", "information_flow"]

Box = tuple[float, ...]
Boxes = Sequence[float] | Sequence[Sequence[float]]
"""A box (left, top, right, bottom) in pixels, or several."""

FLOWS = (
    "Question->Last",
    "Image->Last",
    "Image->Question",
    "Last->Last",
    "Image Central Object->Question",
    "Image Without Central Object->Question",
)
"""The six source-target pairs, by the names of the released code: information flows from the first to the second."""


@dataclass(frozen=True, eq=False)
class InformationFlow:
    """How the probability of the model's own answer changes when a flow of information is cut around each layer.

    Attributes:
        flows: the pairs that were cut, of `FLOWS`.
        window: width of the full window, in layers.
        windows: the layers that were cut for each layer.
        before: probability of the answer's first token without a knockout, (example,).
        after: the same with it, (flow, layer, example).
        first_tokens: that token's text, by example.
        right: True where the model's whole answer is the right one, (example,); all True where no answers were given.
        pictures: number of each example's picture; examples of one picture are resampled together.
        mass_left: the receipts' largest attention on a blocked edge (0 where the edges were really cut).
    """

    flows: tuple[str, ...]
    window: int
    windows: tuple[range, ...]
    before: Float[Tensor, " example"]
    after: Float[Tensor, "flow layer example"]
    first_tokens: tuple[str, ...]
    right: Bool[Tensor, " example"]
    pictures: tuple[int, ...]
    mass_left: float

    @property
    def change(self) -> Float[Tensor, "flow layer example"]:
        """Relative change of the probability in per cent: 100 (after - before) / before."""
        return 100 * (self.after - self.before) / self.before

    def frame(self) -> pd.DataFrame:
        """A tidy table: one row per flow, layer and example, those with a wrong answer included."""
        import numpy as np
        import pandas as pd

        flow, layer, example = (index.ravel() for index in np.indices(self.after.shape))
        return pd.DataFrame(
            {
                "flow": np.asarray(self.flows, dtype=object)[flow], "layer": layer,
                "first_layer": np.asarray([cut[0] for cut in self.windows])[layer],
                "last_layer": np.asarray([cut[-1] for cut in self.windows])[layer],
                "example": example, "picture": np.asarray(self.pictures)[example],
                "token": np.asarray(self.first_tokens, dtype=object)[example],
                "before": self.before.double().cpu().numpy()[example],
                "after": self.after.double().cpu().numpy().ravel(),
                "change": self.change.double().cpu().numpy().ravel(), "right": self.right.cpu().numpy()[example],
            }
        )  # fmt: skip

    def summary(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """The mean change over the examples answered rightly: one row per flow and layer.

        Returns:
            `change`, `low`, `high` in per cent with `n`, `groups` (pictures, the unit of the bootstrap), `level`,
            `method`, `seed` and `reason`.

        Raises:
            DataError: when no example was answered rightly.
        """
        import pandas as pd

        kept = self.right.nonzero().flatten().tolist()
        if not kept:
            raise DataError("no example was answered rightly", expected="at least one to average over")
        change, groups, rows = self.change.double().cpu(), [self.pictures[row] for row in kept], []
        for at, flow in enumerate(self.flows):
            for layer in range(len(self.windows)):
                cut = change[at, layer, kept].numpy()
                found = stats.difference(cut, 0 * cut, groups, level=level, seed=seed)
                rows.append(
                    {
                        "flow": flow, "layer": layer, "change": found.value, "low": found.low, "high": found.high,
                        "n": found.n, "groups": found.groups, "level": found.level, "method": found.method,
                        "seed": found.seed, "reason": found.reason,
                    }
                )  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, ax: Any = None, *, level: float = 0.95, seed: int = 0) -> Figure:
        """The mean change by layer: a line with its interval for each flow."""
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator

        table = self.summary(level=level, seed=seed)
        figure = pyplot.figure(figsize=(6.4, 4.2), layout="constrained") if ax is None else ax.figure
        axes = figure.add_subplot() if ax is None else ax
        for flow in self.flows:
            part: Any = table[table["flow"] == flow]
            (line,) = axes.plot(part["layer"], part["change"], marker="o", markersize=3, label=flow)
            axes.fill_between(part["layer"], part["low"], part["high"], color=line.get_color(), alpha=0.15, linewidth=0)
        axes.axhline(0, color="0.4", linestyle="--", linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(
            xlabel=f"layer at the centre of the window of {self.window}",
            ylabel="change of the answer's probability (%)",
        )
        n, groups = int(table["n"].iloc[0]), int(table["groups"].iloc[0])
        sizes = f"{n} {'example' if n == 1 else 'examples'} of {groups} {'picture' if groups == 1 else 'pictures'}"
        axes.set_title(f"attention knockout, {sizes}, {100 * level:.3g}% intervals", fontsize="medium")
        axes.legend(frameon=False, fontsize="small")
        if ax is None:
            pyplot.close(figure)
        return figure

    def __repr__(self) -> str:
        answered = f"{int(self.right.sum())} of {len(self.right)} examples answered rightly"
        return f"InformationFlow({', '.join(self.flows)}; window {self.window}, {len(self.windows)} layers; {answered})"


def first_token_probability(logits: Float[Tensor, "batch vocab"], context: MetricContext) -> Float[Tensor, " batch"]:
    """Probability of the token with which the clean run's answer begins: this one token id, no other spelling."""
    token = context.clean_logits.argmax(dim=-1, keepdim=True).to(logits.device)
    return full_precision(logits).softmax(dim=-1).gather(-1, token).squeeze(-1)


def information_flow(
    vlm: VLM,
    batches: Batch | Sequence[Batch],
    *,
    answers: Sequence[str] | None = None,
    objects: Sequence[Boxes] | None = None,
    flows: Sequence[str] | None = None,
    window: int = 9,
    max_new_tokens: int = 128,
    engine: str = "auto",
    memory: Budget = None,
) -> InformationFlow:
    """Cut attention from one part of the prompt to another around every layer, and watch the answer's probability.

    For each layer, the target positions may no longer attend to the source positions in the layers of the window
    around it; the quantity is the relative change of the probability of the answer's first token,
    100 (after - before) / before.

    Args:
        vlm: the model.
        batches: one batch, or several whose examples are laid end to end.
        answers: the right answer of each example; the model then generates, and averages are over the examples whose
            whole answer is the right one, as published. By default every example counts.
        objects: what each question is about: a box (x0, y0, x1, y1) in pixels of the original picture, or several of
            them, for each example; needed for the two flows from the object and from the rest of the picture.
        flows: which of `FLOWS`; by default all six, without `objects` the first four.
        window: width of the window in layers, odd, 9 as published; a model of few layers needs a smaller one.
        max_new_tokens: length of the answer that is compared with `answers`, 128 as published; 1 for the embedded
            models, which learnt one token and never to stop.
        engine, memory: as in `iv.sweep`.

    Returns:
        An `InformationFlow` with `.change` (flow, layer, example), `.frame()`, `.summary()` and `.plot()`.

    Raises:
        InterventionError: for a window that is no odd number of layers.
        SelectionError: for a flow that does not exist, or one that is empty in an example.
        DataError: for another number of answers or objects than examples.

    Source:
        Zhang et al. 2024, arXiv 2411.18620 (CVPR 2025), and its code, FightingFighting/
        cross-modal-information-flow-in-MLLM at 0b725b7; the method is that of Geva et al. 2023, section 5. What is done
        otherwise here is listed in docs/protocols.md.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> scenes = iv.data.digit_scenes(n=2)
        >>> batch = vlm.encode([scene.image for scene in scenes], [scene.question for scene in scenes])
        >>> iv.protocols.information_flow(vlm, batch, flows=["Image->Question"], window=1).change.shape
        torch.Size([1, 4, 2])
    """
    listed = [batches] if isinstance(batches, Batch) else list(batches)
    examples = [tokens for batch in listed for tokens in batch.tokens]
    for name, given in (("answers", answers), ("objects", objects)):
        if given is not None and (isinstance(given, str) or len(given) != len(examples)):
            raise DataError(f"{len(given)} {name} for {len(examples)} examples", expected="one for each example")
    if window < 1 or window % 2 == 0:
        raise InterventionError(f"a window of {window} layers", expected="an odd number, so that a layer is its centre")
    edges = _edges(examples, objects)
    names = tuple(edges) if flows is None else tuple(flows)
    for name in names:
        if name not in edges:
            without = name in FLOWS
            raise SelectionError(
                f"flow {name!r} {'without objects' if without else 'does not exist'}",
                expected="objects=, a box for each example" if without else f"one of {', '.join(FLOWS)}",
            )
        _refuse_empty(name, edges[name], examples)
    around = windows(vlm, window)
    knockouts = [
        # around the last layer no other position's change can reach the answer: that is a result here, no mistake
        AttentionKnockout(*edges[name], layers=layers, allow_empty=True)
        for name in names
        for layers in around
    ]
    sweep = vlm.sweep(listed, knockouts, first_token_probability, engine=engine, memory=memory)
    return InformationFlow(
        flows=names, window=window, windows=tuple(around), before=sweep.baseline,
        after=sweep.values.reshape(len(names), len(around), len(examples)),
        first_tokens=tuple(token for batch in listed for token in _first_tokens(vlm, batch)),
        right=_answered(vlm, listed, answers, max_new_tokens), pictures=picture_numbers(listed),
        mass_left=max((receipt.mass_left or 0.0 for row in sweep.receipts for receipt in row), default=0.0),
    )  # fmt: skip


@dataclass(frozen=True, repr=False)
class _Object(Selector):
    """Each example's own boxes."""

    boxes: Mapping[str, tuple[Box, ...]]

    def positions(self, tokens: TokenMap, evidence: Evidence | None = None) -> Tensor:
        found = torch.zeros(len(tokens.ids), dtype=torch.bool)
        for x0, y0, x1, y1 in self.boxes[tokens.key]:
            found[select.box(x0, y0, x1, y1).positions(tokens)] = True
        return found.nonzero().flatten()

    def __hash__(self) -> int:
        return hash(tuple(self.boxes.items()))

    def __repr__(self) -> str:
        return "object"


def _edges(examples: Sequence[TokenMap], objects: Sequence[Boxes] | None) -> dict[str, tuple[Selector, Selector]]:
    """Who may no longer look at what: (queries, keys) by the name of the flow from the keys to the queries."""
    question = select.question - select.last
    edges = {
        "Question->Last": (select.last, question),
        "Image->Last": (select.last, select.image),
        "Image->Question": (question, select.image),
        "Last->Last": (select.last, select.last),
    }
    if objects is not None:
        own = _own_boxes(examples, objects)
        edges["Image Central Object->Question"] = (question, own)
        edges["Image Without Central Object->Question"] = (question, select.image - own)
    return edges


def _own_boxes(examples: Sequence[TokenMap], objects: Sequence[Boxes]) -> _Object:
    boxes: dict[str, tuple[Box, ...]] = {}
    for number, (tokens, given) in enumerate(zip(examples, objects, strict=True)):
        flat: list[Any] = list(given)
        own = tuple(tuple(float(corner) for corner in box) for box in (flat if _nested(flat) else [flat]))
        if any(len(box) != 4 for box in own):
            raise DataError(f"the object of example {number} is {given!r}", expected="(x0, y0, x1, y1), or several")
        if boxes.setdefault(tokens.key, own) != own:
            raise DataError(
                f"example {number} is the picture and question of an earlier one, with another object",
                expected="one object for one question about one picture",
                remedy="run them in two calls",
            )
    return _Object(boxes)


def _nested(box: Sequence[Any]) -> bool:
    return bool(box) and isinstance(box[0], Sequence)


def _refuse_empty(name: str, edge: tuple[Selector, Selector], examples: Sequence[TokenMap]) -> None:
    for number, tokens in enumerate(examples):
        for selector in edge:
            if not len(selector.positions(tokens)):
                raise SelectionError(f"{name}: example {number} has no {selector!r}", expected="at least one position")


def _first_tokens(vlm: VLM, batch: Batch) -> list[str]:
    return [vlm.tokenizer.decode([token]) for token in vlm.run(batch).logits.argmax(dim=-1).tolist()]


def _answered(vlm: VLM, batches: Sequence[Batch], answers: Sequence[str] | None, most: int) -> Tensor:
    """Whether the whole generated answer is the right one."""
    if answers is None:
        return torch.ones(sum(map(len, batches)), dtype=torch.bool)
    texts = [text for batch in batches for text in vlm.generate(batch, max_new_tokens=most).texts]
    return torch.tensor([normalised(text) == normalised(own) for text, own in zip(texts, answers, strict=True)])
