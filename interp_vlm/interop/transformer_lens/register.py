"""Making this library's adapters known to TransformerLens, without taking the place of any that it has."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from interp_vlm.errors import ModelError

__all__ = ["ADAPTERS", "adapter_for", "register"]

ADAPTERS: dict[str, str] = {
    "Gemma3ForConditionalGeneration": "Gemma3Adapter",
    "Idefics3ForConditionalGeneration": "Idefics3Adapter",
    "InternVLForConditionalGeneration": "InternVLAdapter",
    "LlavaForConditionalGeneration": "LlavaAdapter",
    "LlavaNextForConditionalGeneration": "LlavaNextAdapter",
    "LlavaOnevisionForConditionalGeneration": "LlavaOnevisionAdapter",
    "PaliGemmaForConditionalGeneration": "PaliGemmaAdapter",
    "Qwen2VLForConditionalGeneration": "Qwen2VLAdapter",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2_5VLAdapter",
    "Qwen3VLForConditionalGeneration": "Qwen3VLAdapter",
    "SmolVLMForConditionalGeneration": "SmolVLMAdapter",
}
"""Classes of `interp_vlm.interop.transformer_lens.families` by the architecture that they are for."""


def adapter_for(architecture: str) -> Any:
    """This library's adapter class for a Hugging Face class.

    Raises:
        ModelError: for an architecture without one, or where TransformerLens is not installed.

    Example:
        >>> adapter_for("PaliGemmaForConditionalGeneration").__name__
        'PaliGemmaAdapter'
    """
    if architecture not in ADAPTERS:
        raise ModelError(
            f"no TransformerLens adapter for {architecture}",
            expected=", ".join(ADAPTERS),
            remedy="use vlm.run, vlm.capture or vlm.trace, which take every family of the table",
        )
    if importlib.util.find_spec("transformer_lens") is None:
        raise ModelError("TransformerLens is not installed", remedy="pip install 'transformer-lens>=4.3,<5'")
    return getattr(importlib.import_module("interp_vlm.interop.transformer_lens.families"), ADAPTERS[architecture])


def register(replace: Iterable[str] = ()) -> tuple[str, ...]:
    """Make `TransformerBridge.boot_transformers` take the architectures that TransformerLens has no adapter for.

    An installed entry point brings the adapters as far as TransformerLens' factory. `boot_transformers` looks an
    architecture up in two other tables before it asks the factory; those are filled in here. What TransformerLens, or
    another package, has registered already stays as it is, unless it is named in `replace`.

    Args:
        replace: architectures whose registered adapter gives way to this library's, for every later boot in this
            process: for example "Qwen2_5_VLForConditionalGeneration", for an attention pattern that can be edited.

    Returns:
        The architectures that this call added or replaced; nothing where TransformerLens is not installed.

    Raises:
        ModelError: for an architecture in `replace` that this library has no adapter for.

    Example:
        >>> _ = register()
        >>> register()
        ()
    """
    replace = (replace,) if isinstance(replace, str) else tuple(replace)
    if importlib.util.find_spec("transformer_lens") is None:
        return ()
    chosen = {architecture: adapter_for(architecture) for architecture in replace}
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )
    from transformer_lens.utilities.architectures import MULTIMODAL_ARCHITECTURES

    # First, because TransformerLens warns of an entry point whose name is taken by the time that it looks.
    ArchitectureAdapterFactory.discover_entry_points()
    known = ArchitectureAdapterFactory._adapters
    for architecture in ADAPTERS:
        if architecture not in SUPPORTED_ARCHITECTURES:
            chosen.setdefault(architecture, known.get(architecture) or adapter_for(architecture))
    changed = tuple(name for name, adapter in chosen.items() if SUPPORTED_ARCHITECTURES.get(name) is not adapter)
    for architecture in changed:
        ArchitectureAdapterFactory.register_adapter(architecture, chosen[architecture])
        SUPPORTED_ARCHITECTURES[architecture] = chosen[architecture]
        MULTIMODAL_ARCHITECTURES.add(architecture)
    return changed
