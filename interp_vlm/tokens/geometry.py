"""How a processor maps an original picture to the pixels that the vision tower sees, and back."""

from __future__ import annotations

from dataclasses import dataclass

from interp_vlm.errors import DataError

__all__ = ["Geometry"]


def _pixels(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height as positive ints, or a DataError naming the argument."""
    width, height = (int(side) for side in size)
    if width < 1 or height < 1:
        raise DataError(f"{name} is {width}x{height}", expected="at least 1x1 pixels (width, height)")
    return width, height


@dataclass(frozen=True)
class Geometry:
    """One affine map per axis between the original picture and the canvas that the vision tower sees.

    `tower = original * scale + offset`, so `original = (tower - offset) / scale`. Resizing sets the scale, cropping a
    negative offset, padding a positive one. Coordinates are continuous: pixel i covers [i, i + 1).

    Attributes:
        size: original picture, (width, height) in pixels, after the EXIF transpose.
        canvas: what the tower sees, (width, height) in pixels.
        scale: tower pixels per original pixel, (x, y).
        offset: tower coordinates of the original's top left corner, (x, y).

    Example:
        >>> crop = Geometry.resize_crop((640, 480), to=(448, 336), crop=(336, 336))
        >>> crop.to_picture(0, 0), crop.visible
        ((80.0, 0.0), (80.0, 0.0, 560.0, 480.0))
    """

    size: tuple[int, int]
    canvas: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def resize(cls, size: tuple[int, int], to: tuple[int, int]) -> Geometry:
        """The whole picture stretched to `to` (width, height); the two axes may scale differently."""
        size, to = _pixels("the picture", size), _pixels("the resized picture", to)
        return cls(size, to, (to[0] / size[0], to[1] / size[1]))

    @classmethod
    def resize_crop(cls, size: tuple[int, int], to: tuple[int, int], crop: tuple[int, int]) -> Geometry:
        """Resize to `to`, then cut the centre `crop` (padding where the crop is larger), rounding as
        `transformers.image_transforms.center_crop` does."""
        resized, crop = cls.resize(size, to), _pixels("the crop", crop)
        left, top = ((have - want) // 2 for have, want in zip(resized.canvas, crop, strict=True))
        return resized.window(left, top, *crop)

    @classmethod
    def resize_pad(
        cls, size: tuple[int, int], to: tuple[int, int], canvas: tuple[int, int], offset: tuple[int, int] | None = None
    ) -> Geometry:
        """Resize to `to`, then lay it on a larger `canvas` at `offset` (left, top).

        `offset=None` centres it, the odd pixel going to the right and bottom; `(0, 0)` pads right and bottom only.
        """
        resized, canvas = cls.resize(size, to), _pixels("the canvas", canvas)
        if resized.canvas[0] > canvas[0] or resized.canvas[1] > canvas[1]:
            raise DataError(f"a picture resized to {to} does not fit the canvas {canvas}", expected="to <= canvas")
        left, top = ((canvas[0] - to[0]) // 2, (canvas[1] - to[1]) // 2) if offset is None else offset
        return resized.window(-left, -top, *canvas)

    def window(self, left: float, top: float, width: int, height: int) -> Geometry:
        """The same map seen through a window of the canvas (a tile, a crop; negative `left`, `top` pad)."""
        moved = (self.offset[0] - left, self.offset[1] - top)
        return Geometry(self.size, _pixels("the window", (width, height)), self.scale, moved)

    def to_tower(self, x: float, y: float) -> tuple[float, float]:
        """Original coordinates -> canvas coordinates (outside the canvas when the tower does not see the point)."""
        return x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]

    def to_picture(self, x: float, y: float) -> tuple[float, float]:
        """Canvas coordinates -> original coordinates, clipped to the picture."""
        across, down = (x - self.offset[0]) / self.scale[0], (y - self.offset[1]) / self.scale[1]
        return min(max(across, 0.0), float(self.size[0])), min(max(down, 0.0), float(self.size[1]))

    @property
    def visible(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of the part of the original picture that the tower sees."""
        return (*self.to_picture(0, 0), *self.to_picture(*self.canvas))
