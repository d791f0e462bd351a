"""How many cases a property is tried on: a few among the tests, and the share of FUZZ_CASES that `make fuzz` sets."""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings

from interp_vlm.errors import InterpVLMError

__all__ = ["cases", "one_line", "seconds", "tried"]

CASES = int(os.environ.get("FUZZ_CASES", "0"))
FEW = 20
"""Cases of each property where no number was asked for."""

tried: Counter[str] = Counter()
seconds: Counter[str] = Counter()


def cases(share: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Try a property on its share of the cases, new ones at each run; where no number was asked for, on the same few.

    Put it above `@given`.
    """
    asked = settings(
        max_examples=max(1, round(share * CASES)) if CASES else FEW,
        derandomize=not CASES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    def counted(test: Any) -> Any:
        name, inner = test.__name__, test.hypothesis.inner_test

        @functools.wraps(inner)
        def count(*args: Any, **kwargs: Any) -> None:
            tried[name] += 1
            began = time.perf_counter()
            try:
                inner(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - began

        test.hypothesis.inner_test = count
        return asked(test)

    return counted


@contextmanager
def one_line(*kinds: type[InterpVLMError]) -> Iterator[None]:
    """What happens here may also end with a typed error, whose message is one printable line; with nothing else."""
    try:
        yield
    except kinds as error:
        message = str(error)
        if not message.isprintable() or len(message) > 5000:
            raise AssertionError(f"not one readable line: {message!r}") from error
