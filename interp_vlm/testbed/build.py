"""Untrained tiny models of the real classes, each with a real processor and a small word-level tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from interp_vlm.data.digit_canvas import CANVAS, CELL, COLOURS
from interp_vlm.data.digit_questions import NUMBERS
from interp_vlm.errors import ModelError
from interp_vlm.models.processors import load_processor, still
from interp_vlm.testbed import NAMES

__all__ = ["GRID", "WORDS", "Prompt", "build", "build_processor", "load", "prompt", "question_inputs"]

GRID = CANVAS // CELL
"""Image tokens along each side: one for each 8 x 8 cell of the canvas."""

WORDS = (
    *(str(d) for d in range(10)),
    *COLOURS,
    *NUMBERS,
    *("yes", "no", "left", "middle", "right"),
    *("is", "there", "a", "how", "many", "are", "what", "colour", "the", "digit", "where", "of", "?"),
)
"""Every word of the questions and answers."""

_WIDTH, _LAYERS, _HEADS, _MLP = 128, 4, 4, 256
_TEXT: dict[str, Any] = {
    "hidden_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "intermediate_size": _MLP,
    "initializer_range": 0.04,
    "max_position_embeddings": 1024,
}
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
_QWEN2_VL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(
    special: dict[str, str], template: tuple[str, ...], extra: dict[str, str], bos: bool
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, words split at blanks, line breaks and question marks words of their own."""
    words = [*special.values(), *extra.values(), "\n", *template, *WORDS]
    vocabulary = {word: k for k, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(r"\n|\?"), "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    if bos:
        token = special["bos_token"]
        tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=[(token, vocabulary[token])]
        )
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (*special.values(), *extra.values())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, extra_special_tokens=extra, clean_up_tokenization_spaces=False
    )


_GEMMA_STYLE = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
_LLAMA_STYLE = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_QWEN_STYLE = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}


def build_processor(family: str) -> Any:
    """The real processor of a family, sized for digit scenes.

    Args:
        family: one of `interp_vlm.testbed.NAMES`.
    """
    square = {"height": CANVAS, "width": CANVAS}
    if family == "llava":
        return LlavaProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": CANVAS}, crop_size=square),
            _tokenizer(_LLAMA_STYLE, ("user:", "assistant:"), {"image_token": "<image>"}, bos=True),
            patch_size=CELL,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=_LLAVA_TEMPLATE,
        )
    if family == "paligemma":
        images: Any = SiglipImageProcessorPil(size=square)
        images.image_seq_length = GRID**2
        return PaliGemmaProcessor(images, _tokenizer(_GEMMA_STYLE, (), {"image_token": "<image>"}, bos=True))
    if family == "qwen2_vl":
        extra = {
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
            "message_start_token": "<|im_start|>",
        }
        return still(Qwen2VLProcessor)(
            Qwen2VLImageProcessorPil(
                patch_size=CELL // 2, merge_size=2, size={"shortest_edge": CELL**2, "longest_edge": 4 * CANVAS**2}
            ),
            _tokenizer(_QWEN_STYLE, ("user", "assistant"), extra, bos=False),
            chat_template=_QWEN2_VL_TEMPLATE,
        )
    raise ModelError(f"the testbed has no family {family!r}", expected=" or ".join(NAMES), remedy="choose one of them")


