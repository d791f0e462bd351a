"""Models whose weights lie on several devices, in memory or on the disk: where their inputs go."""

from __future__ import annotations

import torch
from nnsight import NNsight
from torch import nn

__all__ = ["Wrapped", "input_device"]


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


class Wrapped(NNsight):
    """A model under nnsight, which sends the inputs of a trace where `input_device` says."""

    @property
    def device(self) -> torch.device:
        return input_device(self._module)
