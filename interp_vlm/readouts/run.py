"""What a run or a generation leaves in the caller's hands: answers, logits and receipts."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from interp_vlm.engine.plan import Plan
from interp_vlm.engine.receipts import Receipt
from interp_vlm.readouts.answers import Answer

__all__ = ["Generation", "Run"]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a batch.

    Attributes:
        logits: at each example's answer position, the last prompt token.
        answers: text of the most probable answer, with `.scores`.
        receipts: one per intervention, in their order.
        clean_logits: the same without interventions.
        plan: how the engine ran it.
    """

    logits: Float[Tensor, "batch vocab"]
    answers: tuple[Answer, ...]
    receipts: tuple[Receipt, ...]
    clean_logits: Float[Tensor, "batch vocab"]
    plan: Plan

    def __repr__(self) -> str:
        answers = ", ".join(repr(str(answer)) for answer in self.answers[:6]) + (
            ", ..." if len(self.answers) > 6 else ""
        )
        lines = "".join(f"\n  {receipt}" for receipt in self.receipts)
        return f"Run({len(self.answers)} answers: {answers}){lines}"

    def _repr_html_(self) -> str:
        from html import escape

        answers = "".join(f"<td style='padding:2px 8px'>{escape(str(answer))}</td>" for answer in self.answers[:12])
        receipts = "".join(f"<li>{escape(str(receipt))}</li>" for receipt in self.receipts)
        more = f"<td>... {len(self.answers)} in all</td>" if len(self.answers) > 12 else ""
        return f"<table><tr><th>answers</th>{answers}{more}</tr></table><ul>{receipts}</ul>"


@dataclass(frozen=True, eq=False)
class Generation:
    """Generated continuations.

    Attributes:
        texts: decoded, special tokens left out.
        ids: the generated token ids, without the prompt.
    """

    texts: tuple[str, ...]
    ids: Int[Tensor, "batch step"]
