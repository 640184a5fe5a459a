"""A look at image files before any training: in threads, of many a sample, and not again where that went well."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..files import write_whole
from .folders import FileSamples
from .formats import open_image
from .reading import UNREADABLE

__all__ = ["bad_headers", "remember", "remembered", "sample"]

SAMPLE = 2048  # images: 2 s on a network disk that takes 15 ms for each
THREADS = 16


def sample(samples: FileSamples) -> list[int]:
    """Indices of all images or, where there are more than `SAMPLE`, of so many spread evenly over the listing."""
    return np.linspace(0, len(samples) - 1, min(len(samples), SAMPLE)).round().astype(int).tolist()


def bad_headers(samples: FileSamples, indices: list[int]) -> Iterator[tuple[int, Exception]]:
    """Those of `indices` whose file cannot be opened as an image, and why; nothing is decoded."""

    def look(index: int) -> Exception | None:
        try:
            with open_image(samples.source(index)):
                return None
        except UNREADABLE as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        for index, error in zip(indices, pool.map(look, indices)):
            if error is not None:
                yield index, error


def _place(samples: FileSamples) -> Path:
    """Where to remember that a listing was looked at: a file of Hugging Face's cache, named by a digest of it."""
    from huggingface_hub import cached_assets_path

    items = samples.items
    digest = hashlib.sha256(os.fsencode(os.path.abspath(items[0])) + items.text)
    for part in (items.starts, items.ends):
        digest.update(part.tobytes())
    return cached_assets_path("timm_cbam2", "headers") / f"{digest.hexdigest()[:32]}.json"


def remembered(samples: FileSamples) -> bool:
    """Whether a sample of these very names was looked at before and none was bad; the rest, the loop will see."""
    return len(samples) > SAMPLE and _place(samples).is_file()


def remember(samples: FileSamples, looked_at: int) -> None:
    """Note that none of a sample was bad; where nothing can be written, the next run looks again."""
    if len(samples) <= SAMPLE:  # so few that all of them are looked at each time
        return
    found = {"images": len(samples), "looked_at": looked_at, "when": round(time.time())}
    with suppress(OSError):
        write_whole(_place(samples), json.dumps(found).encode())
