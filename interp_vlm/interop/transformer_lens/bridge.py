"""A TransformerLens bridge over a loaded model: the same weights, another skeleton."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import nn

from interp_vlm.errors import ModelError
from interp_vlm.interop.transformer_lens.register import adapter_for

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from interp_vlm.vlm import VLM

__all__ = ["to_bridge"]


def to_bridge(vlm: VLM) -> TransformerBridge:
    """A TransformerLens bridge whose weights are the model's own and whose hooks take effect.

    TransformerLens puts its own modules in a model's places and switches it to eager attention. Here it does so to a
    copy of the modules around the same memory: the model that was given stays as it is, and what is written into its
    weights (a training step, another state dict) shows in the bridge. Gradients are the bridge's own, and so are the
    weights that TransformerLens makes when it folds norms into them.

    Args:
        vlm: a loaded model.

    Returns:
        A `TransformerBridge`; call it, `run_with_cache` or `run_with_hooks` with the inputs of a batch, as
        `bridge(**batch.inputs)` with `input_ids` named `input`. Its logits are those of the model in eager attention,
        bit for bit.

    Raises:
        ModelError: for a family without an adapter, weights on several devices, or where TransformerLens is not
            installed.

    Example:
        >>> import interp_vlm as iv
        >>> vlm = iv.load("testbed:paligemma")
        >>> bridge = to_bridge(vlm)
        >>> bridge.cfg.n_layers == vlm.anatomy.n_layers
        True
        >>> theirs, ours = bridge.blocks[0].mlp.out.weight, vlm.model.get_submodule(vlm.anatomy.layers)[0].mlp.down_proj
        >>> theirs.data_ptr() == ours.weight.data_ptr()
        True
    """
    architecture = type(vlm.model).__name__
    kind = adapter_for(architecture)
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf, detect_tokenizer_bos_eos

    from interp_vlm.interop.transformer_lens.editable import VLMBridge

    _refuse_several_devices(vlm)
    model = _skeleton(vlm.model)
    adapter = kind(build_bridge_config_from_hf(model.config, architecture, vlm.name, vlm.dtype))
    adapter.cfg.device = str(vlm.device)
    adapter.prepare_model(model)
    adapter.cfg.tokenizer_prepends_bos, adapter.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(vlm.tokenizer)
    # A copy, because `generate` of a bridge sets the padding side of its tokenizer.
    bridge = VLMBridge(model, adapter, copy.deepcopy(vlm.tokenizer))
    bridge.processor = vlm.processor
    return bridge


def _refuse_several_devices(vlm: VLM) -> None:
    """TransformerLens' own code joins the parts of a model, and does not carry values between devices."""
    if len(devices := sorted({str(weight.device) for weight in vlm.model.parameters() if not weight.is_meta})) > 1:
        raise ModelError(
            f"the weights of {vlm.name} lie on {' and '.join(devices)}",
            expected="one device for TransformerLens",
            remedy="load the model on one device, or use vlm.run and vlm.capture, which follow a device map",
        )


def _skeleton(model: nn.Module) -> nn.Module:
    """The same modules anew, around the same tensors."""
    # Parameters anew too, over the same memory, so that the model's take no part in what happens to the bridge's.
    tensors = {id(weight): _again(weight) for weight in model.parameters()}
    tensors |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, tensors)


def _again(weight: nn.Parameter) -> nn.Parameter:
    # Quantised weights are subclasses with a state of their own: those are shared whole.
    return nn.Parameter(weight.data, weight.requires_grad) if type(weight) is nn.Parameter else weight
