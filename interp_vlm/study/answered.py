"""Questions with their answers appended: what a model holds after it has written the first token of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from interp_vlm.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.tokens.token_map import TokenMap
    from interp_vlm.vlm import VLM

__all__ = ["answered"]


def answered(vlm: VLM, batch: Batch, tokens: Sequence[int]) -> Batch:
    """The batch with one answer token after each prompt, so that `last` names the position of that token.

    The token is what generation would feed back: text, in PaliGemma a suffix that the prompt does not see.

    Args:
        vlm: the model.
        batch: encoded questions, padded on the left.
        tokens: the id of each example's answer token.

    Raises:
        DataError: another number of tokens than of examples, or a batch padded on the right.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:llava")
        >>> example = iv.data.digit_scenes(n=1)[0]
        >>> batch = vlm.encode(example.image, example.question)
        >>> int(answered(vlm, batch, [7]).last[0] - batch.last[0])
        1
    """
    if len(tokens) != len(batch):
        raise DataError(f"{len(tokens)} answer tokens for {len(batch)} examples", expected="one each")
    if batch.padding != "left" and not bool(batch.inputs["attention_mask"].all()):
        raise DataError(
            "the batch is padded on the right", expected="padding on the left", remedy="encode with padding='left'"
        )
    kinds = {
        "input_ids": torch.tensor(list(tokens)),
        "attention_mask": torch.ones(len(batch)),
        "token_type_ids": torch.full((len(batch),), float(vlm.anatomy.prefix == "bidirectional")),
        "mm_token_type_ids": torch.zeros(len(batch)),
    }
    inputs = {
        name: torch.cat([value, kinds[name][:, None].to(value)], dim=1) if name in kinds else value
        for name, value in batch.inputs.items()
    }
    maps = tuple(_longer(vlm, row, token) for row, token in zip(batch.tokens, tokens, strict=True))
    return replace(batch, inputs=inputs, tokens=maps)


def _longer(vlm: VLM, row: TokenMap, token: int) -> TokenMap:
    def append(values: Tensor, new: int) -> Tensor:
        return torch.cat([values, values.new_full((1,), new)])

    return replace(
        row,
        ids=append(row.ids, token),
        pieces=(*row.pieces, vlm.tokenizer.decode([token])),
        attention_mask=append(row.attention_mask, 1),
        image_index=append(row.image_index, -1),
    )
