"""Bad pictures: each goes through `vlm.encode`, through a table that names it, and through `interp-vlm inspect`."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.corpus.row import Bad

__all__ = ["IMAGES"]

RED, BLUE = (200, 30, 10), (0, 0, 255)


def colours(width: int = 40, height: int = 30) -> Image.Image:
    """A picture that no two of whose rows or columns are alike."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 5 % 256, y * 7 % 256, (x + y) * 3 % 256], -1).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def file(content: bytes | Callable[[], bytes], name: str = "x.png") -> Callable[[Path], Path]:
    """A file of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())
        return folder / name

    return make


def link(target: str) -> Callable[[Path], Path]:
    """A symbolic link."""

    def make(folder: Path) -> Path:
        (folder / "x.png").symlink_to(target)
        return folder / "x.png"

    return make


def header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 50)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def animation(form: str) -> Callable[[], bytes]:
    frames = [Image.new("RGB", (24, 16), RED), Image.new("RGB", (24, 16), BLUE)]
    lossless = {"lossless": True} if form == "WEBP" else {}
    return lambda: encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **lossless)


def see_through() -> bytes:
    image = Image.new("P", (24, 16), 1)
    image.putpalette([0, 0, 0, *RED])
    return encoded(image, "PNG", transparency=1)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(colours(), "JPEG", exif=exif)


def nonsense_exif() -> bytes:
    """Good pixels beside metadata that end in the middle."""
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010E] = "a description that is cut"
    return encoded(colours(), "JPEG", exif=exif.tobytes()[:30])


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "x.png")
    return folder / "x.png"


def folder_named(folder: Path) -> Path:
    (folder / "x.png").mkdir()
    return folder / "x.png"


def shows(*size: int, colour: tuple[int, int, int] | None = None) -> Callable[[Image.Image], None]:
    """What the model is shown has this size, and this colour in the middle."""

    def check(seen: Image.Image) -> None:
        assert (seen.mode, seen.size) == ("RGB", size)
        if colour is not None:
            found = seen.getpixel((size[0] // 2, size[1] // 2))
            assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 3, found

    return check


GREY = np.full((16, 24), 257 * 99, np.uint16)
JPEG, PNG = encoded(colours(), "JPEG"), encoded(colours(), "PNG")

IMAGES = (
    Bad("truncated-png", file(PNG[: len(PNG) // 2]), r"x\.png.*(?i:truncated|broken)"),
    Bad("truncated-jpeg", file(JPEG[:-300], "x.jpg"), r"x\.jpg.*(?i:truncated)"),
    Bad("png-of-its-signature-alone", file(PNG[:8]), r"x\.png"),
    Bad("zero-bytes", file(b""), r"x\.png.*(empty file|cannot identify)"),
    Bad("text-named-png", file(b"<html><body>404 not found</body></html>"), r"x\.png.*(not a picture|identify)"),
    Bad("svg", file(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "x.svg"), r"x\.svg"),
    Bad("bomb-sized-header", file(header(100_000, 100_000)), r"x\.png.*(bomb|exceeds limit)"),
    Bad("header-of-half-a-bomb", file(header(10_000, 10_000)), r"x\.png.*(bomb|exceeds limit)"),
    Bad("gif-without-pixels", file(b"GIF89a" + bytes(7) + b";", "x.gif"), r"x\.gif"),
    Bad("folder-named-png", folder_named, r"x\.png.*(a folder|[Ii]s a directory)"),
    Bad("broken-link", link("nowhere.png"), r"x\.png.*(missing|does not exist)"),
    Bad("link-to-itself", link("x.png"), r"x\.png.*(missing|symbolic links)"),
    # nobody, root included, can read this "regular file" at its start
    Bad("unreadable-file", link("/proc/self/mem"), r"x\.png.*(empty file|Input/output error|I/O)"),
    Bad("pipe-that-nobody-writes", pipe, r"x\.png.*not a regular file"),
    Bad("endless-device", link("/dev/zero"), r"x\.png.*not a regular file"),
    Bad("web-address", lambda _: Path("https://example.org/x.png"), r"example\.org/x\.png.*(missing|does not exist)"),
    Bad("endless-name", lambda folder: folder / ("x" * 5000), r"[Nn]ame too long"),
    Bad("nul-in-the-name", lambda folder: folder / "a\0b.png", r"a\\x00b\.png.*(missing|null byte)"),
    Bad("line-break-in-the-name", lambda folder: folder / "a\nb.png", r"a b\.png.*(missing|does not exist)"),
    Bad("somebody-else-s-home", lambda _: Path("~nobody-there/x.png"), r"~nobody-there/x\.png"),
    Bad("absent", lambda folder: folder / "x.png", r"x\.png.*(missing|does not exist)"),
    Bad("jpeg-named-png", file(JPEG), recovers=shows(40, 30)),
    Bad("no-extension", file(PNG, "x"), recovers=shows(40, 30)),
    Bad("cmyk", file(encoded(Image.new("CMYK", (24, 16), (0, 255, 255, 0)), "JPEG")), recovers=shows(24, 16)),
    Bad("sixteen-bits", file(encoded(Image.fromarray(GREY), "PNG")), recovers=shows(24, 16, colour=(99, 99, 99))),
    Bad("animated-gif", file(animation("GIF")), recovers=shows(24, 16, colour=RED)),
    Bad("animated-webp", file(animation("WEBP")), recovers=shows(24, 16, colour=RED)),
    Bad("transparent-palette", file(see_through), recovers=shows(24, 16, colour=(255, 255, 255))),
    Bad("turned-by-exif", file(turned), recovers=shows(30, 40)),
    Bad("exif-cut-short", file(nonsense_exif), recovers=shows(40, 30)),
    Bad("one-pixel", file(encoded(Image.new("RGB", (1, 1), RED), "PNG")), recovers=shows(1, 1, colour=RED)),
    Bad("one-by-five-thousand", file(encoded(colours(1, 5000), "PNG")), recovers=shows(1, 5000)),
)
