"""Which files are images: those of every format that Pillow itself can read."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["image_extensions", "image_formats", "is_image", "open_image"]

# EPS is a program, which Ghostscript runs; of MPEG, Pillow reads no more than the size.
NOT_READ = ("EPS", "MPEG")
EXAMPLES = ".jpg, .png, .webp and others that Pillow reads"


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it reads without the help of another program."""
    from PIL import Image, ImageFile

    Image.init()
    readers = {name: reader for name, (reader, _) in Image.OPEN.items() if name not in NOT_READ}
    stubs = {n for n, r in readers.items() if isinstance(r, type) and issubclass(r, ImageFile.StubImageFile)}
    return tuple(name for name in readers if name not in stubs)


@cache
def image_extensions() -> frozenset[str]:
    """The ends of such files' names, in lower case with their dot."""
    from PIL import Image

    formats = set(image_formats())
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in formats)


def is_image(name: str | Path) -> bool:
    """Whether a file's name is that of an image; hidden files are none."""
    path = Path(name)
    return path.suffix.lower() in image_extensions() and not path.name.startswith(".")


def open_image(source: Any) -> Any:
    """`PIL.Image.open` for the formats of `image_formats`, whatever the file's name says it is.

    Raises:
        OSError: see `PIL.Image.open`.
    """
    from PIL import Image

    return Image.open(source, formats=image_formats())