def _config(family: str, tokenizer: Any) -> Any:
    ids = tokenizer.convert_tokens_to_ids
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    text = {**_TEXT, **special, "vocab_size": len(tokenizer)}
    if family == "llava":
        return LlavaConfig(
            # four layers of which three are used: the projector reads the last but one, as LLaVA-1.5's does
            vision_config=CLIPVisionConfig(
                hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
                image_size=CANVAS, patch_size=CELL, projection_dim=_WIDTH,
            ),
            text_config=LlamaConfig(**text, num_key_value_heads=_HEADS),
            image_token_index=ids("<image>"),
            image_seq_length=GRID**2,
        )  # fmt: skip
    if family == "paligemma":
        return PaliGemmaConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
                image_size=CANVAS, patch_size=CELL, vision_use_head=False,
            ),
            text_config=GemmaConfig(**text, num_key_value_heads=1, head_dim=_WIDTH // _HEADS),
            image_token_index=ids("<image>"),
            projection_dim=_WIDTH,
            **special,
        )  # fmt: skip
    return Qwen2VLConfig(
        # theta 100 and a long width section: columns of a 7-column grid need usable frequencies
        text_config={
            **text,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 11]},
        },
        vision_config={
            "depth": 2, "embed_dim": 96, "hidden_size": _WIDTH, "num_heads": 4, "mlp_ratio": 4, "patch_size": CELL // 2,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.04,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        **special,
    )  # fmt: skip


_CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "paligemma": PaliGemmaForConditionalGeneration,
    "qwen2_vl": Qwen2VLForConditionalGeneration,
}


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """An untrained model and its processor.

    Args:
        family: one of `interp_vlm.testbed.NAMES`.
        seed: of the random weights.

    Returns:
        The model, in float32 and evaluation mode, and its processor.
    """
    processor = build_processor(family)  # first: PaliGemma's processor adds tokens to the tokenizer
    config = _config(family, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _CLASSES[family](config)
    return model.eval(), processor


def load(folder: str | Path, attn_implementation: str = "sdpa") -> tuple[Any, Any]:
    """A saved model of the testbed, in float32 and evaluation mode, and its processor.

    Args:
        folder: as `interp_vlm.testbed.train` writes it.
        attn_implementation: "sdpa" or "eager".
    """
    family = json.loads((Path(folder) / "config.json").read_text())["model_type"]
    model = _CLASSES[family].from_pretrained(folder, dtype=torch.float32, attn_implementation=attn_implementation)
    return model.eval(), load_processor(folder)


def question_inputs(processor: Any, image: Image.Image, question: str) -> dict[str, Tensor]:
    """One question as the model's own call takes it, in the family's own prompt.

    Example:
        >>> sorted(question_inputs(build_processor("llava"), Image.new("RGB", (56, 56)), "is there a red 7 ?"))
        ['attention_mask', 'input_ids', 'pixel_values']
    """
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    else:
        text = f"{processor.image_token}{question}"
    inputs = processor(images=[image], text=[text])
    inputs.pop("labels", None)
    return dict(inputs.convert_to_tensors("pt"))  # not `return_tensors`: PaliGemma's processor warns about NumPy 2


@dataclass(frozen=True)
class Prompt:
    """The family's prompt around a question, as token ids, with the positions that the model gives them.

    Attributes:
        before: ids up to the question, image tokens included.
        after: ids after the question.
        image: index of the first image token in `before`; the others follow it.
        positions: of `before`; three rows for Qwen2-VL's temporal, row and column positions, else one.
        start: position of the question's first token.
    """

    before: Int[Tensor, " before"]
    after: Int[Tensor, " after"]
    image: int
    positions: Int[Tensor, "axes before"]
    start: int


def prompt(model: Any, processor: Any) -> Prompt:
    """Read the prompt off the processor, by asking it one question."""
    word = processor.tokenizer.convert_tokens_to_ids("where")
    inputs = question_inputs(processor, Image.new("RGB", (CANVAS, CANVAS)), "where")
    ids = inputs["input_ids"][0]
    at = int((ids == word).nonzero()[0, 0])
    image = int((ids == model.config.image_token_id).nonzero()[0, 0])
    if "image_grid_thw" in inputs:
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
        )
        positions = positions[:, 0]
    else:
        first = 1 if "token_type_ids" in inputs else 0  # PaliGemma counts from one
        positions = torch.arange(first, first + len(ids))[None]
    return Prompt(ids[:at], ids[at + 1 :], image, positions[:, :at], int(positions[0, at]))
