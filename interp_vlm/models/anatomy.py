"""Facts about a model: where its parts are, how many there are, and how attention is put together.

A family contributes what all its checkpoints share, its text decoder's row the names inside a layer, and the
configuration of the loaded model the counts. `describe` puts the three together and checks them against the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from interp_vlm.errors import ModelError
from interp_vlm.models.layout import one_row_each

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from interp_vlm.tokens.grid import ImageGrid

__all__ = ["DECODERS", "Anatomy", "Decoder", "Family", "describe"]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Names inside one layer of a text decoder, relative to the layer; names under `attn` and `mlp` relative to those.

    Attention weights are rebuilt from `q` and `k` alike everywhere: split into heads, `q_norm`/`k_norm` where there are
    any, rotate halves with the layer's own `position_embeddings` (cos, sin), scale, soft-cap, add the mask, softmax.

    Attributes:
        resid_mid: the module whose input is the residual stream between attention and MLP.
        attn_out: the module whose output attention adds to the residual stream.
        mlp_out: the module whose output the MLP adds to the residual stream.
        norm: "rms" (gain w), "gemma_rms" (gain 1 + w) or "layer".
        rope: "standard" (one position per token) or "multimodal" (time, row and column); in both, cos and sin reach
            the attention module as `position_embeddings` and are applied by rotating halves.
    """

    attn: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    mlp: str = "mlp"
    down: str = "down_proj"
    resid_mid: str = "post_attention_layernorm"
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    norm: str = "rms"
    rope: str = "standard"


_GEMMA_SANDWICH: dict[str, str] = {
    "resid_mid": "pre_feedforward_layernorm",
    "attn_out": "post_attention_layernorm",
    "mlp_out": "post_feedforward_layernorm",
    "norm": "gemma_rms",
}

DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(),
    "mistral": Decoder(),
    "qwen2": Decoder(),
    "qwen3": Decoder(q_norm="q_norm", k_norm="k_norm"),
    "gemma": Decoder(norm="gemma_rms"),
    "gemma2": Decoder(**_GEMMA_SANDWICH),
    "gemma3_text": Decoder(**_GEMMA_SANDWICH, q_norm="q_norm", k_norm="k_norm"),
    "qwen2_vl_text": Decoder(rope="multimodal"),
    "qwen2_5_vl_text": Decoder(rope="multimodal"),
    "qwen3_vl_text": Decoder(rope="multimodal", q_norm="q_norm", k_norm="k_norm"),
}
"""Layer names by the `model_type` of the text configuration; LLaVA alone is published with four of them."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table of architectures: what every checkpoint of a Hugging Face class shares.

    Attributes:
        name: short name, for example "llava".
        architecture: name of the Hugging Face class.
        prompt: `prompt(processor, question, n_images)`, used where the processor brings no chat template.
        grids: `grids(processor, images, inputs, model_config)`: for each example, the grid of each of its pictures.
        vision_read: `vision_read(model_config)`: the last vision layer whose output the projector reads.
        picture_rows: `picture_rows(inputs, grids)`: for each image tensor, how many of its rows each picture of the
            batch has; tensors that it does not name have one row per example.
        prefix: who may see whom before the answer: "causal", "bidirectional" (PaliGemma's prompt) or "image_blocks"
            (Gemma 3's pictures see themselves).
        fusion: as the studied work (arXiv 2605.08200) uses the words, by how the checkpoints were trained: "late" where
            a projector translates pictures for a language model that was pretrained on text alone, "early" where
            the decoder was pretrained on pictures and text together.
        between_layers: vision features are also added to the residual stream between decoder layers.
        decoders: rows that this family adds to `DECODERS`.
    """

    name: str
    architecture: str
    prompt: Callable[[Any, str, int], str]
    grids: Callable[[Any, list[list[Image]], Mapping[str, Any], Any], list[list[ImageGrid]]]
    vision_read: Callable[[Any], int]
    picture_rows: Callable[[Mapping[str, Tensor], list[ImageGrid]], dict[str, list[int]]] = one_row_each
    decoder: str = "model.language_model"
    layers: str = "model.language_model.layers"
    final_norm: str = "model.language_model.norm"
    head: str = "lm_head"
    vision: str = "model.vision_tower"
    vision_layers: str = "model.vision_tower.encoder.layers"
    projector: str = "model.multi_modal_projector"
    prefix: str = "causal"
    fusion: str = "early"
    between_layers: bool = False
    decoders: Mapping[str, Decoder] | None = None


