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
