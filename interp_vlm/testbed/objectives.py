"""What the training minimises: alignment of image tokens with words, and answers to packed questions.

Several questions share one picture: they stand one after the other behind the same prompt, and a block-diagonal mask
with positions
counted anew for each keeps them apart. For a causal model that is exactly the single-question forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from interp_vlm.data.digit_canvas import COLOURS
from interp_vlm.testbed.build import GRID, Prompt
from interp_vlm.testbed.feed import Pictures, Questions

__all__ = ["Alignment", "answer_logits", "image_features"]


def image_features(model: Any, pictures: Tensor) -> Float[Tensor, "image patch d"]:
    """Projected image tokens, through the model's own code."""
    if hasattr(model.model, "visual"):
        n = pictures.shape[0] // (2 * GRID) ** 2
        grid = torch.tensor([[1, 2 * GRID, 2 * GRID]]).expand(n, 3)
        features = model.model.get_image_features(pictures, grid).pooler_output
    else:
        features = model.model.get_image_features(pictures).pooler_output
    return features if isinstance(features, Tensor) else torch.stack(tuple(features))


class Alignment(nn.Module):
    """Training-only heads that tie image tokens to the language model's words and to their place.

    The logits of digits and colours are scaled cosines with the word embeddings, so the image tokens learn to point
    at the words.
    """

    words: Tensor

    def __init__(self, width: int, tokenizer: Any, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.background = nn.Parameter(torch.randn(1, width, generator=generator) * 0.04)
        self.log_scale = nn.Parameter(torch.tensor(2.3))
        self.cells = nn.Parameter(torch.randn(width, 2 * GRID, generator=generator) * 0.04)
        self.inner_cells = nn.Parameter(torch.randn(width, 2 * GRID, generator=generator) * 0.04)
        words = tokenizer.convert_tokens_to_ids([*map(str, range(10)), *COLOURS])
        self.register_buffer("words", torch.tensor(words), persistent=False)

    def place(self, features: Float[Tensor, "image patch d"], cells: Float[Tensor, "d axes"]) -> Tensor:
        """Cross-entropy of row and column, from normalised features."""
        logits = F.layer_norm(features, features.shape[-1:]) @ cells
        row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
        n = len(features)
        return sum(
            F.cross_entropy(part.reshape(-1, GRID), axis.reshape(1, -1).expand(n, -1).reshape(-1))
            for part, axis in zip(logits.split(GRID, -1), (row, column), strict=True)
        )  # type: ignore[return-value]

    def forward(
        self, features: Float[Tensor, "image patch d"], pictures: Pictures, embedding: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The alignment loss, and the share of digits and colours read off correctly.

        Args:
            features: projected image tokens.
            pictures: what they show.
            embedding: the language model's word embeddings.
        """
        words = F.normalize(torch.cat([embedding[self.words], self.background]), dim=-1)
        cosines = F.normalize(features, dim=-1) @ words.T * self.log_scale.clamp(max=4.0).exp()
        digit_logits = torch.cat([cosines[..., :10], cosines[..., -1:]], -1)
        colour_logits = cosines[..., 10:-1]
        owned = pictures.digits >= 0
        digit, colour = pictures.digits[owned], pictures.colours[owned]
        background = digit_logits[~owned]
        loss = (
            F.cross_entropy(digit_logits[owned], digit)
            + F.cross_entropy(colour_logits[owned], colour)
            + 0.05 * F.cross_entropy(background, torch.full((len(background),), 10))
            + 0.3 * self.place(features, self.cells)
        )
        with torch.no_grad():
            right = {
                "digit": (digit_logits[owned][:, :10].argmax(-1) == digit).float().mean().item(),
                "colour": (colour_logits[owned].argmax(-1) == colour).float().mean().item(),
            }
        return loss, right


def _mask(prompt: Prompt, q: Questions, visible: Tensor, both_ways: bool) -> Float[Tensor, "image 1 query key"]:
    """Additive mask: the prompt, then one block for each question."""
    n, per_image, length = q.ids.shape
    before = len(prompt.before)
    total = before + per_image * length
    keep = torch.zeros(n, total, total, dtype=torch.bool)
    block = torch.arange(per_image).repeat_interleave(length)
    order = torch.arange(length).repeat(per_image)
    same = block[:, None] == block[None, :]
    if both_ways:
        real = (torch.arange(length) < q.lengths[..., None]).reshape(n, 1, -1)
        keep[:, :before, :before] = True
        keep[:, before:, before:] = same & real
    else:
        keep[:, :before, :before] = torch.ones(before, before, dtype=torch.bool).tril()
        keep[:, before:, before:] = same & (order[:, None] >= order[None, :])
    keep[:, before:, :before] = True
    image = slice(prompt.image, prompt.image + GRID**2)
    keep[:, image.stop :, image] &= visible[:, None, :]
    return torch.zeros(keep.shape).masked_fill_(~keep, torch.finfo(torch.float32).min)[:, None]


def _separate(prompt: Prompt, q: Questions) -> tuple[Questions, Tensor]:
    """Every question in a row of its own, and the picture of each row."""
    n, per_image, length = q.ids.shape
    rows = Questions(q.ids.reshape(-1, 1, length), q.lengths.reshape(-1, 1), q.answers.reshape(-1, 1), q.kinds)
    return rows, torch.arange(n).repeat_interleave(per_image)


def answer_logits(
    model: Any,
    prompt: Prompt,
    features: Float[Tensor, "image patch d"],
    q: Questions,
    visible: Tensor | None = None,
    *,
    both_ways: bool = False,
    separate: bool = False,
    inner: int | None = None,
) -> tuple[Float[Tensor, "image question vocabulary"], Tensor | None]:
    """Logits of the answers to all questions about all pictures.

    Args:
        model: one of the embedded models.
        prompt: its prompt.
        features: projected image tokens.
        q: the questions.
        visible: image tokens that text may attend to, (image, patch); default all.
        both_ways: attention within the prompt and within each question runs both ways (PaliGemma).
        separate: one row for each question, with the prompt attending to the question too: exact for PaliGemma.
        inner: also return the hidden states of the image tokens after so many layers.
    """
    shape = q.answers.shape
    if separate:
        q, picture = _separate(prompt, q)
        features, visible = features[picture], None if visible is None else visible[picture]
    n, per_image, length = q.ids.shape
    visible = torch.ones(n, GRID**2, dtype=torch.bool) if visible is None else visible
    embed = model.get_input_embeddings()
    before = embed(prompt.before)[None].expand(n, -1, -1)
    end = prompt.image + GRID**2
    embeds = torch.cat([before[:, : prompt.image], features, before[:, end:], embed(q.ids.reshape(n, -1))], 1)
    positions = torch.cat(
        [prompt.positions, (prompt.start + torch.arange(length)).repeat(len(prompt.positions), per_image)], 1
    )
    positions = positions[:, None].expand(-1, n, -1)
    mask = _mask(prompt, q, visible, both_ways or separate)
    if separate:  # the prompt reads the question, as in the model's own prefix
        real = torch.arange(length) < q.lengths
        mask[:, 0, : len(prompt.before), len(prompt.before) :] = torch.where(real, 0.0, torch.finfo(torch.float32).min)[
            :, None
        ]
    out = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions if len(positions) > 1 else positions[0],
        use_cache=False,
        output_hidden_states=inner is not None,
    )
    last = len(prompt.before) + torch.arange(per_image) * length + q.lengths - 1
    hidden = out.last_hidden_state.gather(1, last[..., None].expand(-1, -1, embeds.shape[-1]))
    states = None if inner is None else out.hidden_states[inner][:, prompt.image : end]
    return model.lm_head(hidden).reshape(*shape, -1), states