@dataclass(frozen=True, kw_only=True)
class Anatomy(Decoder):
    """Everything that sites, interventions and plans need to know about one loaded model.

    Module paths are relative to the Hugging Face model, layer names (inherited from `Decoder`) to a decoder layer.

    Attributes:
        vision_read: index of the last vision layer whose output the projector reads (n - 2 for LLaVA-1.5).
        scaling: factor on q . k before the softmax.
        softcap: cap on attention scores, c tanh(s / c), or None.
        final_softcap: the same on the logits, or None.
        layer_kinds: "full_attention" or "sliding_attention" for each decoder layer.
        sliding_window: tokens that a sliding layer sees, or None.

    Example:
        >>> from tests.tiny import build
        >>> anatomy = describe(build("llava")[0])
        >>> anatomy.layers, anatomy.n_heads, anatomy.n_kv_heads, anatomy.vision_read == anatomy.n_vision_layers - 2
        ('model.language_model.layers', 4, 2, True)
    """

    architecture: str
    family: str
    text: str
    decoder: str
    layers: str
    final_norm: str
    head: str
    vision: str
    vision_layers: str
    projector: str
    prefix: str
    fusion: str
    between_layers: bool
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    n_vision_layers: int
    d_vision: int
    vision_read: int
    scaling: float
    softcap: float | None
    final_softcap: float | None
    layer_kinds: tuple[str, ...]
    sliding_window: int | None
    image_token_id: int


_FROM_FAMILY = (
    "architecture",
    "decoder",
    "layers",
    "final_norm",
    "head",
    "vision",
    "vision_layers",
    "projector",
    "prefix",
    "fusion",
    "between_layers",
)


def describe(model: nn.Module) -> Anatomy:
    """Read a loaded model's anatomy off its configuration and check it against its modules.

    Args:
        model: a Hugging Face model of a registered architecture.

    Raises:
        ModelError: for an unknown architecture or text decoder, or modules laid out differently from the table.
    """
    from interp_vlm.models.registry import family_for

    config: Any = model.config
    family = family_for(type(model).__name__)
    text, vision = config.get_text_config(), config.vision_config
    rows = {**DECODERS, **(family.decoders or {})}
    if text.model_type not in rows:
        raise ModelError(
            f"{family.architecture} with a text decoder of type {text.model_type!r} is not in the table",
            expected=", ".join(sorted(rows)),
            remedy="give the family's row a `decoders` entry for it (docs: how to add a family)",
        )
    heads = text.num_attention_heads
    d_head = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    names = asdict(rows[text.model_type])
    anatomy = Anatomy(
        **names,
        **{name: getattr(family, name) for name in _FROM_FAMILY},
        family=family.name,
        text=text.model_type,
        n_layers=text.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        d_head=d_head,
        d_model=text.hidden_size,
        d_mlp=text.intermediate_size,
        d_vocab=text.vocab_size,
        n_vision_layers=vision.num_hidden_layers,
        d_vision=getattr(vision, "embed_dim", None) or vision.hidden_size,
        vision_read=family.vision_read(config),
        scaling=float(getattr(text, "query_pre_attn_scalar", None) or d_head) ** -0.5,
        softcap=getattr(text, "attn_logit_softcapping", None),
        final_softcap=getattr(text, "final_logit_softcapping", None),
        layer_kinds=tuple(kinds),
        sliding_window=getattr(text, "sliding_window", None) if "sliding_attention" in kinds else None,
        image_token_id=config.image_token_id,
    )
    _check(model, anatomy)
    return anatomy


def _check(model: nn.Module, anatomy: Anatomy) -> None:
    """Every path resolves, and the counts of the configuration are those of the modules."""

    def part(path: str, root: nn.Module = model) -> nn.Module:
        try:
            return root.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"{anatomy.architecture} ({anatomy.text}) has no module {path!r}",
                expected=f"the layout of family {anatomy.family!r}",
                remedy="this checkpoint needs a row of its own (docs: how to add a family)",
            ) from None

    for path in (anatomy.decoder, anatomy.final_norm, anatomy.head, anatomy.vision, anatomy.projector):
        part(path)
    layers, vision_layers = part(anatomy.layers), part(anatomy.vision_layers)
    layer = part("0", layers)
    attn, mlp = part(anatomy.attn, layer), part(anatomy.mlp, layer)
    for name in (anatomy.resid_mid, anatomy.attn_out, anatomy.mlp_out):
        part(name, layer)
    for name in filter(None, (anatomy.v, anatomy.q_norm, anatomy.k_norm)):
        part(name, attn)
    found = {
        "n_layers": len(layers),  # type: ignore[arg-type]
        "n_vision_layers": len(vision_layers),  # type: ignore[arg-type]
        "n_heads x d_head": part(anatomy.q, attn).out_features,
        "n_kv_heads x d_head": part(anatomy.k, attn).out_features,
        "d_model": part(anatomy.o, attn).out_features,
        "d_mlp": part(anatomy.down, mlp).in_features,
        "scaling": attn.scaling,
    }
    stated = {
        "n_layers": anatomy.n_layers,
        "n_vision_layers": anatomy.n_vision_layers,
        "n_heads x d_head": anatomy.n_heads * anatomy.d_head,
        "n_kv_heads x d_head": anatomy.n_kv_heads * anatomy.d_head,
        "d_model": anatomy.d_model,
        "d_mlp": anatomy.d_mlp,
        "scaling": anatomy.scaling,
    }
    wrong = [f"{name} is {found[name]}, not {stated[name]}" for name in stated if found[name] != stated[name]]
    if wrong:
        raise ModelError(
            f"the modules of this {anatomy.architecture} contradict its configuration: {'; '.join(wrong)}",
            remedy="load the model from an unmodified checkpoint folder",
        )
