"""Pixels to tokens and back, against brute force and against Hugging Face's own image processors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from PIL import Image
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil, SiglipImageProcessorPil
from transformers.image_transforms import center_crop

from interp_vlm.errors import DataError, SelectionError
from interp_vlm.tokens.geometry import Geometry
from interp_vlm.tokens.grid import ImageGrid, grid_from_geometry, join_grids, tower_rows

side = st.integers(1, 400)
sides = st.tuples(side, side)
share = st.floats(0.001, 0.999)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Every way a processor treats a picture: stretched, cropped (or padded by the crop), letterboxed, windowed."""
    size, to, extra = draw(sides), draw(sides), draw(st.tuples(st.integers(0, 90), st.integers(0, 90)))
    kind = draw(st.sampled_from(["resize", "crop", "pad", "pad at corner", "tile"]))
    if kind == "crop":
        return Geometry.resize_crop(size, to, draw(sides))
    if kind.startswith("pad"):
        canvas = (to[0] + extra[0], to[1] + extra[1])
        return Geometry.resize_pad(size, to, canvas, None if kind == "pad" else (0, 0))
    whole = Geometry.resize(size, to)
    if kind == "tile":
        left, top = draw(st.integers(0, to[0] - 1)), draw(st.integers(0, to[1] - 1))
        return whole.window(left, top, draw(side), draw(side))
    return whole


