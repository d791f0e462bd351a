"""Where a token says it is in the picture, there the picture moves it: through processor, tower and projector."""

from __future__ import annotations

import copy
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from interp_vlm.errors import ModelError
from interp_vlm.models.layout import canvas_of
from tests.models.tiny_model import Tiny, noise
from tests.tiny import FAMILIES, build

SIZES = [(120, 120), (200, 90), (70, 180)]


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    return float(np.prod(np.clip(sides, 0, None)))


def base_picture(size: tuple[int, int]) -> Image.Image:
    """Soft coloured blobs: neither flat nor so loud that one patch more or less drowns."""
    small = noise(5, 5, seed=3).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(Image.new("RGB", size, (128, 128, 128)), small, 0.3)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_painting_a_token_s_box_moves_that_token_most(tiny, size):
    """Within each view, the token moved most lies on the painted box (its neighbours share the box in other views)."""
    base = base_picture(size)
    grid = tiny.encode(base, "a cat?").tokens[0].grids[0]
    placed = np.flatnonzero(grid.placed)
    chosen = placed[:: max(1, len(placed) // 24)]
    painted = []
    for token in chosen:
        x0, y0, x1, y1 = grid.boxes[token]
        picture = base.copy()
        inner = (
            math.ceil(x0),
            math.ceil(y0),
            max(math.floor(x1) - 1, math.ceil(x0)),
            max(math.floor(y1) - 1, math.ceil(y0)),
        )
        ImageDraw.Draw(picture).rectangle(inner, fill=(255, 0, 0))
        painted.append(picture)
    batch = tiny.encode([base, *painted], "a cat?")
    assert {tokens.grids[0] for tokens in batch.tokens} == {grid}
    clean, *moved = tiny.image_embeddings(batch)
    for token, features in zip(chosen, moved, strict=True):
        change = (features - clean).norm(dim=-1).numpy()
        view = grid.views == grid.views[token]
        most = np.flatnonzero(view)[change[view].argmax()]
        # features that are interpolated to fewer tokens share patches with their neighbours
        apart = np.abs(grid.cells[most] - grid.cells[token]).max()
        assert apart <= int(grid.vision_rows is None), (grid.cells[token], grid.cells[most])
        assert most == token or apart == 1
        others = np.unique(grid.views[(grid.views >= 0) & (grid.views != grid.views[token])])
        for other in others:
            members = np.flatnonzero((grid.views == other) & grid.placed)
            seen = np.array([overlap(grid.boxes[member], grid.boxes[token]) for member in members])
            if seen.max() > 0.5 * overlap(grid.boxes[token], grid.boxes[token]):
                most = members[change[members].argmax()]
                assert overlap(grid.boxes[most], grid.boxes[token]) > 0, (token, other)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_exactly_the_stated_rows_of_the_tower_feed_a_token(tiny, size):
    """Moving the rows of one token, in the last vision layer that is read, moves that token and no other."""
    batch = tiny.encode([[base_picture(size), noise(90, 120)], [noise(64, 64)]], ["a cat?", "a big dog?"])
    grids = [grid for tokens in batch.tokens for grid in tokens.grids]
    path = f"{tiny.anatomy.vision_layers}.{tiny.anatomy.vision_read}"
    module = tiny.model.get_submodule(path)
    clean = torch.cat(tiny.image_embeddings(batch))
    seen: list[int] = []

    def moving(rows: np.ndarray):
        def hook(_, args, output):
            value = (output[0] if isinstance(output, tuple) else output).clone(memory_format=torch.contiguous_format)
            flat = value.view(-1, value.shape[-1])
            seen.append(len(flat))
            flat[torch.from_numpy(rows)] *= -1.0
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    rng = np.random.default_rng(0)
    first_row = first_token = 0
    for grid in grids:
        if grid.vision_rows is not None:
            known = np.flatnonzero((grid.vision_rows >= 0).all(axis=1))
            assert len(known) == np.isin(grid.views, (-1,), invert=True).sum()
            for token in {known[0], known[-1], *rng.choice(known, 4)}:
                hook = module.register_forward_hook(moving(first_row + grid.vision_rows[token]), prepend=True)
                try:
                    moved = torch.cat(tiny.image_embeddings(batch))
                finally:
                    hook.remove()
                changed = (moved != clean).any(dim=-1).nonzero().flatten().tolist()
                assert changed == [first_token + token]
        first_row += grid.vision_total
        first_token += grid.n
    assert set(seen) == {first_row}, "the stated totals must add up to the tower's rows"


@pytest.mark.parametrize(
    "size", [*SIZES, (1, 1), (301, 77), (30, 4000), (4000, 30)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_a_grid_has_the_processor_s_number_of_tokens_and_lies_in_the_picture(tiny, size):
    batch = tiny.encode(noise(*size), "a cat?")
    tokens = batch.tokens[0]
    grid = tokens.grids[0]
    assert grid.n == len(tokens.image) == int((batch.inputs["input_ids"] == tiny.anatomy.image_token_id).sum())
    assert grid.size == size
    boxes = grid.boxes[grid.placed]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= np.array(size) + 1e-9).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    for view in np.unique(grid.views[grid.views >= 0]):
        own = grid.boxes[(grid.views == view) & grid.placed]
        area = np.prod(own[:, 2:] - own[:, :2], axis=1).sum()
        union = np.prod(own[:, 2:].max(axis=0) - own[:, :2].min(axis=0)) if len(own) else 0.0
        assert area == pytest.approx(union), "the boxes of a view tile a rectangle without gap or overlap"
    whole = grid.boxes[(grid.views == 0) & grid.placed]
    seen = np.prod(whole[:, 2:] - whole[:, :2], axis=1).sum() / np.prod(size)
    if tiny.name == "llava":  # centre crop: a square out of the middle, to the processor's rounding
        assert seen == pytest.approx(min(size) / max(size), rel=0.1)
    else:
        assert seen == pytest.approx(1.0)


def test_llava_1_5_has_24_by_24_tokens_of_the_centre_square():
    grid = published("llava").encode(noise(640, 480), "a cat?").tokens[0].grids[0]
    assert (grid.rows, grid.cols, grid.n, grid.vision_total) == (24, 24, 576, 577)
    assert grid.box_of(0) == pytest.approx((80, 0, 100, 20))
    assert grid.box_of(575) == pytest.approx((540, 460, 560, 480))
    assert grid.vision_rows[:, 0].tolist() == list(range(1, 577))


def test_llava_s_own_image_processor_pads_to_a_square():
    from transformers import LlavaImageProcessorPil

    images = LlavaImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, do_pad=True)
    geometry = canvas_of(images, (48, 24), (24, 24))
    assert geometry.to_picture(0, 0) == (0, 0)
    assert geometry.to_tower(0, 0) == (0, 6)
    assert geometry.to_tower(48, 24) == (24, 18)
    white = np.asarray(images([Image.new("RGB", (48, 24), "white")], return_tensors="np")["pixel_values"])[0, 0]
    inside = np.isclose(white, white.max(), atol=0.05)
    assert inside[7:17].all()
    assert not inside[:5].any()
    assert not inside[19:].any()


def test_strategy_full_keeps_the_class_token_first_and_without_a_place():
    tiny = Tiny("llava")
    config = copy.deepcopy(tiny.model.config)
    config.vision_feature_select_strategy = "full"
    inputs = {"pixel_values": torch.zeros(1, 3, 24, 24)}
    grid = tiny.family.grids(tiny.processor, [[noise(40, 40)]], inputs, config)[0][0]
    assert grid.n == 37
    assert not grid.placed[0]
    assert grid.placed[1:].all()
    assert grid.vision_rows[:, 0].tolist() == list(range(37))


def test_onevision_scales_many_tiles_down():
    """Above the limit of tiles the features are interpolated: fewer tokens, boxes still tile the picture."""
    tiny = Tiny("llava_onevision")
    grid = tiny.encode(noise(300, 300), "a cat?").tokens[0].grids[0]
    tiles = grid.views > 0
    assert tiles.sum() == 36 < 81
    assert grid.vision_rows is None
    area = np.prod(grid.boxes[tiles][:, 2:] - grid.boxes[tiles][:, :2], axis=1).sum()
    assert area == pytest.approx(300 * 300)


def test_settings_that_do_not_explain_the_pixels_are_refused():
    images = build("llava")[1].image_processor
    with pytest.raises(ModelError, match="turned a picture of 40x30 into 32x24 pixels; expected 24x24"):
        canvas_of(images, (40, 30), (32, 24))


def test_every_family_is_here():
    assert len(FAMILIES) == 12


_CROP = {"height": 336, "width": 336}
PUBLISHED = {
    "llava": {"size": {"shortest_edge": 336}, "crop_size": _CROP, "pixels": 336, "patch": 14},
    "llava_next": {"size": {"shortest_edge": 336}, "crop_size": _CROP, "pixels": 336, "patch": 14},
    "llava_onevision": {"size": {"height": 384, "width": 384}, "pixels": 384, "patch": 14},
    "paligemma": {"size": {"height": 448, "width": 448}, "pixels": 448, "patch": 14},
    "gemma3": {"size": {"height": 896, "width": 896}, "pixels": 896, "patch": 14},
    "qwen2_vl": {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}, "patch": 14},
    "internvl": {"size": {"height": 448, "width": 448}, "pixels": 448, "patch": 14, "max_patches": 12},
    "idefics3": {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}, "pixels": 364, "patch": 14},
    "smolvlm": {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}, "pixels": 512, "patch": 16},
}  # fmt: skip


