"""Small real picture folders and annotation files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pope_rows() -> list[dict]:
    """POPE's own layout: six questions a picture, yes and no in turn."""
    return [
        {
            "question_id": i + 1,
            "image": f"COCO_val2014_{i // 6:012d}.jpg",
            "text": f"Is there a thing {i} in the image?",
            "label": ("yes", "no")[i % 2],
        }
        for i in range(18)
    ]


@pytest.fixture
def pope_file(tmp_path, pope_rows) -> Path:
    """coco_pope_adversarial.json with its three pictures in a folder `images` next to it."""
    (tmp_path / "images").mkdir()
    for name in {row["image"] for row in pope_rows}:
        picture(int(name[-8:-4])).save(tmp_path / "images" / name)
    return write_lines(tmp_path / "coco_pope_adversarial.json", pope_rows)


@pytest.fixture
def table_rows(tmp_path) -> list[dict]:
    """Rows of a plain question table, and their two pictures on disk."""
    for name in ("cat.png", "dog.png"):
        picture(len(name) + ord(name[0])).save(tmp_path / name)
    return [
        {"image": "cat.png", "question": "what animal is it?", "answer": "cat"},
        {"image": "cat.png", "question": "how many legs, or “feet”?", "answer": "4"},
        {"image": "dog.png", "question": "what animal is it?", "answer": "dog"},
    ]
