"""The table of architectures: what is in it, what it refuses, and how other packages add to it."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
import transformers as hf

from interp_vlm.errors import ModelError
from interp_vlm.models import describe, families, family_for, register, registry
from tests.tiny import FAMILIES, build


@pytest.fixture
def fresh(monkeypatch):
    """The table as at the start of a program."""
    monkeypatch.setattr(registry, "_table", {})
    monkeypatch.setattr(registry, "_complete", False)


def test_every_architecture_of_the_table_is_a_real_class_with_a_tiny_build():
    assert all(hasattr(hf, architecture) for architecture in families())
    assert {type(build(name)[0]).__name__ for name in FAMILIES} == set(families())
    assert len({family.name for family in families().values()}) == len(families()) == 11


def test_lookup_by_name_configuration_and_model(tmp_path):
    model, _ = build("qwen2_vl")
    model.save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    assert family_for(config) is family_for(model) is family_for("Qwen2VLForConditionalGeneration")
    assert describe(model).family == "qwen2_vl"


def test_an_unknown_architecture_is_refused_with_the_list_and_the_way_to_add_one():
    with pytest.raises(ModelError) as refused:
        family_for(hf.MllamaConfig(architectures=["MllamaForConditionalGeneration"]))
    message = str(refused.value)
    assert "MllamaForConditionalGeneration is not known" in message
    assert all(architecture in message for architecture in families())
    assert "interp_vlm.families" in message
    assert "how to add a family" in message
    assert "\n" not in message


def test_duplicates_are_refused(fresh):
    row = family_for("LlavaForConditionalGeneration")
    with pytest.raises(ModelError, match="already registered, as family 'llava'"):
        register(row)
    with pytest.raises(ModelError, match="a family called 'llava' is already registered"):
        register(dataclasses.replace(row, architecture="AnotherForConditionalGeneration"))
    new = dataclasses.replace(row, architecture="AnotherForConditionalGeneration", name="another")
    assert register(new) is new
    assert family_for("AnotherForConditionalGeneration") is new


def install(tmp_path, monkeypatch, source: str) -> None:
    """A package with an entry point in the families' group, as pip leaves it on the path."""
    (tmp_path / "other_families.py").write_text(source)
    info = tmp_path / "other_families-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-families\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[interp_vlm.families]\nother = other_families:ROWS\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "other_families", raising=False)


OTHER = """
import dataclasses
from interp_vlm.models.llava import FAMILY
ROWS = [dataclasses.replace(FAMILY, name="other", architecture={architecture!r})]
"""


def test_an_installed_package_adds_its_rows(fresh, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, OTHER.format(architecture="OtherForConditionalGeneration"))
    assert family_for("OtherForConditionalGeneration").name == "other"
    assert family_for("LlavaForConditionalGeneration").name == "llava"


def test_an_installed_package_cannot_replace_a_built_in_row(fresh, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, OTHER.format(architecture="LlavaForConditionalGeneration"))
    for _ in range(2):  # and the table is not left half-filled
        with pytest.raises(ModelError, match="LlavaForConditionalGeneration is already registered"):
            families()


def test_an_entry_point_that_is_no_family_is_named(fresh, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "ROWS = ['llava']")
    with pytest.raises(ModelError, match=r"entry point 'other'.*gives a str"):
        families()