def published(name: str) -> Tiny:
    """A tiny model's configuration and processor in the sizes of a published checkpoint; no model behind it."""
    tiny = Tiny(name)
    tiny.processor, config = copy.deepcopy(tiny.processor), copy.deepcopy(tiny.model.config)
    settings = dict(PUBLISHED[name])
    patch, pixels = settings.pop("patch"), settings.pop("pixels", None)
    pair = name == "internvl"
    config.vision_config.patch_size = (patch, patch) if pair else patch
    if pixels:
        config.vision_config.image_size = (pixels, pixels) if pair else pixels
    images, side = tiny.processor.image_processor, (pixels or 0) // patch
    if name in ("llava", "llava_next"):
        tiny.processor.patch_size = patch
    if name in ("llava_next", "llava_onevision"):
        config.image_grid_pinpoints = settings["image_grid_pinpoints"] = type(images).image_grid_pinpoints
    if name == "llava_onevision":
        tiny.processor.num_image_tokens, tiny.processor.vision_aspect_ratio = side**2, "anyres_max_9"
        config.vision_aspect_ratio = "anyres_max_9"
    if name == "paligemma":
        tiny.processor.image_seq_length = side**2
    if name == "gemma3":
        config.mm_tokens_per_image, soft = 256, tiny.processor.tokenizer.image_token
        tiny.processor.full_image_sequence = f"\n\n{tiny.processor.boi_token}{soft * 256}<end_of_image>\n\n"
    if name == "internvl":
        tiny.processor.image_seq_length = 256
    if name in ("idefics3", "smolvlm"):
        config.scale_factor = 2 if name == "idefics3" else 4
        tiny.processor.image_seq_len = (side // config.scale_factor) ** 2
    tiny.processor.image_processor = type(images)(**{**images.to_dict(), "patch_size": patch, **settings})
    tiny.model = types.SimpleNamespace(config=config)
    return tiny


@pytest.mark.parametrize("name", PUBLISHED)
def test_in_published_sizes_too_the_grid_counts_what_the_processor_counts(name):
    tiny = published(name)
    rng = np.random.default_rng(0)
    sizes = [(640, 480), (480, 640), (1000, 1000), (33, 900), (1, 1)]
    sizes += [tuple(int(side) for side in np.exp(rng.uniform(np.log(20), np.log(1500), 2))) for _ in range(4)]
    for size in sizes:
        batch = tiny.encode(Image.new("RGB", size), "a cat?")  # build_maps refuses a grid of another length
        grid = batch.tokens[0].grids[0]
        boxes = grid.boxes[grid.placed]
        assert (boxes[:, 2:] <= np.array(size) + 1e-6).all()
        for view in np.unique(grid.views[grid.views > 0]):
            corner = grid.boxes[(grid.views == view) & (grid.cells == 0).all(axis=1)]
            assert len(corner) <= 1
