"""TransformerLens without torchvision, which no model here needs."""

import pytest
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.sources.transformers import helpers


@pytest.fixture(autouse=True)
def torchvision_is_neither_asked_for_nor_installed(monkeypatch):
    """Its own adapter of Qwen2.5-VL asks for it, and booting installs it and so another torch."""
    monkeypatch.setattr(ArchitectureAdapter, "_check_required_libraries", lambda self: None)
    monkeypatch.setattr(helpers, "_ensure_torchvision", lambda: False)
