"""Examples from POPE, VQA-style files, Hugging Face data sets and digit scenes, and scorers for their answers."""

from typing import TYPE_CHECKING, Any

# the readers are imported at once: a lazy `pope` would give the module of that name to whoever imported it first
from interp_vlm.data import scorers
from interp_vlm.data.example import Example, Examples, Skipped
from interp_vlm.data.files import files
from interp_vlm.data.hub import hub
from interp_vlm.data.pope import pope
from interp_vlm.data.sources import load

if TYPE_CHECKING:
    from interp_vlm.data.digits import Pair, digit_pairs, digit_scenes

__all__ = [
    "Example",
    "Examples",
    "Pair",
    "Skipped",
    "digit_pairs",
    "digit_scenes",
    "files",
    "hub",
    "load",
    "pope",
    "scorers",
]


def __getattr__(name: str) -> Any:
    if name in ("Pair", "digit_pairs", "digit_scenes"):  # scikit-learn comes with them
        from interp_vlm.data import digits

        return getattr(digits, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
