"""Starting points of the weights that shorten the training: nothing here is needed to use a trained model."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp_vlm.testbed.build import GRID
from interp_vlm.testbed.objectives import image_features

__all__ = ["balance_gemma", "match_content", "place_patches"]


@torch.no_grad()
def match_content(model: Any) -> None:
    """Let half of the heads of every decoder layer attend to equal content and copy it: W_q = W_k, W_o = W_v^T / 2.

    Compositional yes/no questions sit on a long plateau from random weights; heads that already compare contents
    leave it early.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        size = attention.head_dim
        heads = attention.q_proj.out_features // size
        groups = attention.k_proj.out_features // size
        for head in range(0, heads, 2):
            group = head * groups // heads
            mine, shared = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
            attention.q_proj.weight[mine] = attention.k_proj.weight[shared]
            attention.o_proj.weight[:, mine] = 0.5 * attention.v_proj.weight[shared].T


def _sinusoid(width: int) -> Float[Tensor, "patch d"]:
    """Two-dimensional sinusoid over the grid: the first half of the width for rows, the second for columns."""
    frequencies = 1 / 10 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], -1)
    rows, columns = axis[:, None].expand(-1, GRID, -1), axis[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], -1).reshape(GRID**2, width)


@torch.no_grad()
def place_patches(model: Any) -> None:
    """Start learned vision positions as a two-dimensional sinusoid of amplitude 0.4; Qwen2-VL's are rotary."""
    if hasattr(model.model, "visual"):
        return
    table = model.model.vision_tower.embeddings.position_embedding.weight
    table[-(GRID**2) :] = 0.4 * _sinusoid(table.shape[1])


@torch.no_grad()
def balance_gemma(model: Any, pictures: Tensor) -> float:
    """Bring Gemma's scaled word embeddings and the image tokens to the proportion in which the other families train.

    Gemma multiplies embeddings by sqrt(d), which drowns small image features. Embeddings shrink by that factor, the
    final norm's gain
    grows by it (the head is tied), and the projector is scaled so that image tokens have a root mean square of 20.

    Returns:
        The factor by which the embeddings' learning rate must shrink as well.
    """
    width = model.config.text_config.hidden_size
    model.get_input_embeddings().weight.mul_(width**-0.5)
    model.model.language_model.norm.weight.fill_(math.sqrt(width) - 1)  # Gemma's gain is 1 + weight
    scale = 20 / image_features(model, pictures).pow(2).mean().sqrt()
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.mul_(scale)
    return width**-0.5
