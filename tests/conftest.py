"""What every test shares: one thread, no network, the same hypothesis examples on every machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch
from hypothesis import settings

import tests.typecheck  # noqa: F401  (jaxtyping's import hook imports `tests` alone)

torch.set_num_threads(1)

settings.register_profile("interp_vlm", deadline=None, derandomize=True)
settings.load_profile("interp_vlm")


def pytest_collection_modifyitems(items):
    """Names with a memory address differ between workers, which then refuse to share the tests out."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    assert not unstable, f"give these parameters ids: {unstable[:3]}"
