"""Any image the same way everywhere: upright, 8 bits, without transparency."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .formats import open_image

__all__ = ["UNREADABLE", "read_image"]

# What Pillow raises for what is no readable image.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def read_image(source: str | Path | bytes | Image.Image, mode: str = "RGB") -> Image.Image:
    """Read an image of any kind as 8-bit `mode` ("RGB" or "L"), upright.

    EXIF orientation is applied, 16-bit images are scaled to 8 bits rather than clipped, transparent parts become white,
    and of an animation or a multi-page file the first picture counts.

    Raises:
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: not a readable image.
    """
    image = source if isinstance(source, Image.Image) else None
    if image is None:
        image = open_image(io.BytesIO(source) if isinstance(source, bytes) else source)
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: PIL's own conversion clips at 255
        values = np.asarray(image, dtype=np.float64)
        top = values.max(initial=0.0)
        full = 1.0 if image.mode == "F" and top <= 1 else 255.0 if top <= 255 else 65535.0
        full = 65535.0 if image.mode.startswith("I;16") else max(full, top if top > 65535 else full)
        image = Image.fromarray(np.clip(np.round(values * (255.0 / full)), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
