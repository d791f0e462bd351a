"""Models whose weights lie on several devices, in memory or on the disk: where their inputs and results lie."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from nnsight import NNsight
from torch import Tensor, nn

__all__ = ["Copies", "Wrapped", "input_device", "returned", "weights"]


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model belong: the device of its first weights, or where accelerate runs its first layer.

    Weights that wait in memory or on the disk look as if they were nowhere; only accelerate's hooks know their device.
    """
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
    return next(model.parameters()).device


class Copies:
    """A tensor that meets values on several devices: copied to each of them once.

    Example:
        >>> Copies(torch.tensor([3, 4])).on(torch.device("cpu"))
        tensor([3, 4])
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._by_device = value, {value.device: value}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if (found := self._by_device.get(device)) is None:
            found = self._by_device[device] = self._value.to(device)
        return found


def returned(module: nn.Module, value: Tensor) -> Tensor:
    """What a module makes of a value, brought back from where its weights lie to where the value does."""
    return module(value).to(value.device)


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model with their names, as `named_parameters` gives them, each of them once.

    Those that wait in memory or on the disk are brought in, one after another: use each before the next.
    """
    tied, seen = getattr(model, "all_tied_weights_keys", None) or {}, set[str]()
    for name, weight in list(model.named_parameters()):
        if not weight.is_meta:
            yield name, weight
        elif (same := tied.get(name, name)) not in seen:
            seen.add(same)
            path, _, own = name.rpartition(".")
            with align_module_device(module := model.get_submodule(path)):
                yield name, getattr(module, own)


class Wrapped(NNsight):
    """A model under nnsight, which sends the inputs of a trace where `input_device` says."""

    @property
    def device(self) -> torch.device:
        return input_device(self._module)
