"""Pictures of every mode become what a person sees, as upright 8-bit RGB."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from interp_vlm.errors import DataError
from interp_vlm.models.pictures import read_picture
from tests.models.tiny_model import noise

RED = (200, 30, 10)


def corner(image: Image.Image) -> tuple[int, ...]:
    return read_picture(image).getpixel((0, 0))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "I", "F"])
def test_every_mode_becomes_rgb_of_the_same_size(mode):
    source = noise(7, 5)
    image = source.convert("LA").convert("PA") if mode == "PA" else source.convert(mode)
    found = read_picture(image)
    assert (found.mode, found.size) == ("RGB", (7, 5))
    assert found.getexif() == {}


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.new("L", (2, 2), 77), (77, 77, 77)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (*RED, 255)), RED),
        (Image.new("RGBA", (2, 2), (*RED, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 51)), (204, 204, 204)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I", (2, 2), 200), (200, 200, 200)),
        (Image.new("I", (2, 2), 257 * 99), (99, 99, 99)),
        (Image.fromarray(np.full((2, 2), 257 * 99, np.uint16)), (99, 99, 99)),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), (255, 255, 255)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_values_are_what_a_person_sees(image, seen):
    assert corner(image) == seen


def saved(image: Image.Image, kind: str, **kwargs) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return Image.open(io.BytesIO(buffer.getvalue()))


def test_sixteen_bit_files_keep_their_grey_levels():
    values = np.linspace(0, 65535, 12, dtype=np.uint16).reshape(3, 4)
    found = np.asarray(read_picture(saved(Image.fromarray(values), "PNG")))
    assert np.array_equal(found[..., 0], np.rint(values / 257))


def test_a_transparent_palette_colour_becomes_white():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    assert corner(saved(image, "GIF")) == RED
    assert corner(saved(image, "GIF", transparency=1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("orientation", "size", "place"), [(1, (4, 2), (0, 0)), (3, (4, 2), (3, 1)), (6, (2, 4), (1, 0))]
)
def test_a_rotated_photograph_stands_upright(orientation, size, place):
    image = Image.new("RGB", (4, 2), (0, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read_picture(saved(image, "PNG", exif=exif))
    assert found.size == size
    assert found.getpixel(place) == (255, 255, 255)


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (3, 3), RED), Image.new("RGB", (3, 3), (0, 0, 255))]
    assert corner(saved(frames[0], "PNG", save_all=True, append_images=frames[1:])) == RED


def test_reading_is_idempotent_and_leaves_the_original_alone():
    image = noise(5, 4).convert("RGBA")
    before = image.tobytes()
    once = read_picture(image)
    assert read_picture(once).tobytes() == once.tobytes()
    once.putpixel((0, 0), (1, 2, 3))
    assert image.tobytes() == before


def test_paths_are_read_and_files_closed(tmp_path):
    noise(6, 4).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").tobytes() == noise(6, 4).tobytes()
    assert read_picture(str(tmp_path / "a.png")).size == (6, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.png", "absent.png does not exist"),
        (lambda folder: folder, "cannot be read"),
        (lambda folder: _file(folder, "text.png", b"not a picture"), "text.png cannot be read"),
        (lambda folder: _file(folder, "cut.png", _png()[:60]), "cut.png cannot be read"),
        (lambda folder: _file(folder, "empty.jpg", b""), "empty.jpg cannot be read"),
        (lambda folder: Image.new("RGB", (0, 5)), "0x5 pixels is empty"),
    ],
)
def test_what_is_no_picture_is_named_in_one_line(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as refused:
        read_picture(make(tmp_path))
    assert "\n" not in str(refused.value)


def _png() -> bytes:
    buffer = io.BytesIO()
    noise(30, 30).save(buffer, "PNG")
    return buffer.getvalue()


def _file(folder, name, content):
    (folder / name).write_bytes(content)
    return folder / name
