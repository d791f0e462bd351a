"""The studied models in their published sizes, without their weights; and narrow ones of the same depth and length.

Sizes are those of the configurations on the hub. The models are the three of the studied work (arXiv 2605.08200), whose
PaliGemma has 3B parameters, not 7B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from accelerate import init_empty_weights
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode

import interp_vlm as iv
from interp_vlm.models.processors import still
from interp_vlm.testbed.build import build_processor

__all__ = ["MODELS", "PICTURE", "Published", "Zeros", "asked", "narrow", "weightless"]

PICTURE = (640, 480)
"""Width and height of most pictures of COCO, which POPE asks about."""

Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        name: on the hub.
        family: its row in the registry.
        make: its configuration, from the sizes of text and tower and its tokenizer.
        text, tower: those sizes.
        small: the sizes of text and tower on which no count of rows and layers depends, made small.
        question: as many words of the small tokenizer as a question of POPE and its instruction have tokens in the
            model's own.
    """

    name: str
    family: str
    make: Callable[[Sizes, Sizes, Any], Any]
    text: Sizes
    tower: Sizes
    small: tuple[Sizes, Sizes]
    question: str

    def config(self, tokenizer: Any, *, small: bool = False) -> Any:
        """The configuration in its published sizes, or in small ones of the same depth."""
        text, tower = self.small if small else ({}, {})
        vocabulary = {"vocab_size": len(tokenizer)} if small else {}
        return self.make({**self.text, **text, **vocabulary}, {**self.tower, **tower}, tokenizer)


def _llava(text: Sizes, tower: Sizes, tokenizer: Any) -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower), text_config=hf.LlamaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=576,
    )  # fmt: skip


def _paligemma(text: Sizes, tower: Sizes, tokenizer: Any) -> Any:
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**tower, vision_use_head=False), text_config=hf.GemmaConfig(**text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=text["hidden_size"],
    )  # fmt: skip


_ENDS = {"bos_token_id": None, "eos_token_id": None}


def _qwen2_vl(text: Sizes, tower: Sizes, tokenizer: Any) -> Any:
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
             "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}  # fmt: skip
    eighth = text["hidden_size"] // text["num_attention_heads"] // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [eighth, 3 * eighth // 2, 3 * eighth // 2]}
    return hf.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "tie_word_embeddings": False, **_ENDS},
        vision_config={**tower, "hidden_size": text["hidden_size"]}, tie_word_embeddings=False,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()},
    )  # fmt: skip


_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
_SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_ASKED = "is there a dog in the image ?"

MODELS = {
    "llava": Published(
        "llava-hf/llava-1.5-7b-hf", "llava", _llava,
        text={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "vocab_size": 32064},
        tower={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
               "image_size": 336, "patch_size": 14, "projection_dim": 768},
        small=(_SMALL, _SMALL_TOWER),
        question=f"{_ASKED}\nanswer the question using a single word or phrase ." + " the" * 7,
    ),
    "paligemma": Published(
        "google/paligemma-3b-mix-224", "paligemma", _paligemma,
        text={"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
              "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216},
        tower={"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
               "image_size": 224, "patch_size": 14},
        small=({**_SMALL, "head_dim": 16}, _SMALL_TOWER),
        question=f"answer en {_ASKED}",
    ),
    "qwen2_vl": Published(
        "Qwen/Qwen2-VL-7B-Instruct", "qwen2_vl", _qwen2_vl,
        text={"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
              "num_key_value_heads": 4, "vocab_size": 152064},
        tower={"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
               "spatial_merge_size": 2, "temporal_patch_size": 2},
        small=(_SMALL, {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 1}),
        question=_ASKED,
    ),
}  # fmt: skip
"""The models of the tables, by family."""


def processor(family: str) -> Any:
    """The family's real processor, in the published sizes, around the testbed's small tokenizer."""
    words = build_processor(family)
    if family == "llava":
        return hf.LlavaProcessor(
            hf.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
            words.tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
            chat_template=words.chat_template,
        )  # fmt: skip
    if family == "paligemma":
        images: Any = hf.SiglipImageProcessorPil(size={"height": 224, "width": 224})
        images.image_seq_length = 256
        return hf.PaliGemmaProcessor(images, words.tokenizer)
    size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    system = "<|im_start|>system\nyou are a helpful assistant .<|im_end|>\n"
    return still(hf.Qwen2VLProcessor)(
        hf.Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=size), words.tokenizer,
        chat_template=system + words.chat_template,
    )  # fmt: skip


def weightless(published: Published, dtype: torch.dtype = torch.bfloat16) -> iv.VLM:
    """The model in its published sizes, with weights that are all zero and take no memory; use it inside `Zeros()`."""
    made = processor(published.family)
    with init_empty_weights():
        model = hf.AutoModelForImageTextToText.from_config(published.config(made.tokenizer))
    zero = torch.zeros((), dtype=dtype)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(zero.expand(weight.shape), requires_grad=False))
    model.tie_weights()
    return iv.VLM(model.eval(), made, published.name)


def narrow(published: Published, kind: type[iv.VLM] = iv.VLM) -> iv.VLM:
    """A model with random weights in small sizes, as deep and with as long a prompt as the published one."""
    made = processor(published.family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.AutoModelForImageTextToText.from_config(published.config(made.tokenizer, small=True))
    return kind(model.eval().requires_grad_(False), made, published.name)


def asked(vlm: iv.VLM, published: Published, n: int = 1) -> iv.Batch:
    """A batch of `n` questions of POPE's length about pictures of COCO's size."""
    return vlm.encode([Image.new("RGB", PICTURE)] * n, [published.question] * n)


class Zeros(TorchFunctionMode):
    """Products with weights that are all zero, without computing them: the result is made, in its full size, of zeros.

    Only weights whose numbers are one number in memory (`weightless`) are meant; every other product is computed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and not any(args[1].stride()):
            return args[0].new_zeros(*args[0].shape[:-1], len(args[1]))
        return func(*args, **(kwargs or {}))
