"""A bound on the memory of a worker, kept by its operating system."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from interp_vlm.errors import InterpVLMError, InterventionError, ModelError, StudyError

__all__ = ["REMEDY", "TooLittleMemory", "bounded", "in_bytes", "in_words", "spare"]

REMEDY = "raise --memory-per-worker, choose fewer --workers or a smaller --batch-size, and go on with --resume"

RESERVE = 32 * 2**20  # bytes for pages of libraries that are not read yet


class TooLittleMemory(StudyError):
    """A task that needed more memory than its process may hold."""


def in_bytes(size: str | int) -> int:
    """A size such as "2GiB" in bytes.

    Raises:
        StudyError: for anything else.

    Example:
        >>> in_bytes("2GiB") == 2 * 2**30
        True
    """
    import torch

    from interp_vlm.engine.memory import budget

    try:
        return budget(size, torch.device("cpu"))
    except InterventionError as error:
        raise StudyError(f"memory_per_worker is {size!r}", expected="bytes, or a size such as '2GiB'") from error


def in_words(size: int) -> str:
    """Bytes as GiB.

    Example:
        >>> in_words(2**30)
        '1.00 GiB'
    """
    return f"{size / 2**30:.2f} GiB"


def spare(limit: int) -> int:
    """Bytes that this process has set aside and not used, chiefly stacks of threads; for one that has done nothing yet.

    Raises:
        StudyError: on other systems than Linux, and where this process holds more already.
    """
    if not sys.platform.startswith("linux"):
        raise StudyError(
            f"memory_per_worker on {socket.gethostname()}, which is no Linux",
            expected="a system that can bound the memory of a process",
            remedy="leave --memory-per-worker out",
        )
    from interp_vlm.engine.memory import held

    now = held()
    if now["VmRSS"] >= limit:
        raise StudyError(
            f"memory_per_worker is {in_words(limit)}, and a worker without a model holds {in_words(now['VmRSS'])}",
            remedy="raise --memory-per-worker",
        )
    return now["VmData"] - now["RssAnon"]


@contextmanager
def bounded(limit: int | None, unused: int = 0) -> Iterator[None]:
    """Inside, refuse this process memory beyond a bound, and turn whatever says that memory ran out into one error.

    Linux counts what a process may write (RLIMIT_DATA), from the moment that it is set aside, used or not: it may be
    refused more while it holds some hundred MiB less. Added are the pages of the files that it has read, such as
    libraries, as many as there are on entering.

    Args:
        limit: bytes; None for no bound.
        unused: what was set aside before and will not be used.

    Raises:
        TooLittleMemory: in place of any error that says so.
    """
    if limit is not None:
        import resource

        from interp_vlm.engine.memory import held

        before = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = max(0, limit + unused - held()["RssFile"] - RESERVE)
        least = min([wanted, *(each for each in before if each != resource.RLIM_INFINITY)])
        resource.setrlimit(resource.RLIMIT_DATA, (least, before[1]))
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    finally:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)
    if failed is None:
        return
    cause = _out_of_memory(failed)  # which itself takes memory
    if cause is None:
        raise failed
    bound = "" if limit is None else f" of {in_words(limit)}"
    why = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    raise TooLittleMemory(
        f"a worker's memory{bound} on {socket.gethostname()} is too little ({why})", remedy=REMEDY
    ) from None


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """The error that says so, among those that led to this one; other errors of this library speak for themselves."""
    from interp_vlm.engine.memory import out_of_memory

    if isinstance(error, InterpVLMError) and not isinstance(error, ModelError):
        return None
    while error is not None and not (out_of_memory(error) or _unmapped(error)):
        error = error.__cause__ or error.__context__
    return error


def _unmapped(error: BaseException) -> bool:
    """Whether there was no room for a library, or for anything else that the system itself hands out."""
    if isinstance(error, ImportError):
        return "failed to map segment" in str(error) or "annot allocate memory" in str(error)
    return isinstance(error, OSError) and error.errno == errno.ENOMEM
