"""Tiny random models of every real Hugging Face class of the table, with their real processors, made offline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from interp_vlm.models.processors import still

__all__ = ["FAMILIES", "build"]

_CORPUS = (
    "is there a red cat on the left of the picture? yes no",
    "how many blue dogs are there? zero one two three four five 0 1 2 3 4 5 6 7 8 9",
    "what colour is the big square? green yellow black white",
    "Describe this image. What is the man holding? A small umbrella.",
    "USER: ASSISTANT: user assistant system You are a helpful assistant. answer en question",
    "the quick brown fox jumps over the lazy dog, and where is the circle?",
)
_PIXELS, _PATCH = 24, 4
_CORNERS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # large enough that attention and answers are not flat
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": _PIXELS,
    "patch_size": _PATCH,
    "initializer_range": 0.1,  # smaller, so that the tower does not mix its patches beyond recognition
}


@functools.cache
def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, attn: str = "sdpa") -> tuple[Any, Any]:
    """A tiny random model and its processor; the same objects for the same arguments, so leave them as they are.

    Example:
        >>> type(build("llava")[0]).__name__
        'LlavaForConditionalGeneration'
    """
    processor, make_config = _BUILDERS[family]()
    # the class of the decoder decides: Gemma 2 has no sdpa, and the loader then asks for eager
    config = make_config(processor.tokenizer)
    if attn == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        attn = {"": "sdpa", "text_config": "eager"}  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attn)
        _liven(model)
    return model.eval().requires_grad_(False), processor


def _liven(model: torch.nn.Module) -> None:
    """Biases, gains and some embeddings start at 0 or 1: move them, so that a test notices when one is left out."""
    for weight in model.parameters():
        if weight.ndim == 1 or weight.std() == 0:
            weight.data += 0.2 * torch.randn_like(weight)


def _tokenizer(special: dict[str, str], extra: dict[str, str], *, bytes_: bool, bos: bool) -> Any:
    """A small BPE tokenizer: byte-level as GPT-2's, or with SentencePiece's blank marks and byte fallback."""
    names = list(dict.fromkeys([*special.values(), *extra.values()]))
    if bytes_:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        more: list[str] = []
    else:
        tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"], byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet, more = [], ["\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*names, *more], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if more:  # the byte tokens are vocabulary, not special: rebuild without them in the list of added tokens
        import json

        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in names]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if bos:
        token = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=[(token, tokenizer.token_to_id(token))]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, extra_special_tokens=extra, clean_up_tokenization_spaces=False
    )


_LLAMA_STYLE = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GEMMA_STYLE = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
_QWEN_STYLE = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
_QWEN_EXTRA = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "message_start_token": "<|im_start|>",
}

_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_GEMMA3_TEMPLATE = (
    "<bos>{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_ONEVISION_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}\n{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """What every text configuration needs, sized for the tokenizer."""
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {**_CORNERS, **special, "vocab_size": len(tokenizer), **more}


def _square() -> dict[str, int]:
    return {"height": _PIXELS, "width": _PIXELS}


def _llava() -> tuple[Any, Callable[[Any], Any]]:
    processor = hf.LlavaProcessor(
        hf.CLIPImageProcessorPil(size={"shortest_edge": _PIXELS}, crop_size=_square()),
        _tokenizer(_LLAMA_STYLE, {"image_token": "<image>"}, bytes_=False, bos=True),
        patch_size=_PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_LLAVA_TEMPLATE,
    )  # fmt: skip
    return processor, lambda tokenizer: hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION, projection_dim=64),
        text_config=hf.LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.image_token_id, image_seq_length=36,
    )  # fmt: skip


def _llava_next() -> tuple[Any, Callable[[Any], Any]]:
    pinpoints = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": _PIXELS}, crop_size=_square(), image_grid_pinpoints=pinpoints
        ),
        _tokenizer(_LLAMA_STYLE, {"image_token": "<image>"}, bytes_=False, bos=True),
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=_LLAVA_TEMPLATE,
    )  # fmt: skip
    return processor, lambda tokenizer: hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**{**_VISION, "patch_size": 8}, projection_dim=64),
        text_config=hf.MistralConfig(**_text(tokenizer)),
        image_token_index=tokenizer.image_token_id, image_grid_pinpoints=pinpoints, image_seq_length=9,
    )  # fmt: skip


def _paligemma(gemma2: bool = False) -> tuple[Any, Callable[[Any], Any]]:
    images = hf.SiglipImageProcessorPil(size=_square())
    images.image_seq_length = 36
    processor = hf.PaliGemmaProcessor(
        images, _tokenizer(_GEMMA_STYLE, {"image_token": "<image>"}, bytes_=False, bos=True)
    )

    def config(tokenizer: Any) -> Any:
        more = {"num_key_value_heads": 2, "sliding_window": 4096, "query_pre_attn_scalar": 32} if gemma2 else {}
        text = _text(tokenizer, **(more or {"num_key_value_heads": 1}), initializer_range=0.15)
        return hf.PaliGemmaConfig(
            vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
            text_config=hf.Gemma2Config(**text) if gemma2 else hf.GemmaConfig(**text),
            image_token_index=tokenizer.image_token_id, projection_dim=64,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip

    return processor, config


def _qwen2_vl() -> tuple[Any, Callable[[Any], Any]]:
    processor = still(hf.Qwen2VLProcessor)(
        _qwen_images(), _tokenizer(_QWEN_STYLE, _QWEN_EXTRA, bytes_=True, bos=False), chat_template=_QWEN_TEMPLATE
    )
    return processor, lambda tokenizer: hf.Qwen2VLConfig(
        text_config=_text(
            tokenizer,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        ),
        vision_config={
            "depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": _PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.1,
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "image_token", "video_token_id": "video_token",
             "vision_start_token_id": "vision_bos_token", "vision_end_token_id": "vision_eos_token"}  # fmt: skip
    ids = {key: tokenizer.convert_tokens_to_ids(_QWEN_EXTRA[name]) for key, name in names.items()}
    return {**ids, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}


def _qwen_images() -> Any:
    return hf.Qwen2VLImageProcessorPil(
        patch_size=_PATCH, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
    )


def _qwen2_5_vl() -> tuple[Any, Callable[[Any], Any]]:
    tokenizer = _tokenizer(_QWEN_STYLE, _QWEN_EXTRA, bytes_=True, bos=False)
    processor = still(hf.Qwen2_5_VLProcessor)(_qwen_images(), tokenizer, chat_template=_QWEN_TEMPLATE)
    return processor, lambda tokenizer: hf.Qwen2_5_VLConfig(
        text_config=_text(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        ),
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 4,
            "patch_size": _PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [1], "initializer_range": 0.1,
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip


def _qwen3_vl() -> tuple[Any, Callable[[Any], Any]]:
    tokenizer = _tokenizer(_QWEN_STYLE, _QWEN_EXTRA, bytes_=True, bos=False)
    processor = still(hf.Qwen3VLProcessor)(_qwen_images(), tokenizer, chat_template=_QWEN_TEMPLATE)
    return processor, lambda tokenizer: hf.Qwen3VLConfig(
        text_config=_text(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        ),
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_heads": 4,
            "patch_size": _PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 1], "initializer_range": 0.1,
        },
        **_qwen_ids(tokenizer),
    )  # fmt: skip


def _gemma3() -> tuple[Any, Callable[[Any], Any]]:
    extra = {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>",
    }  # fmt: skip
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size=_square()),
        _tokenizer(_GEMMA_STYLE, extra, bytes_=False, bos=True),
        chat_template=_GEMMA3_TEMPLATE,
        image_seq_length=9,
    )

    def config(tokenizer: Any) -> Any:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        # the window is shorter than any prompt, so that it cuts
        text = _text(tokenizer, layer_types=kinds, sliding_window=16, query_pre_attn_scalar=32)
        return hf.Gemma3Config(
            vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
            text_config=hf.Gemma3TextConfig(**text),
            mm_tokens_per_image=9, image_token_index=tokenizer.image_token_id,
            boi_token_index=tokenizer.boi_token_id, eoi_token_index=tokenizer.eoi_token_id,
        )  # fmt: skip

    return processor, config


def _llava_onevision() -> tuple[Any, Callable[[Any], Any]]:
    pinpoints = [[24 * down, 24 * across] for down in (1, 2, 3) for across in (1, 2, 3)]
    extra = {"image_token": "<image>", "video_token": "<video>", "message_start_token": "<|im_start|>"}
    processor = still(hf.LlavaOnevisionProcessor)(
        hf.LlavaOnevisionImageProcessorPil(size=_square(), image_grid_pinpoints=pinpoints),
        _tokenizer(_QWEN_STYLE, extra, bytes_=True, bos=False),
        num_image_tokens=9, vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_4",
        chat_template=_ONEVISION_TEMPLATE,
    )  # fmt: skip
    return processor, lambda tokenizer: hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**{**_VISION, "patch_size": 8}, vision_use_head=False),
        text_config=hf.Qwen2Config(**_text(tokenizer)),
        image_token_index=tokenizer.image_token_id, video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints, vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip


def _internvl() -> tuple[Any, Callable[[Any], Any]]:
    extra = {
        "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
        "video_token": "<video>", "message_start_token": "<|im_start|>",
    }  # fmt: skip
    processor = still(hf.InternVLProcessor)(
        hf.GotOcr2ImageProcessorPil(size=_square(), crop_to_patches=True, min_patches=1, max_patches=4),
        _tokenizer(_QWEN_STYLE, extra, bytes_=True, bos=False),
        image_seq_length=9,
        chat_template=_INTERNVL_TEMPLATE,
    )
    return processor, lambda tokenizer: hf.InternVLConfig(
        vision_config=hf.InternVLVisionConfig(**_VISION),
        text_config=hf.Qwen2Config(**_text(tokenizer)),
        image_token_id=tokenizer.context_image_token_id, image_seq_length=9,
    )  # fmt: skip


def _idefics(small: bool) -> tuple[Any, Callable[[Any], Any]]:
    markers = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    extra = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
        "end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>",
        **{marker.strip("<>"): marker for marker in markers},
    }  # fmt: skip
    style = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = _tokenizer(style, extra, bytes_=True, bos=False)
    sizes = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": _PIXELS}}
    if small:
        images = hf.SmolVLMImageProcessorPil(**sizes)
        processor = still(hf.SmolVLMProcessor)(images, tokenizer, image_seq_len=9, chat_template=_IDEFICS_TEMPLATE)
    else:
        images = hf.Idefics3ImageProcessorPil(**sizes)
        processor = hf.Idefics3Processor(images, tokenizer, image_seq_len=9, chat_template=_IDEFICS_TEMPLATE)

    def config(tokenizer: Any) -> Any:
        vision, whole = (
            (hf.SmolVLMVisionConfig, hf.SmolVLMConfig) if small else (hf.Idefics3VisionConfig, hf.Idefics3Config)
        )
        return whole(
            vision_config=vision(**_VISION),
            text_config=hf.LlamaConfig(**_text(tokenizer)),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=2,
        )  # fmt: skip

    return processor, config


_BUILDERS: dict[str, Callable[[], tuple[Any, Callable[[Any], Any]]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "paligemma": _paligemma,
    "paligemma2": lambda: _paligemma(gemma2=True),
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3": _gemma3,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": lambda: _idefics(small=False),
    "smolvlm": lambda: _idefics(small=True),
}

FAMILIES = tuple(_BUILDERS)
"""Every name that `build` takes; "paligemma2" is PaliGemma's class around Gemma 2."""
