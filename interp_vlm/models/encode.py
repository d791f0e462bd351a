"""Pictures and questions of any kind to one batch, through the model's own processor and prompt."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from interp_vlm.errors import DataError, ModelError
from interp_vlm.models.anatomy import Family
from interp_vlm.models.pictures import Picture, read_picture
from interp_vlm.models.processors import check_processor
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.grid import ImageGrid
from interp_vlm.tokens.token_map import build_maps

__all__ = ["encode", "render"]


def render(family: Family, processor: Any, question: str, n_images: int = 1) -> str:
    """The prompt around a question: the processor's chat template, else the family's own.

    Example:
        >>> from tests.tiny import build
        >>> from interp_vlm.models import family_for
        >>> render(family_for("PaliGemmaForConditionalGeneration"), build("paligemma")[1], "what is this?")
        '<image>what is this?'
    """
    if not getattr(processor, "chat_template", None):
        return family.prompt(processor, question, n_images)
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    try:
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except Exception as error:  # a template is a program of its own
        raise ModelError(
            f"the chat template of the {type(processor).__name__} fails ({type(error).__name__}: {error})",
            expected="a template that takes one user turn with pictures and a text",
            remedy="mend chat_template.jinja, or give the prompts yourself",
        ) from error


def encode(
    model_config: Any,
    family: Family,
    processor: Any,
    images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]],
    questions: str | Sequence[str],
    *,
    padding: str = "left",
    prompts: str | Sequence[str] | None = None,
) -> Batch:
    """Encode one or many examples; each encodes to what it encodes to alone, but for padding.

    Args:
        images: one picture, a list with one per question, or a list of lists with any number per question. A single
            picture serves all questions; a single question is asked of every picture of a plain list.
        questions: bare questions; the prompt around them is the processor's chat template or the family's own.
        padding: side on which shorter rows are padded, "left" or "right".
        prompts: full prompts to use instead, each with the image placeholders and its question in it.

    Raises:
        DataError: if the counts do not match, a picture cannot be read, or the processor refuses an example.
        ModelError: if the processor is another model's, or the image tokens do not fit the family's grid rule.
    """
    check_processor(model_config, processor)
    if padding not in ("left", "right"):
        raise DataError(f"padding {padding!r}", expected="'left' or 'right'")
    pictures, asked = _examples(images, questions)
    given = [prompts] if isinstance(prompts, str) else prompts
    if given is not None and len(given) != len(asked):
        raise DataError(f"{len(given)} prompts for {len(asked)} examples", expected="one prompt for each example")
    texts = (
        list(given)
        if given is not None
        else [render(family, processor, question, len(own)) for question, own in zip(asked, pictures, strict=True)]
    )
    inputs = _processed(processor, pictures, texts, padding)
    grids = family.grids(processor, pictures, inputs, model_config)
    image_token = model_config.image_token_id
    maps = build_maps(
        processor.tokenizer, inputs, texts, asked, image_token, grids, _keys(inputs, pictures, processor)
    )  # fmt: skip
    return Batch(
        inputs=inputs,
        tokens=maps,
        images=tuple(tuple(own) for own in pictures),
        questions=tuple(asked),
        prompts=tuple(texts),
        padding=padding,
        image_rows=_image_rows(family, inputs, grids),
    )


def _examples(images: Any, questions: str | Sequence[str]) -> tuple[list[list[Image]], list[str]]:
    """One list of pictures and one question per example."""
    asked = [questions] if isinstance(questions, str) else list(questions) if isinstance(questions, Iterable) else None
    if asked is None or not all(isinstance(question, str) for question in asked):
        wrong = questions if asked is None else next(one for one in asked if not isinstance(one, str))
        raise DataError(f"a {type(wrong).__name__} is not a question", expected="text, or a list of texts")
    several = isinstance(images, (list, tuple))
    nested = several and any(isinstance(own, (list, tuple)) for own in images)
    if several and not nested:
        owned = [[picture] for picture in images]
        asked = asked * len(owned) if isinstance(questions, str) else asked
    else:
        owned = list(images) if nested else [[images]] * len(asked)
    if not asked or not owned:
        raise DataError(f"{len(owned)} pictures and {len(asked)} questions", expected="at least one of each")
    if len(owned) != len(asked):
        raise DataError(
            f"{len(owned)} {'lists of pictures' if nested else 'pictures'} for {len(asked)} questions",
            expected="one for each question",
            remedy="pass a list of lists for several pictures per question",
        )
    known: dict[int, Image] = {}  # questions often share a picture: read it once

    def read(picture: Any) -> Image:
        if id(picture) not in known:
            known[id(picture)] = read_picture(picture)
        return known[id(picture)]

    return [[read(p) for p in (own if isinstance(own, (list, tuple)) else [own])] for own in owned], asked


def _processed(processor: Any, pictures: list[list[Image]], texts: list[str], padding: str) -> dict[str, torch.Tensor]:
    try:
        return _call(processor, pictures, texts, padding)
    except Exception as error:  # processors refuse in many ways
        for k, (own, text) in enumerate(zip(pictures, texts, strict=True)):
            try:
                _call(processor, [own], [text], padding)
            except Exception as alone:
                sizes = ", ".join(f"{p.width}x{p.height}" for p in own) or "none"
                raise DataError(
                    f"{type(processor).__name__} refuses example {k} (pictures: {sizes}): {alone}",
                    expected="pictures and a prompt that the processor takes",
                ) from error
        raise DataError(
            f"{type(processor).__name__} takes each of the {len(texts)} examples alone, not together: {error}",
            remedy="encode them one by one",
        ) from error


def _call(processor: Any, pictures: list[list[Image]], texts: list[str], padding: str) -> dict[str, torch.Tensor]:
    bos = processor.tokenizer.bos_token
    # a chat template that writes <bos> itself must not get a second one from the tokenizer
    plain = {"add_special_tokens": False} if bos and all(text.startswith(bos) for text in texts) else {}
    encoded = processor(
        images=pictures if any(pictures) else None,
        text=texts,
        padding=True,
        padding_side=padding,
        return_tensors="np",  # PaliGemma's processor warns when numpy has to copy its tensors
        **plain,
    )
    arrays = {name: np.asarray(value) for name, value in encoded.items() if name != "labels"}
    if "batch_num_images" in arrays:  # LLaVA-OneVision leaves out examples without pictures
        arrays["batch_num_images"] = np.asarray([len(own) for own in pictures])
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _keys(inputs: dict[str, torch.Tensor], pictures: list[list[Image]], processor: Any) -> list[str]:
    """A hash of what each example is by itself: its ids without padding, and its pictures' pixels."""
    digests = {id(p): hashlib.sha256(f"{p.size}".encode() + p.tobytes()).digest() for own in pictures for p in own}
    keys = []
    for ids, mask, own in zip(inputs["input_ids"], inputs["attention_mask"], pictures, strict=True):
        bare = np.ascontiguousarray(ids[mask.bool()].numpy(), dtype="<i8").tobytes()
        keys.append(hashlib.sha256(bare + b"".join(digests[id(p)] for p in own)).hexdigest()[:16])
    return keys


def _image_rows(
    family: Family, inputs: dict[str, torch.Tensor], grids: list[list[ImageGrid]]
) -> tuple[dict[str, tuple[int, int]], ...]:
    """For each example, which rows [start, stop) of each image tensor are its own."""
    rows: list[dict[str, tuple[int, int]]] = [{} for _ in grids]
    for name, per_picture in family.picture_rows(inputs, [grid for own in grids for grid in own]).items():
        ends = [0, *itertools.accumulate(per_picture)]
        if ends[-1] != len(inputs[name]):
            found, stated = len(inputs[name]), f"{ends[-1]}, as family {family.name!r} says"
            raise ModelError(f"{name} has {found} rows", expected=stated)
        first = 0
        for row, own in zip(rows, grids, strict=True):
            row[name] = (ends[first], ends[first + len(own)])
            first += len(own)
    return tuple(rows)