@st.composite
def grids(draw: st.DrawFn, most: int = 2500) -> tuple[Geometry, ImageGrid, float]:
    geometry = draw(geometries())
    patch = draw(st.integers(3, 40))
    rows, cols = max(1, geometry.canvas[1] // patch), max(1, geometry.canvas[0] // patch)
    assume(rows * cols <= most)
    return geometry, grid_from_geometry(geometry, rows, cols, patch), patch


@given(geometries(), share, share)
def test_the_two_directions_are_inverse(geometry: Geometry, u: float, v: float) -> None:
    x, y = u * geometry.size[0], v * geometry.size[1]
    assert geometry.to_picture(*geometry.to_tower(x, y)) == pytest.approx((x, y), rel=1e-9, abs=1e-9)
    x0, y0, x1, y1 = geometry.visible
    if x0 < x1 and y0 < y1:
        inside = x0 + u * (x1 - x0), y0 + v * (y1 - y0)
        across, down = geometry.to_tower(*inside)
        assert -1e-6 <= across <= geometry.canvas[0] + 1e-6
        assert -1e-6 <= down <= geometry.canvas[1] + 1e-6


@given(grids(), share, share)
def test_a_pixel_lies_in_the_box_of_the_token_that_sees_it(
    drawn: tuple[Geometry, ImageGrid, float], u: float, v: float
) -> None:
    geometry, grid, patch = drawn
    x, y = u * geometry.size[0], v * geometry.size[1]
    across, down = geometry.to_tower(x, y)
    row, col = math.floor(down / patch), math.floor(across / patch)
    assume(abs(across / patch - round(across / patch)) > 1e-6 and abs(down / patch - round(down / patch)) > 1e-6)
    hits = [i for i, (x0, y0, x1, y1) in enumerate(grid.boxes) if x0 < x < x1 and y0 < y < y1]
    seen = 0 <= row < grid.rows and 0 <= col < grid.cols
    assert hits == ([row * grid.cols + col] if seen else [])
    if seen:
        assert tuple(grid.cells[hits[0]]) == (row, col)


@given(grids())
def test_boxes_tile_the_part_of_the_picture_that_is_seen(drawn: tuple[Geometry, ImageGrid, float]) -> None:
    geometry, grid, patch = drawn
    boxes = grid.boxes[grid.placed]
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum()
    x0, y0 = geometry.to_picture(0, 0)
    x1, y1 = geometry.to_picture(grid.cols * patch, grid.rows * patch)
    assert area == pytest.approx(max(x1 - x0, 0) * max(y1 - y0, 0), rel=1e-6, abs=1e-3)
    assert (boxes >= 0).all()
    assert (boxes[:, [0, 2]] <= geometry.size[0]).all()
    assert (boxes[:, [1, 3]] <= geometry.size[1]).all()


@settings(deadline=None)
@given(grids(most=150), st.tuples(share, share, share, share), st.integers(0, 3))
def test_tokens_in_a_rectangle_are_those_that_overlap_it(
    drawn: tuple[Geometry, ImageGrid, float], corners: tuple[float, float, float, float], buffer: int
) -> None:
    geometry, grid, _ = drawn
    (x0, x1), (y0, y1) = sorted([corners[0], corners[2]]), sorted([corners[1], corners[3]])
    assume(x1 - x0 > 1e-3 and y1 - y0 > 1e-3)
    x0, x1, y0, y1 = x0 * geometry.size[0], x1 * geometry.size[0], y0 * geometry.size[1], y1 * geometry.size[1]
    core = {
        tuple(grid.cells[i])
        for i, box in enumerate(grid.boxes)
        if grid.placed[i] and max(box[0], x0) < min(box[2], x1) and max(box[1], y0) < min(box[3], y1)
    }
    wanted = [
        i for i in range(grid.n)
        if grid.placed[i] and any(
            max(abs(grid.cells[i, 0] - r), abs(grid.cells[i, 1] - c)) <= buffer for r, c in core
        )
    ]  # fmt: skip
    assert grid.tokens_in(x0, y0, x1, y1, buffer).tolist() == wanted


def test_a_rectangle_that_no_patch_sees_stays_empty() -> None:
    grid = grid_from_geometry(Geometry.resize_crop((640, 480), (448, 336), (336, 336)), 24, 24, 14)
    assert grid.tokens_in(0, 0, 79, 480, buffer=5).size == 0
    assert grid.tokens_in(0, 0, 81, 480).tolist() == list(range(0, 576, 24))


def test_a_rectangle_that_is_a_patch_meets_that_patch_alone() -> None:
    grid = grid_from_geometry(Geometry.resize((24, 24), (24, 24)), 6, 6, 4)
    for token in range(grid.n):
        assert grid.tokens_in(*grid.box_of(token)).tolist() == [token]


@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.tuples(st.integers(1, 20), st.integers(1, 20)))
def test_the_centre_crop_is_transformers_own_to_the_pixel(size: tuple[int, int], crop: tuple[int, int]) -> None:
    """Every pixel of the picture carries its number; padding, where the crop is larger, is 0."""
    numbered = np.arange(1, size[0] * size[1] + 1).reshape(1, size[1], size[0])
    cropped = center_crop(numbered, (crop[1], crop[0]), input_data_format="channels_first")[0]
    geometry = Geometry.resize_crop(size, size, crop)
    for (y, x), number in np.ndenumerate(cropped):
        across, down = x + 0.5 - geometry.offset[0], y + 0.5 - geometry.offset[1]
        inside = 0 < across < size[0] and 0 < down < size[1]
        assert number == (math.floor(down) * size[0] + math.floor(across) + 1 if inside else 0)
        if inside:
            assert geometry.to_picture(x + 0.5, y + 0.5) == (across, down)


def test_letterboxes_are_centred_or_put_where_asked() -> None:
    centred = Geometry.resize_pad((20, 10), (40, 20), (40, 41))
    assert (centred.offset, centred.canvas, centred.visible) == ((0, 10), (40, 41), (0, 0, 20, 10))
    assert Geometry.resize_pad((20, 10), (40, 20), (47, 20)).offset == (3, 0)
    assert Geometry.resize_pad((20, 10), (40, 20), (40, 41), (0, 0)).to_picture(40, 20) == (20, 10)
    grid = grid_from_geometry(centred, 4, 4, 10)
    assert grid.placed.reshape(4, 4).any(axis=1).tolist() == [False, True, True, False]
    assert grid.cells[0].tolist() == [0, 0]
    assert grid.views[0] == 0


