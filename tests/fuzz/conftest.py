"""Reports how many cases were tried, and how long that took."""

from __future__ import annotations

from typing import Any

from tests.fuzz.cases import seconds, tried


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not tried:  # another process ran them
        return
    for name, count in tried.items():
        terminalreporter.write_line(f"{count:>7} cases in {seconds[name]:6.1f} s  {name}")
    terminalreporter.write_line(f"{sum(tried.values()):>7} cases in {sum(seconds.values()):6.1f} s  in all")
