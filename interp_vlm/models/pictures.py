"""Pictures of every mode, from a file or from memory, as plain upright 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from interp_vlm.errors import DataError

__all__ = ["Picture", "read_picture"]

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image"
"""A picture as callers give it: a path or a PIL image of any mode."""

_FAULTS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises for broken files: SyntaxError for bad PNG chunks, ValueError for impossible sizes."""
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def read_picture(picture: Picture) -> Image.Image:
    """The picture as an upright RGB image: EXIF rotation applied, transparency over white, 16 bits scaled to 8.

    Args:
        picture: a path or a PIL image; of an animation the first frame is taken.

    Raises:
        DataError: if it cannot be read as a picture, or has no pixels.

    Example:
        >>> read_picture(Image.new("RGBA", (4, 2), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    if isinstance(picture, Image.Image):
        name, image = f"a {picture.mode} image of {picture.width}x{picture.height} pixels", picture
    elif isinstance(picture, (str, os.PathLike)):
        name, image = str(picture), None
    else:
        raise DataError(
            f"a {type(picture).__name__} is not a picture", expected="a path or a PIL image",
            remedy="convert arrays with PIL.Image.fromarray",
        )  # fmt: skip
    try:
        if image is None:
            image = _read(Path(name))
        upright = _to_rgb(ImageOps.exif_transpose(image)) if min(image.size) else image
    except FileNotFoundError:
        remedy = "download it first" if "://" in name else "check the path"
        raise DataError(f"picture {name} does not exist", expected="a readable image file", remedy=remedy) from None
    except _FAULTS as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"picture {name} cannot be read ({why})", expected="a readable image file") from error
    if not min(upright.size):
        raise DataError(f"picture {name} is empty", expected="at least 1x1 pixels")
    return upright


def _read(path: Path) -> Image.Image:
    """The decoded picture: none larger than Pillow's limit; odd metadata beside good pixels is passed over."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("not a regular file")  # opening a pipe would wait for its writer for ever
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # opened here, as Pillow leaves a file open whose first bytes it cannot read
        with path.open("rb") as file, Image.open(file) as opened:
            opened.load()
            return opened


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BITS:
        values = np.asarray(image).astype(np.float64)
        # PIL gives mode "I" both to 16-bit files and to 8-bit values held in wider integers
        if image.mode != "I" or values.max() > 255:
            values = values / 257
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # a plain copy: no file handle, no metadata, nothing shared with the caller's image
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())
