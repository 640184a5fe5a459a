"""Pieces of self-contained pages: everything inlined, every name escaped, nothing fetched and no script run."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any, Sequence

import numpy as np
from PIL import Image

__all__ = ["BARS_STYLE", "bytes_image", "colour_scale", "page", "pixels_image", "side_by_side", "stacked_bars", "table"]

STYLE = """
:root{color-scheme:light}
body{font:16px/1.5 system-ui,sans-serif;color:#222;background:#fff;max-width:62rem;margin:0 auto;padding:0 1rem 3rem}
h1{font-size:1.5rem;margin:1.2rem 0 .3rem;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2rem 0 .5rem}
p,li,figcaption,td{overflow-wrap:anywhere}a{color:#1a5a96}
.big{font-size:1.15rem}.note{color:#555;font-size:.9rem}.scroll{overflow-x:auto}
.warnings{background:#fdf3dc;border-left:4px solid #d9a21b;padding:.5rem 1rem;margin:.5rem 0}
.warnings ul{margin:0;padding-left:1.1rem}
pre{background:#f4f4f4;padding:.7rem;white-space:pre-wrap;overflow-wrap:anywhere;font-size:.85rem}
table{border-collapse:collapse;font-size:.9rem}td,th{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top}
td.n,th.n{text-align:right}
.plots{display:flex;flex-wrap:wrap;gap:.5rem}.plots img{width:30rem;max-width:100%;height:auto}
.wide img{min-width:34rem;max-width:100%;height:auto}
.mistakes{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,28rem),1fr));gap:.6rem 1.5rem}
.mistake{margin:0 0 .8rem}.strip{display:flex;gap:.3rem}
.strip div{flex:0 1 8rem;min-width:0;text-align:center;font-size:.75rem;color:#555}.strip img{width:100%;display:block}
"""
BARS_STYLE = """
.bars{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .6rem;align-items:center;max-width:40rem;
font-size:.8rem}
.bar{display:flex;height:1.1rem}.bar span{overflow:hidden;color:#111;font-size:.7rem;line-height:1.1rem;
padding-left:.2rem;box-sizing:border-box;white-space:nowrap}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.8rem;margin:.4rem 0}
.key i{display:inline-block;width:.9rem;height:.9rem;margin-right:.3rem;vertical-align:-.1rem}
.scale{margin:.6rem 0;display:flex;align-items:center;gap:.5rem;font-size:.8rem}.scale b{width:12rem;height:.8rem}
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body></html>
"""


def page(title: str, body: str) -> str:
    """A whole page; `body` is HTML. The browser is told to fetch nothing and to run nothing."""
    return PAGE.format(title=escape(title), style=STYLE + BARS_STYLE, body=body)


def _data(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def bytes_image(picture: bytes, alt: str) -> str:
    """A PNG file, inlined."""
    width, height = Image.open(io.BytesIO(picture)).size
    return f'<img src="{_data(picture, "png")}" alt="{escape(alt)}" width="{width}" height="{height}">'


def side_by_side(pictures: Sequence[bytes], columns: int) -> bytes:
    """PNG files of one size as one PNG, row by row."""
    images = [Image.open(io.BytesIO(picture)) for picture in pictures]
    width, height = images[0].size
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def pixels_image(pixels: np.ndarray, alt: str, side: int = 160) -> str:
    """An image (H, W, 3), uint8 or in [0, 1], inlined with `side` pixels on its longer side; small ones stay sharp."""
    if pixels.dtype != np.uint8:
        pixels = np.round(255 * pixels).astype(np.uint8)
    image = Image.fromarray(pixels)
    factor = side / max(image.size)
    size = tuple(max(1, round(factor * n)) for n in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return f'<img src="{_data(buffer.getvalue(), "jpeg")}" alt="{escape(alt)}">'


def table(rows: Sequence[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """A table of escaped cells; numbers stand at the right."""

    def cell(value: Any, tag: str) -> str:
        kind = ' class="n"' if isinstance(value, (int, float)) else ""
        return f"<{tag}{kind}>{escape(str(value))}</{tag}>"

    top = f"<tr>{''.join(cell(name, 'th') for name in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(cell(value, 'td') for value in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def stacked_bars(rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], colours: Sequence[str]) -> str:
    """For each (name, shares that sum to 1) a bar of parts, with their key."""
    key = "".join(
        f'<span><i style="background:{colours[i % len(colours)]}"></i>{escape(label)}</span>'
        for i, label in enumerate(labels)
    )
    bars = []
    for name, shares in rows:
        parts = "".join(
            f'<span style="width:{100 * share:.2f}%;background:{colours[i % len(colours)]}" '
            f'title="{escape(labels[i])}: {100 * share:.1f} %">{f"{100 * share:.0f}" if share >= 0.1 else ""}</span>'
            for i, share in enumerate(shares)
        )
        bars.append(f'<span>{escape(name)}</span><div class="bar">{parts}</div>')
    return f'<div class="key">{key}</div><div class="bars">{"".join(bars)}</div>'


def colour_scale(low: str, high: str, colours: Sequence[str]) -> str:
    """A strip of colours between two values."""
    return (
        f'<div class="scale">{escape(low)}<b style="background:linear-gradient(90deg,{",".join(colours)})"></b>'
        f"{escape(high)}</div>"
    )
