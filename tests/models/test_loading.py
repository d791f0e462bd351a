"""Models by name: folders, hub ids and schemes; what cannot be loaded is said in one clear line."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from interp_vlm.errors import ModelError
from interp_vlm.models import describe, encode, family_for, load, loading
from tests.models.tiny_model import noise
from tests.tiny import FAMILIES, build


@pytest.fixture(autouse=True)
def _quiet():
    """No progress bars in the log."""
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.enable_progress_bar()


def save(name: str, folder, dtype: torch.dtype = torch.float32):
    model, processor = build(name, dtype=dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_model_answers_bit_for_bit_as_before(name, tmp_path):
    model, processor = save(name, tmp_path)
    loaded, read = load(tmp_path)
    assert type(loaded) is type(model)
    assert describe(loaded) == describe(model)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    family = family_for(model)
    pictures, questions = [noise(40, 30), noise(90, 30)], ["is there a cat?", "how many big dogs are there?"]
    batches = [encode(m.config, family, p, pictures, questions) for m, p in ((model, processor), (loaded, read))]
    assert batches[0].tokens[0].key == batches[1].tokens[0].key
    with torch.no_grad():
        assert torch.equal(model(**batches[0].inputs).logits, loaded(**batches[1].inputs).logits)


def test_half_precision_checkpoints_are_read_as_float32_on_the_cpu(tmp_path):
    save("llava", tmp_path, torch.float16)
    assert load(tmp_path)[0].dtype == torch.float32
    assert load(tmp_path, dtype=torch.float64)[0].dtype == torch.float64
    assert load(tmp_path, dtype="auto")[0].dtype == torch.float16
    assert load(tmp_path, device_map="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["llava", "paligemma2"])
def test_attention_implementations(name, tmp_path):
    save(name, tmp_path)
    eager = load(tmp_path, attn_implementation="eager")[0]
    assert eager.config.get_text_config()._attn_implementation == "eager"
    usual = load(tmp_path)[0]
    # SDPA cannot cap scores: Hugging Face refuses Gemma 2 under it, the loader then runs the text decoder eagerly
    assert usual.config.get_text_config()._attn_implementation == ("eager" if name == "paligemma2" else "sdpa")
    assert usual.model.vision_tower.config._attn_implementation == "sdpa"


def test_schemes_are_resolved_by_their_module(tmp_path, monkeypatch):
    save("llava", tmp_path / "small")
    (tmp_path / "zoo.py").write_text(
        f"from pathlib import Path\ndef path(name): return Path({str(tmp_path)!r}) / name\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(loading.SCHEMES, "zoo", "zoo")
    assert type(load("zoo:small")[0]).__name__ == "LlavaForConditionalGeneration"


def test_the_user_s_home_is_expanded(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loading.resolve("~/model") == str(tmp_path / "model")


def one_line(refused) -> str:
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["./absent", "/no/such/folder", "~/absent", "a/b/c", "../absent"])
def test_a_missing_folder(name):
    with pytest.raises(ModelError, match="there is no model folder") as refused:
        load(name)
    assert name in one_line(refused)


def test_a_hub_id_that_cannot_be_reached(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"no model 'nobody/nothing-at-all' can be loaded.*hub id that can be reached"
    ) as refused:
        load("nobody/nothing-at-all")
    one_line(refused)


def test_an_unknown_scheme_and_an_unknown_embedded_model():
    with pytest.raises(ModelError, match=r"unknown scheme 'hub'; expected testbed:NAME") as refused:
        load("hub:llava")
    one_line(refused)
    with pytest.raises(ModelError, match="no embedded model is called 'nothing'") as refused:
        load("testbed:nothing")
    one_line(refused)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json; expected a model folder") as refused:
        load(tmp_path)
    one_line(refused)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ModelError, match="cannot be loaded") as refused:
        load(tmp_path)
    one_line(refused)


def test_a_text_only_model(tmp_path):
    config = hf.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM is not known; expected .*LlavaForConditionalGeneration"
    ) as refused:
        load(tmp_path)
    one_line(refused)


def test_a_folder_without_a_processor(tmp_path):
    build("llava")[0].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(no processor can be loaded|alone).*save the model's processor") as refused:
        load(tmp_path)
    one_line(refused)


def test_a_folder_without_weights_or_with_broken_ones(tmp_path):
    model, processor = build("llava")
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded") as refused:
        load(tmp_path)
    one_line(refused)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be loaded") as refused:
        load(tmp_path)
    one_line(refused)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    save("llava", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = sorted(name for name in weights if "self_attn.q_proj.weight" in name)[:2]
    save_file({k: v for k, v in weights.items() if k not in gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 2 of the model's weights \(model\.\S*q_proj.weight, ...\)") as refused:
        load(tmp_path)
    one_line(refused)


def test_remote_code_is_not_run_unasked(tmp_path):
    """A checkpoint that brings its own code is refused; the code would leave a mark."""
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass OwnConfig: ...\n")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "own.OwnConfig"}})
    )
    with pytest.raises(ModelError) as refused:
        load(tmp_path)
    one_line(refused)
    assert not (tmp_path / "mark").exists()
