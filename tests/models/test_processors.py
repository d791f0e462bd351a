"""Processors without their video half: from every layout of a model folder, saving themselves under the real name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as hf

from interp_vlm.errors import ModelError
from interp_vlm.models import load_processor
from interp_vlm.models.processors import still
from tests.models.tiny_model import noise
from tests.tiny import FAMILIES, build

VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "smolvlm")


def save(name: str, folder) -> None:
    """A model folder without weights: configuration and processor."""
    model, processor = build(name)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)


def as_published(folder) -> None:
    """The older layout of the hub: settings in preprocessor_config.json, the template in chat_template.json."""
    settings = json.loads((folder / "processor_config.json").read_text())
    images = settings.pop("image_processor")
    images["processor_class"] = settings["processor_class"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if set(settings) == {"processor_class"}:
        (folder / "processor_config.json").unlink()
    else:
        (folder / "processor_config.json").write_text(json.dumps(settings))
    template = folder / "chat_template.jinja"
    if template.exists():
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
        template.unlink()


def same(one, other, name) -> bool:
    text = "hello " + one.image_token if name != "gemma3" else "hello " + one.boi_token
    given = [processor(images=[[noise(40, 30)]], text=[text], return_tensors="np") for processor in (one, other)]
    return all(np.array_equal(given[0][key], given[1][key]) for key in given[0]) and set(given[0]) == set(given[1])


@pytest.mark.parametrize("layout", ["saved", "published"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_folder_gives_the_same_processor(name, layout, tmp_path):
    original = build(name)[1]
    save(name, tmp_path)
    if layout == "published":
        as_published(tmp_path)
    loaded = load_processor(tmp_path)
    assert type(loaded).__name__ == type(original).__name__
    assert isinstance(loaded, getattr(hf, type(original).__name__))
    assert loaded.chat_template == original.chat_template
    assert same(loaded, original, name)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert json.loads((again / "processor_config.json").read_text())["processor_class"] == type(original).__name__
    assert same(load_processor(again), original, name)


@pytest.mark.parametrize("name", VIDEO)
def test_a_folder_that_names_no_class_is_read_by_its_model_type(name, tmp_path):
    save(name, tmp_path)
    for file in ("processor_config.json", "tokenizer_config.json"):
        content = json.loads((tmp_path / file).read_text())
        content.pop("processor_class", None)
        (tmp_path / file).write_text(json.dumps(content))
    assert type(load_processor(tmp_path)).__name__ == type(build(name)[1]).__name__


@pytest.mark.parametrize("name", VIDEO)
def test_videos_are_refused_with_the_remedy(name):
    processor = build(name)[1]
    with pytest.raises(ModelError, match=r"without video support.*torchvision.*AutoProcessor") as refused:
        processor(text=["look"], videos=[np.zeros((2, 24, 24, 3), np.uint8)])
    assert "\n" not in str(refused.value)
    assert processor(text=["look"], return_tensors="np")["input_ids"].size


def test_the_real_classes_really_want_a_video_processor():
    """The reason for `still`: without torchvision Hugging Face's own loader fails."""
    images, tokenizer = build("qwen2_vl")[1].image_processor, build("qwen2_vl")[1].tokenizer
    with pytest.raises(Exception, match=r"video|VIDEO"):
        hf.Qwen2VLProcessor(images, tokenizer)
    assert still(hf.Qwen2VLProcessor) is still(hf.Qwen2VLProcessor)
    assert issubclass(still(hf.Qwen2VLProcessor), hf.Qwen2VLProcessor)


def test_still_leaves_the_real_class_alone():
    before = dict(vars(hf.SmolVLMProcessor))
    still(hf.SmolVLMProcessor)
    build("smolvlm")
    assert dict(vars(hf.SmolVLMProcessor)) == before


@pytest.mark.parametrize("keep", [(), ("tokenizer.json", "tokenizer_config.json"), ("processor_config.json",)])
def test_a_folder_without_a_whole_processor_is_refused_in_one_line(keep, tmp_path):
    save("llava", tmp_path)
    for file in tmp_path.iterdir():
        if file.name not in (*keep, "config.json"):
            file.unlink()
    with pytest.raises(
        ModelError, match=r"(no processor can be loaded from|holds a \w+ alone).*save the model's processor"
    ) as refused:
        load_processor(tmp_path)
    assert "\n" not in str(refused.value)


def test_token_ids_and_pixels_are_what_the_model_was_built_for():
    model, processor = build("qwen2_vl")
    out = processor(images=[noise(40, 30)], text=["<|image_pad|>"], return_tensors="pt")
    assert isinstance(out["pixel_values"], torch.Tensor)
    assert (out["input_ids"] == model.config.image_token_id).sum() == out["image_grid_thw"].prod() // 4
