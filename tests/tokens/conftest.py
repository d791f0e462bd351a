"""Real batches: tiny models' own processors around pictures and questions of different lengths."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from interp_vlm.models import family_for
from interp_vlm.models.encode import encode
from interp_vlm.tokens.batch import Batch
from tests import tiny

QUESTIONS = ("is there a red cat on the left of the picture?", "how many dogs?", "What is the man holding?")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(family: str, images: list, questions: list[str], padding: str = "left", **more: object) -> Batch:
    """A batch by the public way in."""
    model, processor = tiny.build(family)
    row = family_for(type(model).__name__)
    return encode(model.config, row, processor, images, questions, padding=padding, **more)


@pytest.fixture(scope="session")
def three() -> Callable[..., Batch]:
    """`three(family, padding)`: three examples with pictures of different shapes."""
    images = [picture(60, 40, 1), picture(33, 70, 2), picture(24, 24, 3)]
    return lambda family="llava", padding="left": encoded(family, images, list(QUESTIONS), padding)
