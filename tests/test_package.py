"""The package as a whole: its public names, how light it is to import, and its command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import interp_vlm as iv

ROOT = Path(__file__).parent.parent


def python(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


def interp_vlm(*arguments, **options):
    return python("-c", "from interp_vlm.cli import main; main()", *map(str, arguments), **options)


def test_every_public_name_is_there():
    assert [name for name in iv.__all__ if getattr(iv, name, None) is None] == []
    assert set(iv.__all__) <= set(dir(iv))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'knockout'"):
        iv.knockout  # noqa: B018


def test_importing_is_light():
    heavy = {"torch", "transformers", "nnsight", "transformer_lens", "pandas", "scipy", "sklearn", "matplotlib", "PIL"}
    code = f"import sys, interp_vlm; print([m for m in {heavy!r} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_help_shows_an_example():
    monitors = (["monitor", "fit"], ["monitor", "score"], ["monitor", "evaluate"])
    for command in (["study"], ["compare"], ["inspect"], ["testbed", "train"], *monitors):
        done = interp_vlm(*command, "--help")
        assert done.returncode == 0
        assert f"interp-vlm {' '.join(command)}" in done.stdout, done.stdout


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.new("RGB", (56, 56), "red").save(path)
    return path


def test_inspect_prints_and_draws(picture, tmp_path):
    out = tmp_path / "drawn" / "grid.png"
    done = interp_vlm("inspect", "testbed:llava", "--image", picture, "--question", "is there a red 7 ?", "--out", out)
    assert done.returncode == 0, done.stderr
    for said in ("LlavaForConditionalGeneration", "resid_post", "(pos, 128)", "7 x 7, of 56 x 56 pixels", "question"):
        assert said in done.stdout
    with Image.open(out) as drawn:
        assert drawn.size[0] > 200
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "testbed:lava", "--image", "PICTURE", "--question", "?"], "llava"),
        (["inspect", "/no/such/folder", "--image", "PICTURE", "--question", "?"], "/no/such/folder"),
        (["inspect", "testbed:llava", "--image", "missing.png", "--question", "what ?"], "missing.png"),
        (["inspect", "testbed:llava", "--image", "PICTURE", "--question", "what ?", "--out", "grid.doc"], ".png"),
        (["testbed", "train", "lava", "--out", "OUT"], "llava"),
        (["study", "--model", "testbed:lava", "--out", "OUT"], "llava"),
        (["study", "--data", "coco:val", "--out", "OUT"], "pope:PATH"),
        (["study", "--limit", "many", "--out", "OUT"], "--limit"),
        (["study", "--modle", "testbed:llava"], "--modle"),
        (["studdy"], "studdy"),
        (["study", "--data", "pope:missing.json", "--out", "OUT"], "missing.json"),
    ],
)
def test_bad_input_is_one_line(arguments, said, picture, tmp_path):
    places = {"PICTURE": picture, "OUT": tmp_path / "out"}
    done = interp_vlm(*(places.get(argument, argument) for argument in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert not (tmp_path / "grid.doc").exists()
