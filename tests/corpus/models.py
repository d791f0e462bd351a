"""Bad models: each folder goes through `iv.load`, an encoding and a run, and through `interp-vlm inspect`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from interp_vlm.errors import DataError, ModelError
from tests.corpus.row import Bad
from tests.tiny import build

__all__ = ["MODELS", "save"]

WEIGHTS, MLP = "model.safetensors", "language_model.model.layers.1.mlp.down_proj.weight"


def save(family: str, folder: Path) -> Path:
    """A model folder as `save_pretrained` writes it."""
    for part in build(family):
        part.save_pretrained(folder)
    return folder


Make = Callable[[Path], Path]


def with_file(name: str, content: str | bytes | Callable[[bytes], bytes]) -> Make:
    """A good folder with one file written over."""

    def make(folder: Path) -> Path:
        path = save("llava", folder) / name
        found = content(path.read_bytes()) if callable(content) else content
        path.write_bytes(found.encode() if isinstance(found, str) else found)
        return folder

    return make


def without(*names: str) -> Make:
    """A good folder without some files."""

    def make(folder: Path) -> Path:
        save("llava", folder)
        for name in names:
            (folder / name).unlink()
        return folder

    return make


def config(text: bool = False, **changes: Any) -> Make:
    """A good folder whose config.json, or the text_config in it, has other entries."""

    def changed(content: bytes) -> bytes:
        found = json.loads(content)
        (found["text_config"] if text else found).update(changes)
        return json.dumps(found).encode()

    return with_file("config.json", changed)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Make:
    """A good folder whose weights are changed in place."""

    def make(folder: Path) -> Path:
        save("llava", folder)
        found = {name: weight.clone() for name, weight in load_file(folder / WEIGHTS).items()}
        change(found)
        save_file(found, folder / WEIGHTS, {"format": "pt"})
        return folder

    return make


def spoilt(value: float) -> Make:
    return weights(lambda found: found[MLP].__setitem__((0, 0), value))


def processor_of(family: str, model: str = "llava") -> Make:
    """The model of one family with the processor of another."""

    def make(folder: Path) -> Path:
        save(model, folder)
        for path in folder.iterdir():
            if path.name not in ("config.json", "generation_config.json", WEIGHTS):
                path.unlink()
        build(family)[1].save_pretrained(folder)
        return folder

    return make


class Marker:
    """When it is unpickled, it makes a file: what a hostile checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def pickled(hostile: bool) -> Make:
    """Weights in a pickle, as old checkpoints have them."""

    def make(folder: Path) -> Path:
        found: Any = load_file(save("llava", folder) / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save({**found, "mark": Marker(folder / "mark")} if hostile else found, folder / "pytorch_model.bin")
        return folder

    return make


def garbage_pickle(folder: Path) -> Path:
    (without(WEIGHTS)(folder) / "pytorch_model.bin").write_bytes(os.urandom(500_000))
    return folder


def own_code(folder: Path) -> Path:
    """A checkpoint that brings code of its own, which would leave a mark."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.py").write_text(f"open({str(folder / 'mark')!r}, 'w')\nclass OwnConfig: ...\n")
    named = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(named))
    return folder


def no_image_token(folder: Path) -> Path:
    """A placeholder for pictures that the vocabulary does not have."""
    save("llava", folder)
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.jinja"):
        path = folder / name
        path.write_text(path.read_text().replace("<image>", "<picture>"))
    return folder


def processor_setting(name: str, value: Any) -> Make:
    """A good folder whose processor has another setting."""
    return with_file("processor_config.json", lambda content: json.dumps({**json.loads(content), name: value}).encode())


def sharded_without_a_shard(folder: Path) -> Path:
    model, processor = build("llava")
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    return folder


def header(length: int) -> Callable[[bytes], bytes]:
    return lambda content: length.to_bytes(8, "little") + content[8:]


def narrower(found: dict[str, torch.Tensor]) -> None:
    found[MLP] = found[MLP][:, :10].contiguous()


def file_for_folder(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where a folder should be")
    return folder


def answers(found: Any) -> None:
    assert len(found) == 1
    assert isinstance(found[0], str)


def bad(id: str, make: Callable[[Path], Any], says: str, raises: type = ModelError) -> Bad:
    return Bad(id, make, says, raises)


UNLOADABLE = r"the model in folder \S+ cannot be loaded"
NO_PROCESSOR = r"no processor can be loaded from \S+ \(.+\)"
MODELS = (
    bad("no-config", without("config.json"), r"has no config\.json"),
    bad("config-is-null", with_file("config.json", "null"), UNLOADABLE),
    bad("config-is-a-list", with_file("config.json", "[]"), UNLOADABLE),
    bad("config-cut", with_file("config.json", lambda content: content[:100]), UNLOADABLE),
    bad(
        "config-is-a-folder",
        lambda folder: (without("config.json")(folder) / "config.json").mkdir() or folder,
        r"has no config\.json",
    ),
    bad("unknown-family", config(architectures=["BertForMaskedLM"]), r"architecture BertForMaskedLM is not known"),
    bad("unknown-model-type", config(model_type="no-such-model"), UNLOADABLE),
    bad("architecture-with-a-line-break", config(architectures=["A\nB"]), r"architecture A B is not known"),
    bad("width-as-text", config(text=True, hidden_size="64"), UNLOADABLE),
    bad("negative-width", config(text=True, hidden_size=-64), UNLOADABLE),
    bad("no-heads", config(text=True, num_attention_heads=0), UNLOADABLE),
    bad("other-width", config(text=True, hidden_size=128), UNLOADABLE),
    bad("text-config-lost", config(text_config=None), r"\d+ bytes for the \d+ weights of config\.json"),
    bad("a-layer-more", config(text=True, num_hidden_layers=4), r"lacks 9 of the model's weights"),
    bad("a-layer-less", config(text=True, num_hidden_layers=2), r"weights of a decoder layer 2 .*expected 2 layers"),
    bad("tokenizer-cut", with_file("tokenizer.json", lambda content: content[:500]), NO_PROCESSOR),
    bad("tokenizer-empty", with_file("tokenizer.json", "{}"), NO_PROCESSOR),
    bad("tokenizer-config-is-a-list", with_file("tokenizer_config.json", "[]"), NO_PROCESSOR),
    bad("no-tokenizer", without("tokenizer.json", "tokenizer_config.json"), rf"{NO_PROCESSOR}|alone"),
    bad(
        "no-processor",
        without("tokenizer.json", "tokenizer_config.json", "processor_config.json"),
        rf"{NO_PROCESSOR}|alone",
    ),
    bad("processor-config-is-a-list", with_file("processor_config.json", "[]"), NO_PROCESSOR),
    bad("processor-config-cut", with_file("processor_config.json", "{"), NO_PROCESSOR),
    *(
        bad(f"processor-of-{other}", processor_of(other), r"the processor is a \w+; expected the LlavaProcessor")
        for other in ("paligemma", "qwen2_vl", "llava_next")
    ),
    bad("llava-processor-for-paligemma", processor_of("llava", "paligemma"), r"expected the PaliGemmaProcessor"),
    bad("patches-of-no-size", processor_setting("patch_size", 0), r"refuses example 0 .*by zero", DataError),
    bad("patches-of-another-size", processor_setting("patch_size", 8), r"has 9 image tokens; expected 36", DataError),
    bad("no-image-token", no_image_token, r"has 0 image tokens; expected 36", DataError),
    bad(
        "image-token-beyond-the-vocabulary",
        config(image_token_id=9999, image_token_index=9999),
        r"has 0 image tokens; expected 36",
        DataError,
    ),
    bad("template-that-does-not-parse", with_file("chat_template.jinja", "{% for x in %}"), r"chat template .* fails"),
    bad(
        "template-that-refuses",
        with_file("chat_template.jinja", "{{ raise_exception('no\\nno') }}"),
        r"chat template .* fails \(TemplateError: no no\)",
    ),
    bad("template-without-a-picture", with_file("chat_template.jinja", "hello"), r"refuses example 0", DataError),
    bad("no-weights", without(WEIGHTS), UNLOADABLE),
    bad("weights-of-no-bytes", with_file(WEIGHTS, b""), UNLOADABLE),
    bad("weights-cut", with_file(WEIGHTS, lambda content: content[:-1000]), UNLOADABLE),
    bad("weights-with-an-endless-header", with_file(WEIGHTS, header(2**62)), UNLOADABLE),
    bad("weights-of-garbage", with_file(WEIGHTS, os.urandom(500_000)), UNLOADABLE),
    bad("weights-missing", weights(lambda found: found.pop(MLP)), r"lacks 1 of the model's weights"),
    bad("weight-of-another-shape", weights(narrower), UNLOADABLE),
    bad("nan-weight", spoilt(float("nan")), r"weight \S*layers\.1\.mlp\.down_proj\.weight .* holds NaN or infinity"),
    bad("infinite-weight", spoilt(float("inf")), r"holds NaN or infinity"),
    bad("shard-missing", sharded_without_a_shard, UNLOADABLE),
    bad("hostile-pickle", pickled(hostile=True), UNLOADABLE),
    bad("pickle-of-garbage", garbage_pickle, UNLOADABLE),
    bad("own-code-unasked", own_code, UNLOADABLE),
    bad("file-for-a-folder", file_for_folder, r"there is no model folder"),
    bad("absent-folder", lambda folder: folder / "absent", r"there is no model folder"),
    bad("somebody-else-s-home", lambda _: Path("~nobody-there/model"), r"~nobody-there/model' is no path"),
    bad("endless-name", lambda _: Path("x" * 5000), r"is no path \(File name too long\)"),
    bad("unknown-embedded-model", lambda _: Path("testbed:gpt"), r"no embedded model is called 'gpt'"),
    bad("web-address", lambda _: Path("https:/huggingface.co/a/b"), r"has the unknown scheme 'https'"),
    Bad("no-generation-config", without("generation_config.json"), recovers=answers),
    Bad("generation-config-cut", with_file("generation_config.json", "{"), recovers=answers),
    Bad("weights-too-many", weights(lambda found: found.update(more=torch.ones(3))), recovers=answers),
    Bad("harmless-pickle", pickled(hostile=False), recovers=answers),
)
