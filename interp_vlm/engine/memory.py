"""Memory budgets: what may be kept of a run without interventions, and how many rows fit into one pass."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import torch

from interp_vlm.errors import InterventionError

__all__ = ["DEFAULT", "Budget", "asked_for", "budget", "held", "left_to_process", "out_of_memory", "release"]

Budget = str | int | float | None

DEFAULT = 0.25
"""Share of the device's free memory that captures and packed rows may take when nothing is said."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)
# All that oneDNN, and C++ itself, say on a CPU when there is no room for what they need beside the tensors.
_TERSE = ("could not create a primitive", "could not create a memory object", "std::bad_alloc")
_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def budget(memory: Budget, device: torch.device) -> int:
    """A memory budget in bytes.

    Args:
        memory: bytes as an int, a size such as "4GiB", or a share of the device's free memory as a float below 1;
            a quarter of it when None.
        device: where the model is.

    Raises:
        InterventionError: for anything else.

    Example:
        >>> budget("1.5GiB", torch.device("cpu")) == int(1.5 * 2**30)
        True
    """
    memory = DEFAULT if memory is None else memory
    if isinstance(memory, float) and 0.0 < memory < 1.0:
        return int(memory * _free(device))
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = (
        re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", memory, re.IGNORECASE)
        if isinstance(memory, str)
        else None
    )
    if found is None or float(found[1]) <= 0:
        raise InterventionError(f"memory={memory!r}", expected="bytes, a size such as '4GiB', or a share such as 0.5")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device.

    On GPUs that is `torch.OutOfMemoryError`; CPUs raise a RuntimeError of PyTorch's allocator, or MemoryError.

    Example:
        >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("shapes do not match"))
        (True, False)
    """
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (should_reduce_batch_size(error) or str(error) in _TERSE)


def asked_for(error: BaseException) -> str:
    """How much was asked for when memory ran out, in words; empty where the error does not say.

    Example:
        >>> asked_for(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7733248 bytes."))
        '7.38 MiB'
    """
    found = re.search(r"tried to allocate (\d+(?:\.\d+)?) ([KMGT]?i?B|bytes)", str(error), re.IGNORECASE)
    if found is None:
        return ""
    size = float(found[1]) * _UNITS.get(found[2].upper(), 1)
    unit = next((unit for unit in ("TiB", "GiB", "MiB", "KiB") if size >= _UNITS[unit.upper()]), "B")
    return f"{size / _UNITS[unit.upper()]:.3g} {unit}"


def release() -> None:
    """Give back what is held on devices, and by reference cycles, and used no more."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        # What torch has set aside and does not use is free too, though the driver does not know it.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(psutil.virtual_memory().available, left_to_process())


def left_to_process() -> int:
    """Bytes that this process may still take before its limit on data (`ulimit -d`) stops it; huge without one."""
    if not sys.platform.startswith("linux"):
        return sys.maxsize
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(0, limit - held()["VmData"])


def held() -> dict[str, int]:
    """What this process holds, in bytes, by the names of Linux: VmData, VmRSS, VmHWM and others."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1:] == ["kB"]}
