"""Optimisers of the training and their state on disk."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["Rates", "load_state", "optimisers", "read_facts", "save_state", "schedule"]


@dataclass(frozen=True)
class Rates:
    """Learning rates of matrices (Muon) and of everything else (AdamW), and a factor on that of the word embeddings."""

    matrices: float
    others: float
    embeddings: float = 1.0


def optimisers(model: nn.Module, heads: nn.Module, rates: Rates) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the model; AdamW on embeddings, kernels, norms, biases and training-only heads."""
    matrices, kernels, words, vectors = [], [], [], []
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            words.append(parameter)
        elif parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
            matrices.append(parameter)
        else:
            (kernels if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [
        {"params": kernels, "weight_decay": 0.01},
        {"params": vectors, "weight_decay": 0.0},
        {
            "params": words,
            "lr": rates.others * rates.embeddings,
            "weight_decay": 0.01 if rates.embeddings == 1 else 0.0,
        },
        {"params": list(heads.parameters()), "weight_decay": 0.0},
    ]
    pair = [
        torch.optim.Muon(matrices, lr=rates.matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rates.others, betas=(0.9, 0.98), fused=True),
    ]
    for optimiser in pair:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return pair


def schedule(optimiser: torch.optim.Optimizer, step: int, steps: int, warm_up: int) -> None:
    """Set the learning rates for a step: linear warm-up, then a cosine down to 3 %."""
    if step < warm_up:
        factor = (step + 1) / warm_up
    else:
        factor = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor


def save_state(
    path: Path, step: int, modules: dict[str, nn.Module], pair: list[torch.optim.Optimizer], facts: dict[str, Any]
) -> None:
    """Write a checkpoint, in one step that leaves either the old file or the new one."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        tensors |= {f"{prefix}.{name}": parameter.detach() for name, parameter in module.named_parameters()}
    for k, optimiser in enumerate(pair):
        for j, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{k}.{j}.{key}": value for key, value in state.items()}
    temporary = path.with_suffix(".tmp")
    save_file(
        {key: value.clone().contiguous() for key, value in tensors.items()},
        temporary,
        metadata={"step": str(step), "facts": json.dumps(facts)},
    )
    temporary.replace(path)


def read_facts(path: Path) -> dict[str, Any]:
    """The facts saved with a checkpoint."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["facts"])


def load_state(
    path: Path, modules: dict[str, nn.Module]
) -> tuple[int, dict[str, Any], dict[int, dict[int, dict[str, Tensor]]]]:
    """Read a checkpoint into modules.

    Returns:
        The number of finished steps, the facts saved with it, and the states of the optimisers by parameter number.
    """
    states: dict[int, dict[int, dict[str, Tensor]]] = {}
    with safe_open(path, "pt") as file, torch.no_grad():
        metadata = file.metadata()
        parameters = {
            f"{prefix}.{name}": p for prefix, module in modules.items() for name, p in module.named_parameters()
        }
        for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            if key.startswith("optimiser."):
                _, k, j, field = key.split(".")
                states.setdefault(int(k), {}).setdefault(int(j), {})[field] = file.get_tensor(key)
            else:
                parameters[key].copy_(file.get_tensor(key))
    return int(metadata["step"]), json.loads(metadata["facts"]), states
