"""The examples of a study, and how they are cut."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from interp_vlm.data.digits import digit_scenes
from interp_vlm.data.example import Example
from interp_vlm.errors import DataError
from interp_vlm.study.material import load_material, shards
from interp_vlm.study.settings import Settings


@given(st.lists(st.integers(1, 7), min_size=1, max_size=30), st.integers(1, 20))
def test_shards_hold_every_example_once_and_keep_pictures_whole(questions, size):
    picture = Image.new("RGB", (2, 2))
    examples = [
        Example(f"{group}-{k}", picture, "?", "yes", group=str(group))
        for group, n in enumerate(questions)
        for k in range(n)
    ]
    cut = shards({"standard": examples, "hard": examples[:3]}, size)
    assert [shard.number for shard in cut] == list(range(len(cut)))
    assert [e.id for s in cut if s.condition == "standard" for e in s.examples] == [e.id for e in examples]
    assert [e.id for s in cut if s.condition == "hard" for e in s.examples] == [e.id for e in examples[:3]]
    whole = Counter(s.number for s in cut if s.condition == "standard" for _ in {e.group for e in s.examples})
    assert sum(whole.values()) == len(questions)
    for shard in cut[:-1]:
        assert len(shard.items) < size + 7


def test_digit_scenes_share_no_glyph_with_the_reference():
    material = load_material(Settings(limit=24))
    assert {name: len(listed) for name, listed in material.conditions.items()} == {"standard": 24, "hard": 96}
    assert len(material.pairs) == 6
    assert {e.meta["split"] for e in material.conditions["standard"]} == {"test"}
    assert {e.meta["split"] for e in material.reference} == {"validation"}
    assert len({e.group for e in material.reference}) == len(material.reference)
    assert material.fingerprint == load_material(Settings(limit=24)).fingerprint
    assert material.fingerprint != load_material(Settings(limit=24, seed=1)).fingerprint


def _file(folder, n):
    """Pictures and questions as a file of JSON Lines; n pictures with two questions each."""
    lines = []
    for number, example in enumerate(digit_scenes(n=n, questions_per_image=1)):
        example.image.save(folder / f"{number}.png")
        lines += [
            {"image": f"{number}.png", "question": f"{q} {number} ?", "answer": "yes"} for q in ("is it", "or is it")
        ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_of_other_data_some_pictures_are_set_aside(tmp_path):
    path = _file(tmp_path, 12)
    material = load_material(Settings(models=("m",), data=f"file:{path}?images={tmp_path}"))
    (examples,) = material.conditions.values()
    assert len(examples) == 18
    assert len(material.reference) == 1
    assert len(material.fitting) == 4
    groups = [{e.group for e in part} for part in (examples, material.reference, material.fitting)]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert not material.pairs
    assert material.interventions == material.errors


def test_one_picture_alone_leaves_none_for_reference(tmp_path):
    path = _file(tmp_path, 1)
    material = load_material(Settings(models=("m",), data=f"file:{path}?images={tmp_path}"))
    assert len(material.conditions["as given"]) == 2
    assert material.reference == ()


def test_broken_pictures_are_an_error_or_are_counted(tmp_path):
    path = _file(tmp_path, 4)
    (tmp_path / "2.png").write_bytes(b"no picture")
    data = f"file:{path}?images={tmp_path}"
    with pytest.raises(DataError, match=r"2\.png"):
        load_material(Settings(models=("m",), data=data))
    material = load_material(Settings(models=("m",), data=data, on_error="skip"))
    assert len(material.skipped) == 2
    assert "2.png" in material.skipped[0]
