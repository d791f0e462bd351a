"""Device maps over memory and disk: the same numbers from a folder, and one clear line for what cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

import interp_vlm as iv
from interp_vlm.errors import ModelError
from interp_vlm.models import loading
from interp_vlm.models.loading import resolve
from tests.engine.labelled import labelled_devices

LANGUAGE = "model.language_model"
SPLIT = {
    "model.vision_tower": "cpu", "model.multi_modal_projector": "disk", f"{LANGUAGE}.embed_tokens": "disk",
    f"{LANGUAGE}.layers.0": "cpu", f"{LANGUAGE}.layers.1": "disk", f"{LANGUAGE}.layers.2": "cpu",
    f"{LANGUAGE}.layers.3": "disk", f"{LANGUAGE}.norm": "cpu", f"{LANGUAGE}.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip
MANY = [
    iv.AttentionKnockout("last", "image", layers=[1, 2]),
    iv.AttentionKnockout("question", "image", layers=[2]),
    iv.Ablation("resid_post", layers=[1], positions="all", to="mean"),
    iv.Ablation("vision_post", layers=[0], to="zero"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as large ones come: its weights in several files, with an index."""
    source, target = Path(resolve("testbed:llava")), tmp_path_factory.mktemp("model")
    model: Any = loading.load(source)[0]
    model.save_pretrained(target, max_shard_size="500KB")
    for file in source.iterdir():
        if not (target / file.name).exists() and file.suffix != ".safetensors":
            shutil.copy(file, target)
    assert len(list(target.glob("model-*.safetensors"))) > 2
    return target


def measured(vlm: iv.VLM) -> list[torch.Tensor]:
    scenes = iv.data.digit_scenes(n=2)
    batch = vlm.encode([scene.image for scene in scenes], [scene.question for scene in scenes])
    return [vlm.run(batch).logits, *(vlm.run(batch, each).logits for each in MANY)]


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[torch.Tensor]:
    return measured(iv.load(str(folder)))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": SPLIT},
        {"device_map": "auto", "max_memory": {"cpu": "2MB"}},
        {"device_map": {"": "disk"}},
    ],
    ids=["map", "max_memory", "disk"],
)
def test_weights_in_memory_and_on_the_disk_give_the_same_numbers(
    folder: Path, plain: list[torch.Tensor], tmp_path: Path, options: dict[str, Any]
) -> None:
    vlm = iv.load(str(folder), offload_folder=tmp_path / "deep" / "offloaded", **options)
    model: Any = vlm.model
    assert "disk" in model.hf_device_map.values()
    away = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert f"{LANGUAGE}.layers.3.mlp.down_proj.weight" in away
    assert (vlm.dtype, vlm.device) == (torch.float32, torch.device("cpu"))
    for found, wanted in zip(measured(vlm), plain, strict=True):
        assert torch.equal(found, wanted)


CARDS = torch.accelerator.device_count()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": CARDS}, f"device_map is {CARDS}, which this machine does not have; expected 'cpu', 'disk'"),
        ({"device_map": {"model": "cpu", "lm_head": f"cuda:{CARDS}"}}, "device_map puts 'lm_head' on 'cuda:"),
        ({"device_map": "cheap"}, "device_map is 'cheap'; expected 'cpu', .* or one of 'auto', .* for the whole"),
        ({"device_map": {"model": "gpu", "lm_head": "cpu"}}, "device_map puts 'model' on 'gpu'; expected"),
        ({"device_map": "meta"}, "device_map is 'meta', where there are no numbers"),
        (
            {"device_map": {"": "cpu", f"{LANGUAGE}.layers.1": "disk"}},
            "puts 'model.language_model.layers.1' on 'disk' and 'the whole model', which holds it, on 'cpu'",
        ),
        (
            {"device_map": {name: place for name, place in SPLIT.items() if name != "lm_head"}},
            "cannot be placed .*does not give any device .* lm_head.weight.* check device_map",
        ),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory= without device_map=; expected both; pass device_map='auto'"),
        ({"offload_folder": "offloaded"}, "offload_folder= without device_map="),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "max_memory of 'cpu' is 'lots'; expected bytes, or"),
        ({"device_map": "auto", "max_memory": {"gpu": "1GB"}}, "max_memory names 'gpu'"),
        (
            {"device_map": "auto", "max_memory": {CARDS: "1GB"}},
            f"max_memory names {CARDS}, which this machine does not",
        ),
        ({"device_map": "cpu", "offload_folder": __file__}, "offload_folder .*test_placement.py cannot be made"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)
def test_what_cannot_be_placed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        iv.load("testbed:llava", **options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_does_not_fit_is_told_how_to_be_spread() -> None:
    error = loading._unreachable("org/large", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14 GiB."))
    assert "org/large does not fit (CUDA out of memory" in str(error)
    assert "device_map='auto'" in str(error)


def test_a_part_on_the_meta_device_is_refused() -> None:
    model, processor = loading.load("testbed:llava")
    dispatch_model(model, {**dict.fromkeys(SPLIT, "cpu"), f"{LANGUAGE}.layers.1": "meta"})
    with pytest.raises(ModelError, match=r"puts 'model.language_model.layers.1' on the meta device"):
        iv.VLM(model, processor)


def test_tied_weights_on_two_devices_are_refused() -> None:
    """accelerate leaves the embeddings where the head is, and runs them where they are not."""
    model, processor = loading.load("testbed:paligemma")
    places: dict[str, Any] = {f"model.{name}": "lazy:0" for name, _ in model.model.named_children()}
    with labelled_devices():
        dispatch_model(model, places | {"lm_head": "lazy:1"}, main_device=torch.device("lazy:0"))
        with pytest.raises(ModelError, match=r"embed_tokens.weight is on lazy:1, and the device map runs .* on lazy:0"):
            iv.VLM(model, processor)
