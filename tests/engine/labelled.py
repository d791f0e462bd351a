"""Devices that are labels: values in ordinary memory that behave as if they lay on `lazy:0`, `lazy:1`, and so on.

PyTorch knows the device type "lazy" without having anything to run on it, so that a tensor may say that it lies there.
Inside `labelled_devices()` moving a tensor there, or making one there, gives a `Labelled` tensor, which computes in
ordinary memory by the ordinary kernels. As on CUDA, an operation whose tensors lie on different devices raises, and so
does `.numpy()`; what CUDA lets pass passes: copies, single numbers on the CPU, and indices on the CPU. Models are moved
and hooked by accelerate as for cards, and their results can be compared bit for bit with those of the plain model.

What this does not show: anything about CUDA's own kernels, streams and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Labelled", "labelled_devices"]

_CPU, _LABEL = torch.device("cpu"), "lazy"
_aten = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)


class Labelled(Tensor):
    """A tensor in ordinary memory, `held`, that says it lies on another device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate's `type(weight)(value)`, for a weight that is moved once more
            return torch.nn.Parameter(held, requires_grad)
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=device, requires_grad=requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Labelled({self.held!r}, {self.device})"


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation in ordinary memory, its result labelled as that of a real device would be."""
    asked = kwargs.get("device")
    device = _common(func, args, kwargs) if asked is None else torch.device(asked)
    named = {name: _plain(value) for name, value in kwargs.items()}
    if asked is not None and device.type == _LABEL:
        named["device"] = _CPU
    found = func(*map(_plain, args), **named)
    if args and isinstance(args[0], Labelled) and found is args[0].held:  # made in place
        return args[0]
    if device.type != _LABEL:
        return found
    return [_labelled(each, device) for each in found] if isinstance(found, list | tuple) else _labelled(found, device)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [each.held if isinstance(each, Labelled) else each for each in value]
    return value.held if isinstance(value, Labelled) else value


def _labelled(value: Any, device: torch.device) -> Any:
    return Labelled(value, device) if isinstance(value, Tensor) else value


def _common(func: Any, args: Any, kwargs: Any) -> torch.device:
    """The device of an operation's tensors.

    Raises:
        RuntimeError: in CUDA's words, where they lie on several and CUDA would not have it.
    """
    if func is _aten.copy_.default:
        return args[0].device
    found: torch.device | None = None
    for number, value in enumerate((*args, *kwargs.values())):
        for each in value if isinstance(value, list | tuple) else (value,):
            # A single number on the CPU may meet tensors on any device, and so may indices on the CPU.
            if not isinstance(each, Tensor) or (each.device == _CPU and (each.dim() == 0 or _indexes(func, number))):
                continue
            if found is not None and each.device != found:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"{found} and {each.device}! (in {func})"
                )
            found = each.device
    return found or _CPU


def _indexes(func: Any, number: int) -> bool:
    return number == 1 and func in _INDEXED


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Filled(TorchFunctionMode):
    """What is filled from Python's numbers beneath every dispatcher is filled in ordinary memory, and then moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or _CPU).type == _LABEL:
            return func(*map(_plain, args), **{**kwargs, "device": _CPU}).to(kwargs["device"])
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Labelled):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def labelled_devices() -> Iterator[None]:
    """Devices `lazy:0`, `lazy:1`, and so on exist inside this block."""
    with _Dispatch(), _Filled():
        yield
