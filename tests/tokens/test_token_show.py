"""Token maps as pages and figures: complete, well-formed, escaped and light."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest
import torch
from matplotlib.collections import PolyCollection
from PIL import Image

from interp_vlm.errors import SelectionError
from interp_vlm.tokens import select
from interp_vlm.tokens.batch import Batch
from interp_vlm.tokens.geometry import Geometry
from interp_vlm.tokens.grid import grid_from_geometry
from interp_vlm.tokens.token_map import TokenMap
from tests import tiny
from tests.tokens.conftest import encoded, picture


def parsed(page: str) -> ElementTree.Element:
    """The page as XML: unbalanced tags, raw < or & and unquoted attributes are errors here."""
    return ElementTree.fromstring(f"<root>{page.replace('&nbsp;', ' ')}</root>")


def photo(width: int = 640, height: int = 427) -> tuple[TokenMap, Image.Image]:
    """LLaVA-1.5's grid over a photo-sized picture."""
    image = picture(width, height)
    short = min(width, height)
    to = (round(336 * width / short), round(336 * height / short))
    grid = grid_from_geometry(Geometry.resize_crop((width, height), to, (336, 336)), 24, 24, 14)
    index = torch.cat([torch.full((3,), -1), torch.zeros(576), torch.full((4,), -1)]).long()
    mask = torch.ones(583, dtype=torch.bool)
    ids = torch.arange(583)
    return TokenMap(ids, ("x",) * 583, mask, index, (grid,), "k", pictures=(image,)), image


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_pages_are_well_formed_and_name_every_text_token(family: str, three: Callable[..., Batch]) -> None:
    batch = three(family, "left")
    page = batch._repr_html_()
    root = parsed(page)
    text = "".join(root.itertext())
    assert repr(batch) in text
    for tokens in batch.tokens:
        assert tokens.question_text in text
        single = parsed(tokens._repr_html_())
        titles = [element.get("title") or "" for element in single.iter("span")]
        for position in tokens.text.tolist():
            assert any(title.endswith(f" position {position}") for title in titles), position
        hovers = {int(m[1]) for m in re.finditer(r"position (\d+), image token", tokens._repr_html_())}
        placed = torch.tensor(tokens.grid.placed)
        assert hovers == set(tokens.image[placed].tolist())


def test_what_users_write_is_escaped() -> None:
    tokens = encoded("qwen2_vl", [picture(30, 30)], ["<script>alert('a & b')</script>"]).tokens[0]
    page = tokens._repr_html_()
    assert "<script" not in page
    assert "<script>alert('a & b')</script>" in "".join(parsed(page).itertext())


def test_the_picture_itself_is_on_the_page() -> None:
    image = picture(24, 24, 5)
    page = encoded("llava", [image], ["a cat?"])._repr_html_()
    data = re.search(r"data:image/png;base64,([^']+)", page)
    assert data is not None
    assert Image.open(io.BytesIO(base64.b64decode(data[1]))).tobytes() == image.tobytes()


def test_a_full_size_grid_is_light_and_hides_nothing() -> None:
    tokens, _ = photo()
    page = tokens._repr_html_()
    assert len(page) < 600_000  # of which the picture, pure noise here, is most
    assert page.count("image token") == 576
    assert "not seen by the model" in page
    assert "stretched" in photo(4000, 30)[0]._repr_html_()


def test_long_batches_show_their_beginning() -> None:
    batch = encoded("paligemma", [picture(30, 30)] * 6, ["a cat?"] * 6)
    assert batch._repr_html_().count("a cat?") >= 4
    assert "and 2 more: batch[4:]" in batch._repr_html_()


def outlines(tokens: TokenMap, **more: object) -> list[int]:
    figure = tokens.plot(**more)
    figure.savefig(io.BytesIO(), format="png")  # draws without a warning
    return [len(c.get_paths()) for c in figure.axes[0].collections if isinstance(c, PolyCollection)]


def test_figures_outline_every_patch_and_mark_the_chosen() -> None:
    tokens, image = photo()
    assert outlines(tokens) == [576, 576]
    assert outlines(tokens, image=image, positions=select.random(0.3).positions(tokens)) == [576, 576, 173]
    assert outlines(photo(4000, 30)[0]) == [576, 576]


def test_figures_number_patches_that_can_be_read() -> None:
    tokens = encoded("llava", [picture(60, 40)], ["a cat?"]).tokens[0]
    written = {text.get_text() for text in tokens.plot().axes[0].texts}
    assert written == {str(p) for p in tokens.image.tolist()}
    assert not photo()[0].plot().axes[0].texts
    ticks = [int(label.get_text()) for label in photo()[0].plot().axes[0].get_yticklabels()]
    assert ticks == list(range(0, 24, 2))


def test_figures_of_tiles_and_of_what_is_not_there() -> None:
    tiled = encoded("llava_next", [picture(60, 40)], ["a cat?"]).tokens[0]
    count = int((tiled.grid.placed & (tiled.grid.views > 0)).sum())
    assert count > 0
    assert outlines(tiled, tiles=True) == [count, count]
    tokens, _ = photo()
    with pytest.raises(SelectionError, match="picture 0 has no tiles; expected tiles=False"):
        tokens.plot(tiles=True)
    with pytest.raises(SelectionError, match=r"a picture of \(5, 5\) for a grid of \(640, 427\)"):
        tokens.plot(picture(5, 5))
    with pytest.raises(SelectionError, match="picture 1 does not exist"):
        tokens.plot(number=1)
