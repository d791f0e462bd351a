"""Layers whose hooks take effect, for any TransformerLens adapter of a family in this library's table.

TransformerLens 4.3 calls the input of the norm before the MLP `hook_resid_mid`. A hook there sees the right value, but
what it returns reaches the MLP alone: the layer still adds the old value back as the residual. And where its adapter
leaves attention to Hugging Face (Qwen2.5-VL, Qwen3-VL), `hook_pattern` and `hook_attn_scores` are called after the
fact: edits are dropped with a warning. In the vision tower, LLaVA reads the states that Hugging Face recorded, and it
records what a layer computed, not what TransformerLens' `hook_out` around that layer made of it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, ClassVar

from torch import Tensor, nn
from transformer_lens.model_bridge import ArchitectureAdapter, BlockBridge, LinearBridge, TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.utilities.attn_implementation import force_eager_attention

from interp_vlm.models.anatomy import Anatomy, describe

__all__ = ["EditableHooks", "TowerLayer", "VLMBridge"]

_MID = "resid_mid"


class EditableHooks(ArchitectureAdapter):
    """Mixed in before an adapter: the model goes on with what hooks on its layers return.

    The names inside a layer come from the `Anatomy` of the loaded model, so a layout that the table does not know is a
    `ModelError` and never a wrong number.

    Example:
        >>> from interp_vlm.interop.transformer_lens.families import PaliGemmaAdapter
        >>> issubclass(PaliGemmaAdapter, EditableHooks)
        True
    """

    # TransformerLens asks for torchvision, which Hugging Face's processors may need; a loaded model does not.
    required_libraries: ClassVar[list[str]] = []

    def prepare_model(self, hf_model: Any) -> None:
        """Called by TransformerLens before it puts its own modules in place; changes the layers of `hf_model`."""
        super().prepare_model(hf_model)
        force_eager_attention(hf_model)
        anatomy = describe(hf_model)
        self.cfg.rmsnorm_uses_offset = anatomy.norm == "gemma_rms"
        self.components["blocks"] = self._blocks(anatomy)
        for layer in hf_model.get_submodule(anatomy.layers):
            _name_resid_mid(layer, anatomy)
        tower = self.components["vision_encoder"].submodules
        if "encoder_layers" in tower:
            theirs = tower["encoder_layers"]
            tower["encoder_layers"] = TowerLayer(theirs.name, self.cfg, theirs.submodules)
            tower["encoder_layers"].hook_aliases = theirs.hook_aliases

    def _blocks(self, names: Anatomy) -> BlockBridge:
        norms = {
            "ln1": "input_layernorm",
            "ln1_post": _norm_after(names.attn, names.attn_out),
            "ln2": names.resid_mid,
            "ln2_post": _norm_after(names.mlp, names.mlp_out),
        }
        inside = {"q_norm": names.q_norm, "k_norm": names.k_norm}
        projections = {"q": names.q, "k": names.k, "v": names.v, "o": names.o}
        attn = PositionEmbeddingsAttentionBridge(
            name=names.attn,
            config=self.cfg,
            submodules={part: LinearBridge(name=name) for part, name in projections.items()} | self._norms(inside),
        )
        return BlockBridge(
            name=names.layers,
            config=self.cfg,
            submodules={
                **self._norms(norms),
                "attn": attn,
                _MID: GeneralizedComponent(name=_MID),
                "mlp": self._gated_mlp(names.mlp, down=names.down),
            },
            hook_alias_overrides={"hook_resid_mid": f"{_MID}.hook_out"},
        )

    def _norms(self, names: dict[str, str | None]) -> dict[str, GeneralizedComponent]:
        return {part: RMSNormalizationBridge(name=name, config=self.cfg) for part, name in names.items() if name}


class TowerLayer(GeneralizedComponent):
    """A vision layer whose `hook_out` is called before Hugging Face records the layer's output."""

    is_list_item: bool = True

    def __init__(
        self, name: str | None, config: Any, submodules: dict[str, GeneralizedComponent] | None = None
    ) -> None:
        super().__init__(name, config, submodules)
        self.hook_aliases = {"hook_resid_pre": "hook_in", "hook_resid_post": "hook_out"}

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        original_component.register_forward_hook(self._write, prepend=True)

    def _write(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return (self.hook_out(output[0]), *output[1:]) if isinstance(output, tuple) else self.hook_out(output)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.original_component is not None
        return self.original_component(self.hook_in(hidden_states), *args, **kwargs)


class VLMBridge(TransformerBridge):
    """A bridge that leaves the positions of padded examples to the model, as a call of the model itself does.

    TransformerLens counts positions from the first token that is not padding. Under rotary embeddings, which know
    distances alone, that changes nothing but the last digits.
    """

    def _accepts_derived_position_ids(self) -> bool:
        return False


def _norm_after(module: str, written: str) -> str | None:
    """The norm between a module and the stream, in layers that have one."""
    return None if written == module else written


def _name_resid_mid(layer: Any, names: Anatomy) -> None:
    """Give the stream between attention and MLP a module of its own, which passes it on as it is."""
    attn_norm, mlp_norm = _norm_after(names.attn, names.attn_out), _norm_after(names.mlp, names.mlp_out)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # Modules are looked up at each call: the bridge puts its own in their places.
        attended = getattr(self, names.attn)(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        attended = attended if attn_norm is None else getattr(self, attn_norm)(attended)
        middle = getattr(self, _MID)(hidden_states + attended)
        written = getattr(self, names.mlp)(getattr(self, names.resid_mid)(middle))
        return middle + (written if mlp_norm is None else getattr(self, mlp_norm)(written))

    layer.add_module(_MID, nn.Identity())
    layer.forward = MethodType(forward, layer)
