"""Every benchmark of this folder, as one table.

    make bench                      # full sizes, some minutes
    make bench ARGS=--quick         # small sizes, which say little about large ones

A benchmark is a file with `rows(quick) -> list of dict`, each with `what`, `against`, `value`, `low`, `high`, `unit`
and `note`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent


def load(path: Path) -> Any:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def benchmarks() -> list[Path]:
    return sorted(path for path in FOLDER.glob("*.py") if path.stem != "__main__")


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, each value with its spread."""
    found = Table("what", "against", "result", "spread", "note", title="processor time, one thread")
    for row in rows:
        spread = f"{row['low']:.3g} to {row['high']:.3g}"
        found.add_row(row["what"], row["against"], f"{row['value']:.3g} {row['unit']}", spread, row["note"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    options = parser.parse_args()
    rows = [row for path in benchmarks() for row in load(path).rows(options.quick)]
    Console().print(table(rows))


if __name__ == "__main__":
    main()
