"""Where the parts of a model are to lie: `device_map` and its companions, checked before a long load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp_vlm.errors import ModelError

__all__ = ["check_placement", "computes_on_cpu"]

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate works out."""


def check_placement(
    device_map: Any, max_memory: Mapping[int | str, int | str] | None, offload_folder: str | os.PathLike[str] | None
) -> None:
    """Refuse a device map that cannot be followed here, in words that name its entry.

    Args:
        device_map: as for `from_pretrained`: a device, a plan such as "auto", or a place for each part of the model.
        max_memory: how much each device may take, in bytes or as "10GiB".
        offload_folder: where weights for the disk go that are not read from the checkpoint itself.

    Raises:
        ModelError: for a place that does not exist here, a part put on the disk inside another that is not, a size
            that is none, a folder that cannot be made, or companions without a device map.
    """
    if device_map is None:
        for name, value in {"max_memory": max_memory, "offload_folder": offload_folder}.items():
            if value is not None:
                raise ModelError(f"{name}= without device_map=", expected="both", remedy="pass device_map='auto'")
        return
    places = device_map if isinstance(device_map, Mapping) else {"": device_map}
    if not (isinstance(device_map, str) and device_map in PLANS):
        for part, place in places.items():
            _check_place(place, f"device_map puts {part!r} on {place!r}" if part else f"device_map is {place!r}")
    _refuse_nested(places)
    for device, size in (max_memory or {}).items():
        if device not in ("cpu", "disk"):
            _check_place(device, f"max_memory names {device!r}")
        _check_size(device, size)
    if offload_folder is not None:
        try:
            Path(offload_folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(
                f"offload_folder {os.fspath(offload_folder)} cannot be made ({error.strerror})",
                expected="a folder to write weights to",
            ) from error


def computes_on_cpu(device_map: Any) -> bool:
    """Whether nothing of the map is an accelerator: what lies in memory or on the disk is then computed on the CPU."""
    import torch

    places = device_map.values() if isinstance(device_map, Mapping) else (device_map,)
    return not torch.accelerator.is_available() or {str(place) for place in places} <= {"None", "cpu", "disk"}


def _check_place(place: Any, said: str) -> None:
    import torch

    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    cards = [f"{kind.type}:{number}" for number in range(count)] if kind is not None else []
    here = ", ".join(map(repr, ["cpu", "disk", *cards]))
    if str(place) == "meta":
        raise ModelError(f"{said}, where there are no numbers", expected=here)
    if place in ("cpu", "disk"):
        return
    try:
        device = None if isinstance(place, int) else torch.device(place)
    except (RuntimeError, TypeError):
        raise ModelError(said, expected=f"{here}, or one of {', '.join(map(repr, PLANS))} for the whole") from None
    if device is not None and device.type == "cpu":
        return
    number = place if device is None else device.index or 0
    if number >= count or (device is not None and kind is not None and device.type != kind.type):
        raise ModelError(
            f"{said}, which this machine does not have",
            expected=here,
            remedy="" if cards else "install PyTorch for your accelerator, or leave device_map out",
        )


def _refuse_nested(places: Mapping[str, Any]) -> None:
    """Weights on the disk inside a part that is elsewhere would be asked for before they are read."""
    for outer, place in places.items():
        for inner, other in places.items():
            inside = inner != outer and (outer == "" or inner.startswith(f"{outer}."))
            if inside and place != other and "disk" in (place, other):
                raise ModelError(
                    f"device_map puts {inner!r} on {other!r} and {outer or 'the whole model'!r}, which holds it, on "
                    f"{place!r}",
                    expected="parts beside each other where one is on the disk",
                    remedy=f"in place of {outer!r} name the other parts that it holds",
                )


def _check_size(device: Any, size: Any) -> None:
    from accelerate.utils import convert_file_size_to_int

    try:
        convert_file_size_to_int(size)
    except ValueError:
        raise ModelError(f"max_memory of {device!r} is {size!r}", expected="bytes, or a size such as '10GiB'") from None
