"""Registration: by the installed entry points, and by `register()`."""

import subprocess
import sys
import textwrap
from importlib.metadata import entry_points

import pytest
import torch
import transformer_lens.factories.architecture_adapter_factory as factory
import transformer_lens.utilities.architectures as architectures
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import Qwen2_5_VLArchitectureAdapter

import interp_vlm as iv
from interp_vlm import testbed
from interp_vlm.errors import ModelError
from interp_vlm.interop.transformer_lens import families, register
from interp_vlm.interop.transformer_lens.register import ADAPTERS, adapter_for
from interp_vlm.testbed.build import load
from tests.engine import reference
from tests.interop.bridges import logits

NEW = tuple(
    f"{name}ForConditionalGeneration" for name in ("InternVL", "PaliGemma", "Qwen2VL", "SmolVLM")
)  # fmt: skip
QWEN2_5 = "Qwen2_5_VLForConditionalGeneration"


def alone(program: str, *arguments: str) -> str:
    """What a program prints in a Python of its own, away from this repository, where every warning is an error."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tables(monkeypatch):
    """TransformerLens' tables as it ships them; what a test does to them is undone."""
    shipped = {name: kind for name, kind in factory.SUPPORTED_ARCHITECTURES.items() if name not in NEW}
    shipped[QWEN2_5] = Qwen2_5_VLArchitectureAdapter
    monkeypatch.setattr(factory, "SUPPORTED_ARCHITECTURES", shipped)
    monkeypatch.setattr(factory.ArchitectureAdapterFactory, "_adapters", dict(shipped))
    monkeypatch.setattr(factory.ArchitectureAdapterFactory, "_entry_points_discovered", False)
    multimodal = architectures.MULTIMODAL_ARCHITECTURES - set(NEW)
    monkeypatch.setattr(architectures, "MULTIMODAL_ARCHITECTURES", multimodal)
    return factory.SUPPORTED_ARCHITECTURES


def test_installing_the_package_is_enough_for_a_bridge_over_a_module_and_register_for_boot_transformers():
    printed = alone(
        """
        import sys
        from transformers import AutoModelForImageTextToText
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        def load():
            return AutoModelForImageTextToText.from_pretrained(sys.argv[1], attn_implementation="eager")

        model = load()
        try:
            TransformerBridge.boot_transformers(sys.argv[1], hf_model=model)
        except ValueError as error:
            print(str(error).split(".")[0])
        assert "interp_vlm" not in sys.modules
        bridge = build_bridge_from_module(model, "PaliGemmaForConditionalGeneration", hf_config=model.config)
        print(type(bridge.adapter).__name__)

        from interp_vlm.interop.transformer_lens import register
        print(*register())
        booted = TransformerBridge.boot_transformers(sys.argv[1], hf_model=load())
        print(type(booted.adapter).__name__, booted.cfg.n_layers, len(booted.blocks))
        """,
        str(testbed.path("paligemma")),
    )
    assert printed.splitlines() == [
        "Could not determine supported architecture from config",
        "PaliGemmaAdapter",
        " ".join(NEW),
        "PaliGemmaAdapter 4 4",
    ]


def test_without_transformer_lens_importing_and_registering_do_nothing_and_a_bridge_is_an_error():
    printed = alone(
        """
        import sys
        sys.modules["transformer_lens"] = None
        from interp_vlm.errors import ModelError
        from interp_vlm.interop.transformer_lens import register, to_bridge
        print(register(), register(replace="Qwen2_5_VLForConditionalGeneration"))
        class PaliGemmaForConditionalGeneration: pass
        class vlm: model = PaliGemmaForConditionalGeneration()
        try:
            to_bridge(vlm)
        except ModelError as error:
            print(error)
        """
    )
    assert printed.splitlines() == [
        "() ()",
        "TransformerLens is not installed; pip install 'transformer-lens>=4.3,<5'",
    ]


def test_registering_adds_what_is_missing_once_and_touches_nothing_else(tables):
    before = dict(tables)
    assert register() == NEW
    after = dict(tables)
    assert {name: tables[name] for name in before} == before
    assert set(after) - set(before) == set(NEW)
    assert set(NEW) <= architectures.MULTIMODAL_ARCHITECTURES
    assert all(factory.ArchitectureAdapterFactory._adapters[name] is adapter_for(name) for name in NEW)
    assert register() == ()
    assert tables == after


def test_an_adapter_of_somebody_else_stays(tables):
    class Theirs(LlavaArchitectureAdapter):
        pass

    factory.ArchitectureAdapterFactory.discover_entry_points()
    factory.ArchitectureAdapterFactory.register_adapter(NEW[1], Theirs)
    assert register() == NEW  # boot_transformers finds theirs from now on
    assert tables[NEW[1]] is factory.ArchitectureAdapterFactory._adapters[NEW[1]] is Theirs
    tables[NEW[2]] = Theirs
    assert register() == ()
    assert tables[NEW[2]] is Theirs


def test_an_adapter_of_transformer_lens_gives_way_only_when_asked(tables):
    register()
    assert tables[QWEN2_5] is Qwen2_5_VLArchitectureAdapter
    assert register(replace=[QWEN2_5]) == (QWEN2_5,)
    assert tables[QWEN2_5] is factory.ArchitectureAdapterFactory._adapters[QWEN2_5] is families.Qwen2_5VLAdapter
    assert register(replace=QWEN2_5) == ()
    assert register() == ()
    with pytest.raises(ModelError, match=r"no TransformerLens adapter for Moon; expected Gemma3"):
        register(replace=["Moon"])


def test_a_model_is_booted_by_name_with_its_pictures(tables):
    register()
    folder = testbed.path("qwen2_vl")
    model, processor = load(folder, attn_implementation="eager")
    vlm = iv.VLM(model, processor)
    scene = iv.data.digit_scenes(n=1)[0]
    batch = vlm.encode(scene.image, scene.question)
    booted = TransformerBridge.boot_transformers(str(folder))
    assert type(booted.adapter) is families.Qwen2VLAdapter
    assert torch.equal(logits(booted, batch), reference.forward(model, batch.inputs).logits)


def test_the_entry_points_are_those_of_the_classes_that_transformer_lens_lacks(tables):
    points = {
        point.name: point.load()
        for point in entry_points(group="transformer_lens.architectures")
        if point.value.startswith("interp_vlm.")
    }
    assert points == {name: adapter_for(name) for name in ADAPTERS if name not in tables}
    assert tuple(points) == NEW


@pytest.mark.parametrize("architecture", ADAPTERS)
def test_every_row_of_the_table_names_an_adapter(architecture):
    assert adapter_for(architecture).__name__ in families.__all__
