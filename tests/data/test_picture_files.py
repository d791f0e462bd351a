"""Every picture mode opens; every way of being broken has its own reason; nothing else leaks out of Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from interp_vlm.data.example import Example
from interp_vlm.data.images import Candidate, gather, image_fault, open_image
from interp_vlm.errors import DataError
from tests.data.conftest import picture


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


MODES = [
    ("L", "PNG"),
    ("LA", "PNG"),
    ("RGBA", "PNG"),
    ("P", "PNG"),
    ("P", "GIF"),
    ("1", "PNG"),
    ("I;16", "PNG"),
    ("CMYK", "JPEG"),
    ("L", "JPEG"),
    ("RGB", "WEBP"),
    ("RGB", "BMP"),
    ("RGB", "TIFF"),
    ("CMYK", "TIFF"),
]


@pytest.mark.parametrize(("mode", "form"), MODES)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (4000, 30)])
def test_every_mode_and_shape_opens_as_it_is(tmp_path, mode, form, size):
    path = tmp_path / f"p.{form.lower()}"
    source = Image.new("I;16", size, 40_000) if mode == "I;16" else picture(0, size).convert(mode)
    source.save(path, form)
    assert image_fault(path) is None
    opened = open_image(path)
    assert opened.size == size
    assert opened.mode == mode
    path.unlink()  # nothing is read after opening
    assert np.asarray(opened).shape[:2] == size[::-1]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_survives_closing_the_file(tmp_path, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned"
    picture(0).save(path, form, exif=exif)
    opened = open_image(path)
    path.unlink()
    assert ImageOps.exif_transpose(opened).size == (30, 40)  # of 40 x 30, turned by the tag (TIFF: by Pillow itself)


def bomb(width: int = 100_000, height: int = 100_000) -> bytes:
    """A PNG of a few bytes that claims ten thousand million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 50)) + chunk(b"IEND", b"")
    )


BROKEN = {
    "missing": (None, "missing"),
    "empty": (b"", "empty file"),
    "web page": (b"<html><body>404</body></html>", "not a picture"),
    "truncated jpeg": (encoded(picture(0, (64, 64)), "JPEG")[:-200], "truncated"),
    "truncated png": (encoded(picture(0, (64, 64)), "PNG")[:-200], "truncated"),
    "bomb": (bomb(), "decompression bomb"),
    "large enough for Pillow's warning": (bomb(10_000, 10_000), "decompression bomb"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_said(tmp_path, name):
    data, reason = BROKEN[name]
    path = tmp_path / "p.jpg"
    if data is not None:
        path.write_bytes(data)
        assert image_fault(data) is not None
    assert reason in (image_fault(path) or "")
    with pytest.raises(DataError) as error:
        open_image(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)


def test_a_folder_is_no_picture(tmp_path):
    assert image_fault(tmp_path) == "a folder"


WHOLE = {form: encoded(picture(3, (24, 16)), form) for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")}


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_damage_is_a_reason_or_harmless_but_never_another_exception(form, data):
    damaged = bytearray(WHOLE[form])
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    if image_fault(damaged) is None:
        try:
            open_image(damaged)
        except DataError:
            assert form == "JPEG"  # damage below the eighth-size preview shows only at full size
    else:
        with pytest.raises(DataError):
            open_image(damaged)


def candidates(names, folder):
    return [Candidate(Example(str(i), picture(0), "q", "a"), name, folder / name) for i, name in enumerate(names)]


def test_broken_pictures_are_listed_ten_and_counted(tmp_path):
    picture(0).save(tmp_path / "good.png")
    rows = candidates(["good.png"] + [f"lost{i}.jpg" for i in range(12)] * 2, tmp_path)
    with pytest.raises(DataError) as error:
        gather(rows, "questions.csv", limit=None, on_error="raise")
    message = str(error.value)
    assert message.startswith("12 of 13 pictures of questions.csv cannot be read: lost0.jpg (missing), lost1.jpg")
    assert "lost9.jpg (missing) and 2 more" in message
    assert "lost10.jpg" not in message
    assert "\n" not in message
    kept = gather(rows, "questions.csv", limit=None, on_error="skip")
    assert (len(kept), len(kept.skipped)) == (1, 24)
    assert kept.skipped[0].path == "lost0.jpg"


def test_limit_counts_examples_that_can_be_used(tmp_path):
    picture(0).save(tmp_path / "good.png")
    rows = candidates(["lost.jpg", "good.png", "good.png", "good.png"], tmp_path)
    assert [example.id for example in gather(rows, "x", limit=2, on_error="skip")] == ["1", "2"]
    assert len(gather(rows[1:], "x", limit=2, on_error="raise")) == 2
    with pytest.raises(DataError, match="1 of 2 pictures"):
        gather(rows, "x", limit=2, on_error="raise")
    with pytest.raises(DataError, match="1 of 1 pictures"):
        gather(rows[:1], "x", limit=None, on_error="skip")  # nothing left is no data set


def test_options_are_checked():
    with pytest.raises(DataError, match="limit is 0"):
        gather([], "x", limit=0, on_error="raise")
    with pytest.raises(DataError, match="on_error is 'ignore'"):
        gather([], "x", limit=None, on_error="ignore")