def _ramp(width: int, height: int) -> Image.Image:
    """A picture whose red channel rises from left to right and green from top to bottom, 0 to 250."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.stack([x * 250, y * 250, x * 0], axis=-1).round().astype(np.uint8))


def _patch_means(pixels: np.ndarray, rows: int, cols: int, patch: int) -> np.ndarray:
    """(token, red or green) mean of each patch of a (3, height, width) array."""
    cut = pixels[:2, : rows * patch, : cols * patch].reshape(2, rows, patch, cols, patch)
    return cut.mean(axis=(2, 4)).reshape(2, -1).T


def _box_centres(grid: ImageGrid) -> np.ndarray:
    centres = np.stack([grid.boxes[:, [0, 2]].mean(1) / grid.size[0], grid.boxes[:, [1, 3]].mean(1) / grid.size[1]], 1)
    return centres * 250


@pytest.mark.parametrize("size", [(97, 61), (61, 97), (48, 48), (300, 20)])
def test_centre_crop_against_clips_own_processor(size: tuple[int, int]) -> None:
    scale = 24 / min(size)
    to = (24, int(24 * size[1] / size[0])) if size[0] <= size[1] else (int(24 * size[0] / size[1]), 24)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_normalize=False, do_rescale=False
    )
    pixels = np.asarray(processor(_ramp(*size), return_tensors="np")["pixel_values"][0], dtype=float)
    grid = grid_from_geometry(Geometry.resize_crop(size, to, (24, 24)), 6, 6, 4)
    off_by = np.abs(_patch_means(pixels, 6, 6, 4) - _box_centres(grid))
    one_pixel = 250 / np.array(size) / min(scale, 1)
    assert (off_by < np.maximum(0.5 * one_pixel, 2)).all()  # half a pixel, or the rounding of 8-bit colours


def test_a_stretched_picture_against_siglips_own_processor() -> None:
    processor = SiglipImageProcessorPil(size={"height": 48, "width": 48}, do_normalize=False, do_rescale=False)
    pixels = np.asarray(processor(_ramp(120, 30), return_tensors="np")["pixel_values"][0], dtype=float)
    grid = grid_from_geometry(Geometry.resize((120, 30), (48, 48)), 6, 6, 8)
    np.testing.assert_allclose(_patch_means(pixels, 6, 6, 8), _box_centres(grid), atol=2)


def test_merged_patches_against_qwens_own_processor() -> None:
    """Qwen2-VL hands the tower its patches in merge groups: token t reads rows 4t to 4t + 3."""
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, do_normalize=False, do_rescale=False,
        size={"shortest_edge": 8 * 8, "longest_edge": 96 * 96},
    )  # fmt: skip
    out = processor(_ramp(97, 61), return_tensors="np")
    rows, cols = (int(n) // 2 for n in out["image_grid_thw"][0][1:])
    feeding = tower_rows(rows, cols, merge=2, grouped=True)
    grid = grid_from_geometry(Geometry.resize((97, 61), (cols * 8, rows * 8)), rows, cols, 8, vision_rows=feeding)
    patches = np.asarray(out["pixel_values"], dtype=float).reshape(-1, 3, 2, 4, 4)[:, :2, 0].mean(axis=(2, 3))
    np.testing.assert_allclose(patches[grid.vision_rows].mean(axis=1), _box_centres(grid), atol=3)


@pytest.mark.parametrize(("rows", "cols", "merge"), [(1, 1, 1), (2, 3, 2), (3, 2, 4)])
def test_tower_rows_against_a_loop(rows: int, cols: int, merge: int) -> None:
    wanted = [
        [7 + (r * merge + i) * cols * merge + c * merge + j for i in range(merge) for j in range(merge)]
        for r in range(rows) for c in range(cols)
    ]  # fmt: skip
    assert tower_rows(rows, cols, merge, start=7).tolist() == wanted
    grouped = tower_rows(rows, cols, merge, start=7, grouped=True)
    assert sorted(grouped.ravel()) == list(range(7, 7 + rows * cols * merge**2))
    assert (np.diff(grouped, axis=1) == 1).all()


def _tiled() -> ImageGrid:
    """A 40x20 picture: 2x4 patches of the whole, a separator, and two tiles of 2x2 with a newline after each row."""
    size = (40, 20)
    whole = grid_from_geometry(Geometry.resize(size, (16, 8)), 2, 4, 4)
    large = Geometry.resize(size, (16, 8))
    tiles = [grid_from_geometry(large.window(8 * t, 0, 8, 8), 2, 2, 4, view=1 + t) for t in range(2)]
    return join_grids([whole, 1, *(tile.take([0, 1, -1, 2, 3, -1]) for tile in tiles)])


def test_joined_views_keep_their_places() -> None:
    grid = _tiled()
    assert (grid.rows, grid.cols, grid.n) == (2, 4, 8 + 1 + 12)
    assert grid.views.tolist() == [0] * 8 + [-1] + [1, 1, -1, 1, 1, -1] + [2, 2, -1, 2, 2, -1]
    assert np.isnan(grid.boxes[[8, 11, 14, 17, 20]]).all()
    assert (grid.cells[grid.views < 0] == -1).all()
    assert grid.box_of(15) == (20, 0, 30, 10)
    assert repr(grid) == "ImageGrid(2x4 + 2 tiles, 21 tokens, picture 40x20)"


def test_the_buffer_crosses_the_borders_of_tiles() -> None:
    grid = _tiled()
    assert grid.tokens_in(11, 1, 19, 9).tolist() == [1, 10]
    assert grid.tokens_in(11, 1, 19, 9, buffer=1).tolist() == [0, 1, 2, 4, 5, 6, 9, 10, 12, 13, 15, 18]


def test_tower_rows_survive_joining_only_where_every_part_has_them() -> None:
    geometry = Geometry.resize((8, 8), (8, 8))
    known = grid_from_geometry(geometry, 2, 2, 4, vision_rows=tower_rows(2, 2, start=1))
    unknown = grid_from_geometry(geometry, 2, 2, 4, view=1)
    joined = join_grids([known, 1, known])
    assert joined.vision_rows is not None
    assert joined.vision_rows.ravel().tolist() == [1, 2, 3, 4, -1, 1, 2, 3, 4]
    assert join_grids([known, unknown]).vision_rows is None


def test_grids_are_values() -> None:
    geometry = Geometry.resize((30, 20), (8, 8))
    one, same = grid_from_geometry(geometry, 2, 2, 4), grid_from_geometry(geometry, 2, 2, 4)
    fed = grid_from_geometry(geometry, 2, 2, 4, vision_rows=tower_rows(2, 2))
    assert one == same
    assert hash(one) == hash(same)
    assert one not in (fed, grid_from_geometry(geometry, 1, 2, 4), one.take([1, 0, 2, 3]), one.take([0, 1, 2, -1]))
    assert fed == grid_from_geometry(geometry, 2, 2, 4, vision_rows=tower_rows(2, 2))
    with pytest.raises(ValueError, match="read-only"):
        one.boxes[0, 0] = 1


@pytest.mark.parametrize("kind", ["picture", "canvas", "token", "lengths", "nothing"])
def test_nonsense_is_refused_in_one_line(kind: str) -> None:
    grid = grid_from_geometry(Geometry.resize((30, 20), (8, 8)), 2, 2, 4)
    calls = {
        "picture": (lambda: Geometry.resize((0, 5), (8, 8)), DataError, "picture is 0x5"),
        "canvas": (lambda: Geometry.resize_pad((9, 9), (8, 8), (6, 8)), DataError, "does not fit"),
        "token": (lambda: grid.box_of(4), SelectionError, "image token 4 does not exist; expected 0 to 3"),
        "lengths": (
            lambda: ImageGrid(1, 1, (5, 5), grid.boxes, grid.cells, grid.views[:2]),
            (DataError, TypeCheckError),
            "4",
        ),
        "nothing": (lambda: join_grids([3]), DataError, "separators alone"),
    }
    call, error, message = calls[kind]
    with pytest.raises(error, match=message) as raised:
        call()
    assert isinstance(raised.value, TypeCheckError) or "\n" not in str(raised.value)
