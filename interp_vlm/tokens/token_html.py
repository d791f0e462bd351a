"""Token maps for notebooks: the picture under its patch grid, and the tokens coloured by role."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PILImage

if TYPE_CHECKING:
    from PIL.Image import Image

    from interp_vlm.tokens.batch import Batch
    from interp_vlm.tokens.grid import ImageGrid
    from interp_vlm.tokens.token_map import TokenMap

__all__ = ["batch_html", "token_map_html"]

# Okabe-Ito hues, lightened: told apart by most colour-blind readers, dark text stays legible on each.
COLOURS = {"image": "#b7e4d1", "question": "#bfdcf5", "template": "#ececec", "bos": "#e6cfe4"}
LAST = "#d55e00"
MUTED = "color:#666;font-size:11px"
CARD = (
    "background:#fff;color:#1a1a1a;border:1px solid #d8d8d8;border-radius:6px;padding:12px 14px;margin:6px 0;"
    "font:13px/1.4 system-ui,sans-serif;text-align:left;max-width:860px"
)
WIDEST, TALLEST, THINNEST = 380.0, 300.0, 36.0
LEGIBLE = 24.0  # a patch this wide on the screen has room for its token's number
SHOWN = 4  # examples of a batch


def batch_html(batch: Batch) -> str:
    """The first examples of a batch, one token map below the other."""
    more = f"<div style='{MUTED}'>and {len(batch) - SHOWN} more: batch[{SHOWN}:]</div>" if len(batch) > SHOWN else ""
    head = f"<div style='font:600 14px system-ui,sans-serif;margin:4px 0'>{escape(repr(batch))}</div>"
    return head + "".join(token_map_html(tokens) for tokens in batch.tokens[:SHOWN]) + more


def token_map_html(tokens: TokenMap) -> str:
    """One example: its question, its pictures with their grids, its tokens with their positions, a legend."""
    pictures = "".join(
        f"<div style='margin:0 18px 8px 0'>{panel}</div>" for number in range(len(tokens.grids))
        for panel in _panels(tokens, number)
    )  # fmt: skip
    title = f"<div style='font-weight:600;margin-bottom:8px'>{escape(tokens.question_text) or 'no question'}</div>"
    pictures = f"<div style='display:flex;flex-wrap:wrap'>{pictures}</div>" if pictures else ""
    row = f"<div style='display:flex;flex-wrap:wrap;gap:3px;align-items:flex-start'>{''.join(_chips(tokens))}</div>"
    return f"<div style='{CARD}'>{title}{pictures}{row}{_legend(tokens)}</div>"


def _legend(tokens: TokenMap) -> str:
    counts = {name: len(tokens.role(name)) for name in COLOURS}
    shown = [
        f"<span style='background:{COLOURS[name]};border-radius:3px;padding:0 6px'>{name}</span> {count}"
        for name, count in counts.items() if count
    ]  # fmt: skip
    last = f"<span style='border:2px solid {LAST};border-radius:3px;padding:0 5px'>last</span> answer position"
    padding = len(tokens.ids) - tokens.length
    rest = [last, f"{tokens.length} tokens" + (f", {padding} padding" if padding else "")]
    return f"<div style='{MUTED};margin-top:9px'>{' &nbsp; '.join(shown + rest)}</div>"


def _chips(tokens: TokenMap) -> Iterator[str]:
    """One chip per token; a run of image tokens, or of padding, makes one chip."""
    role_of = {int(i): name for name in COLOURS for i in tokens.role(name)}
    last, position, width = int(tokens.last), 0, len(tokens.ids)
    while position < width:
        role, stop = role_of.get(position, "padding"), position + 1
        if role in ("image", "padding"):
            while stop < width and role_of.get(stop, "padding") == role and _same_picture(tokens, position, stop):
                stop += 1
        number = int(tokens.image_index[position])
        run = f"picture {number}" if len(tokens.grids) > 1 else "picture"
        label = {"image": f"{run} \u00d7 {stop - position}", "padding": f"padding \u00d7 {stop - position}"}.get(role)
        label = escape(_visible(tokens.pieces[position])) if label is None else f"<i>{label}</i>"
        place = f"{position}\u2013{stop - 1}" if stop - position > 1 else str(position)
        yield _chip(label, place, COLOURS.get(role, "#fff"), position <= last < stop, role)
        position = stop


def _same_picture(tokens: TokenMap, a: int, b: int) -> bool:
    return int(tokens.image_index[a]) == int(tokens.image_index[b])


def _chip(label: str, place: str, colour: str, is_last: bool, role: str) -> str:
    ring = f";outline:2px solid {LAST}" if is_last else ""
    return (
        f"<span title='{role}, position {place}' style='display:inline-flex;flex-direction:column;align-items:center'>"
        f"<span style='background:{colour};border:1px solid #00000018;border-radius:3px;padding:1px 4px;"
        f"min-height:18px;font-family:ui-monospace,monospace;white-space:pre{ring}'>{label}</span>"
        f"<span style='color:#666;font-size:10px'>{place}</span></span>"
    )


def _visible(piece: str) -> str:
    """A token's text with its blanks and line ends made visible."""
    shown = piece.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")
    return shown.replace(" ", "\u00b7") or "\u2205"


def _panels(tokens: TokenMap, number: int) -> Iterator[str]:
    """The picture under the grid of its whole view, and once more under its tiles where it has some."""
    grid, places = tokens.grids[number], tokens.picture_tokens(number).numpy()
    picture = tokens.pictures[number] if number < len(tokens.pictures) else None
    for name, mask in (("", grid.views == 0), ("tiles", grid.views > 0)):
        if (mask & grid.placed).any():
            shape = f"{grid.rows} \u00d7 {grid.cols} patches" if not name else f"{int(mask.sum())} patches of tiles"
            caption = f"picture {number}: {grid.size[0]} \u00d7 {grid.size[1]} px, {shape}"
            caption += f", positions {places[mask].min()}\u2013{places[mask].max()}"
            drawn, note = _svg(grid, places, mask & grid.placed, picture)
            yield f"{drawn}<div style='{MUTED};max-width:{WIDEST + 60:.0f}px'>{caption}{note}</div>"


