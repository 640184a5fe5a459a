"""Data sets that every install has, made of scikit-learn's digits: the digits themselves, and digits among clutter."""

from __future__ import annotations

import numpy as np

from ..errors import require
from .images import ArraySamples, Images, Samples
from .tasks import CLASSES, make

__all__ = ["BUILT_IN", "made"]

BUILT_IN = ("digits", "clutter")


def made(name: str) -> Images:
    """The images of one of `BUILT_IN`."""
    require("sklearn")
    return _digits() if name == "digits" else _clutter()


def _digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8 scans with 17 grey levels; a fifth of each class is held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    samples = ArraySamples(list(pixels), digits.target.tolist())
    images = Images("digits", [str(n) for n in digits.target_names], {"all": samples}).with_val(0.2)
    # A digit fills its scan: cropping the border or mirroring it would change what it says.
    return Images("digits", images.classes, images.splits, [], {"crop_pct": 1.0}, augment="light")


def _clutter() -> Images:
    """8,000 made pictures of 32x32 pixels, one digit among clutter in each, and 2,000 of other drawings to validate."""
    drawn = {split: make("clutter", split, count) for split, count in (("train", 8000), ("val", 2000))}
    splits: dict[str, Samples] = {
        split: ArraySamples(list(found.images), found.labels.tolist()) for split, found in drawn.items()
    }
    # Nothing is cut off: the digit may lie at the border.
    return Images("clutter", [str(n) for n in range(CLASSES)], splits, [], {"crop_pct": 1.0}, augment="light")
