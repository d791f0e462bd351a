"""One TransformerLens adapter for each family: the vision side as TransformerLens has it, decoder hooks that edit."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import (
    Qwen3_5VisionBlockBridge,
    Qwen3_5VisionEncoderBridge,
)
from transformer_lens.model_bridge.supported_architectures.gemma3_multimodal import Gemma3MultimodalArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.idefics3 import Idefics3ArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.llava_next import LlavaNextArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.llava_onevision import LlavaOnevisionArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import Qwen2_5_VLArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen3_vl import Qwen3VLArchitectureAdapter

from interp_vlm.interop.transformer_lens.editable import EditableHooks, TowerLayer

__all__ = [
    "Gemma3Adapter",
    "Idefics3Adapter",
    "InternVLAdapter",
    "LlavaAdapter",
    "LlavaNextAdapter",
    "LlavaOnevisionAdapter",
    "PaliGemmaAdapter",
    "Qwen2VLAdapter",
    "Qwen2_5VLAdapter",
    "Qwen3VLAdapter",
    "SmolVLMAdapter",
]


class PaliGemmaAdapter(EditableHooks, LlavaArchitectureAdapter):
    """PaliGemma 1 and 2: SigLIP and a linear projector where LLaVA has them; Gemma's or Gemma 2's layers."""


class Qwen2VLAdapter(EditableHooks, Qwen2_5_VLArchitectureAdapter):
    """Qwen2-VL: Qwen2.5-VL's decoder; in the vision tower an ungated MLP."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        mlp = GeneralizedComponent(
            name="mlp", submodules={"in": LinearBridge(name="fc1"), "out": LinearBridge(name="fc2")}
        )
        self.components["vision_encoder"] = Qwen3_5VisionEncoderBridge(
            name="model.visual",
            config=self.cfg,
            submodules={
                "pos_embed": GeneralizedComponent(name="rotary_pos_emb"),
                "blocks": Qwen3_5VisionBlockBridge(name="blocks", submodules={"mlp": mlp}),
            },
        )


class Qwen2_5VLAdapter(EditableHooks, Qwen2_5_VLArchitectureAdapter):
    """Qwen2.5-VL with an editable attention pattern."""


class Qwen3VLAdapter(EditableHooks, Qwen3VLArchitectureAdapter):
    """Qwen3-VL with an editable attention pattern."""


class LlavaAdapter(EditableHooks, LlavaArchitectureAdapter):
    """LLaVA-1.5 with an editable `hook_resid_mid`."""


class LlavaNextAdapter(EditableHooks, LlavaNextArchitectureAdapter):
    """LLaVA-NeXT with an editable `hook_resid_mid`."""


class LlavaOnevisionAdapter(EditableHooks, LlavaOnevisionArchitectureAdapter):
    """LLaVA-OneVision with an editable `hook_resid_mid`."""


class Gemma3Adapter(EditableHooks, Gemma3MultimodalArchitectureAdapter):
    """Gemma 3 with an editable `hook_resid_mid`."""


class Idefics3Adapter(EditableHooks, Idefics3ArchitectureAdapter):
    """Idefics 3 with an editable `hook_resid_mid`."""


class SmolVLMAdapter(EditableHooks, Idefics3ArchitectureAdapter):
    """SmolVLM, which is laid out as Idefics 3."""


class InternVLAdapter(EditableHooks, LlavaArchitectureAdapter):
    """InternVL: laid out as LLaVA, with a vision tower of its own."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.components["vision_encoder"] = GeneralizedComponent(
            name="model.vision_tower",
            config=self.cfg,
            submodules={
                "embeddings": GeneralizedComponent(name="embeddings"),
                "encoder_layers": TowerLayer("encoder.layer", self.cfg),
            },
        )