def _svg(grid: ImageGrid, places: np.ndarray, mask: np.ndarray, picture: Image | None) -> tuple[str, str]:
    """The panel of one view as SVG in screen pixels, and a remark for its caption."""
    width, height, note = _screen_size(*grid.size)
    scale = np.array([width / grid.size[0], height / grid.size[1]] * 2)
    boxes, left, top = grid.boxes * scale, 22, 14
    seen = boxes[mask]
    parts = [f"<rect x='{left}' y='{top}' width='{width:.0f}' height='{height:.0f}' fill='#f4f4f4'/>"]
    if picture is not None:
        pixelated = "image-rendering:pixelated" if picture.width < width else ""
        parts.append(
            f"<image x='{left}' y='{top}' width='{width:.0f}' height='{height:.0f}' preserveAspectRatio='none' "
            f"style='{pixelated}' href='{_data_uri(picture)}'/>"
        )
    x0, y0, x1, y1 = (*seen[:, :2].min(axis=0), *seen[:, 2:].max(axis=0))
    if x0 > 0.5 or y0 > 0.5 or x1 < width - 0.5 or y1 < height - 0.5:
        note += "; grey: not seen by the model"
        outside = f"M0 0H{width:.1f}V{height:.1f}H0ZM{x0:.1f} {y0:.1f}V{y1:.1f}H{x1:.1f}V{y0:.1f}Z"
        parts.append(f"<path transform='translate({left} {top})' d='{outside}' fill='#eee' fill-opacity='.8'/>")
    lines = "".join(f"M{a:.1f} {b:.1f}H{c:.1f}V{d:.1f}H{a:.1f}Z" for a, b, c, d in seen)
    fine = (seen[:, 2] - seen[:, 0]).max() < LEGIBLE / 2
    for stroke, opacity, thick in (("#000", 0.15 if fine else 0.3, 1.6), ("#fff", 0.55 if fine else 0.75, 0.6)):
        parts.append(
            f"<path transform='translate({left} {top})' d='{lines}' fill='none' stroke='{stroke}' "
            f"stroke-opacity='{opacity}' stroke-width='{thick}'/>"
        )
    parts.extend(_numbers(boxes, places, mask, left, top))
    if not (grid.views[mask] > 0).any():
        parts.extend(_ticks(grid, boxes, mask, left, top))
    size = f"width='{width + left + 4:.0f}' height='{height + top + 4:.0f}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} style='display:block'>{''.join(parts)}</svg>", note


def _numbers(boxes: np.ndarray, places: np.ndarray, mask: np.ndarray, left: int, top: int) -> Iterator[str]:
    """The position of each token in its patch: written where there is room, else on hovering."""
    for i in np.flatnonzero(mask):
        x0, y0, x1, y1 = boxes[i]
        yield (
            f"<rect x='{x0 + left:.1f}' y='{y0 + top:.1f}' width='{x1 - x0:.1f}' height='{y1 - y0:.1f}' "
            f"fill-opacity='0'><title>position {places[i]}, image token {i}</title></rect>"
        )
        if x1 - x0 >= LEGIBLE and y1 - y0 >= LEGIBLE / 2:
            yield (
                f"<text x='{(x0 + x1) / 2 + left:.1f}' y='{(y0 + y1) / 2 + top + 3.5:.1f}' text-anchor='middle' "
                f"style='font:600 10px system-ui,sans-serif;fill:#fff;stroke:#000;stroke-width:2.5px;"
                f"paint-order:stroke;pointer-events:none'>{places[i]}</text>"
            )


def _ticks(grid: ImageGrid, boxes: np.ndarray, mask: np.ndarray, left: int, top: int) -> Iterator[str]:
    """Row and column numbers at the picture's edge, as many as there is room for."""
    style = "style='font:10px system-ui,sans-serif;fill:#666'"
    for side, count in ((1, grid.cols), (0, grid.rows)):
        low, high = boxes[:, 1 - side], boxes[:, 3 - side]
        middle = {int(grid.cells[i, side]): float(low[i] + high[i]) / 2 for i in np.flatnonzero(mask)}
        room = (high[mask].max() - low[mask].min()) / 18
        step = max(1, int(np.ceil(count / max(1.0, room))))
        for cell, place in sorted(middle.items()):
            if cell % step == 0 and side:
                yield f"<text x='{place + left:.1f}' y='{top - 4}' text-anchor='middle' {style}>{cell}</text>"
            elif cell % step == 0:
                yield f"<text x='{left - 5}' y='{place + top + 3.5:.1f}' text-anchor='end' {style}>{cell}</text>"


def _screen_size(width: int, height: int) -> tuple[float, float, str]:
    scale = min(WIDEST / width, TALLEST / height)
    shown = width * scale, height * scale
    wide, tall = max(shown[0], THINNEST), max(shown[1], THINNEST)
    return wide, tall, "; stretched to be readable" if (wide, tall) != shown else ""


def _data_uri(picture: Image) -> str:
    """The picture inside the page: small ones exactly, large ones shrunk."""
    small, kind = picture.convert("RGB"), "PNG"
    if max(small.size) > 128:
        kind, (width, height, _) = "JPEG", _screen_size(*small.size)
        sharp = min(small.width, round(2 * width)), min(small.height, round(2 * height))
        small = small.resize(sharp, PILImage.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
