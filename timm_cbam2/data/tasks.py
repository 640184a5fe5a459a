"""Small seeded tasks made of scikit-learn's digits, each of which one decision of attention ought to help with.

    clutter   one whole digit of any size, place and contrast among pieces of other digits and patches of noise
    crowd     the same with a smaller digit among more: 8 to 21 of 32 pixels, 8 to 13 pieces
    scale     the digit is small, middling or large, among few pieces
    light     gain, offset and inversion of the picture differ from image to image
    position  two whole digits: the one in the left half counts

Digits that train and digits that validate are different people's hand, or at least different drawings: none is in both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Callable

import numpy as np
from PIL import Image

__all__ = ["CLASSES", "TASKS", "Samples", "make"]

CLASSES = 10
SIDE = 32  # pixels
VAL_DIGITS = 500  # of 1797
SCALES = (8, 14, 21)  # sides of the digit in the scale task


@dataclass(frozen=True)
class Samples:
    """N made images with what is known of each."""

    images: np.ndarray  # (N, side, side) uint8, or (N, 3, side, side)
    labels: np.ndarray  # (N,) 0 to 9
    boxes: np.ndarray | None  # (N, 4) top, left, bottom, right of what counts, in pixels, the last two excluded
    factors: np.ndarray  # (N,) what differs between images beside the digit: its size, the light, see the task

    def __len__(self) -> int:
        return len(self.labels)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits (1797, 8, 8) in [0, 1] and their classes, shuffled once and for all."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.images[order] / 16).astype(np.float32), found.target[order]


class _Pen:
    """Draws digits of one split on a canvas."""

    def __init__(self, split: str, side: int, random: np.random.Generator):
        shapes, labels = _digits()
        part = slice(VAL_DIGITS) if split == "val" else slice(VAL_DIGITS, None)
        self.shapes, self.labels = shapes[part], labels[part]
        self.side, self.random = side, random

    def background(self) -> np.ndarray:
        """Grey of any level with a little noise."""
        level = self.random.uniform(100, 155)
        return (level + self.random.normal(0, self.random.uniform(2, 10), (self.side, self.side))).astype(np.float32)

    def paint(self, canvas: np.ndarray, shape: np.ndarray, height: int, width: int, at: tuple[int, int]) -> None:
        """Lay `shape`, resized, over the canvas, lighter or darker than what is below it."""
        image = Image.fromarray(shape).resize((width, height), Image.Resampling.BILINEAR)
        cover = np.clip(np.asarray(image) * 1.3, 0, 1)
        place = canvas[at[0] : at[0] + height, at[1] : at[1] + width]
        away = self.random.uniform(60, 110) * (1 if self.random.random() < 0.5 else -1)
        level = place.mean() + away
        if not 0 <= level <= 255:
            level = place.mean() - away
        place += cover * (level - place)

    def digit(self, canvas: np.ndarray, size: int, left_from: int = 0, left_to: int | None = None) -> tuple:
        """A whole digit at a random place; its class and its box."""
        which = self.random.integers(len(self.labels))
        top = int(self.random.integers(0, self.side - size + 1))
        last = self.side - size if left_to is None else left_to - size
        left = int(self.random.integers(left_from, last + 1))
        self.paint(canvas, self.shapes[which], size, size, (top, left))
        return self.labels[which], (top, left, top + size, left + size)

    def clutter(self, canvas: np.ndarray, count: int) -> None:
        """Pieces of digits, no more than half of one across, and now and then a patch of noise."""
        for _ in range(count):
            height, width = self.random.integers(self.side // 8, self.side * 5 // 16 + 1, 2)
            top, left = (int(self.random.integers(0, self.side - n + 1)) for n in (height, width))
            if self.random.random() < 0.2:
                canvas[top : top + height, left : left + width] += self.random.normal(0, 35, (height, width))
                continue
            rows, columns = self.random.integers(3, 5, 2)
            y, x = self.random.integers(0, 8 - rows + 1), self.random.integers(0, 8 - columns + 1)
            piece = self.shapes[self.random.integers(len(self.labels))][y : y + rows, x : x + columns]
            self.paint(canvas, np.ascontiguousarray(piece), int(height), int(width), (top, left))


def _clutter(pen: _Pen, pieces: tuple[int, int] = (5, 9), sizes: tuple[int, int] = (12, 22)) -> tuple:
    canvas = pen.background()
    pen.clutter(canvas, int(pen.random.integers(pieces[0], pieces[1] + 1)))
    low, high = (size * pen.side // SIDE for size in sizes)
    size = int(pen.random.integers(low, high + 1))
    label, box = pen.digit(canvas, size)
    return canvas, label, box, 3 * (size - low) // (high - low + 1)


def _scale(pen: _Pen) -> tuple:
    canvas = pen.background()
    pen.clutter(canvas, int(pen.random.integers(3, 7)))
    which = int(pen.random.integers(len(SCALES)))
    label, box = pen.digit(canvas, SCALES[which] * pen.side // SIDE)
    return canvas, label, box, which


def _light(pen: _Pen) -> tuple:
    canvas = pen.background()
    pen.clutter(canvas, int(pen.random.integers(3, 7)))
    label, box = pen.digit(canvas, int(pen.random.integers(pen.side * 3 // 8, pen.side * 5 // 8 + 1)))
    weak, inverted = int(pen.random.integers(2)), int(pen.random.integers(2))
    gain = pen.random.uniform(0.12, 0.3) if weak else pen.random.uniform(0.7, 1.2)
    canvas = (canvas - 127.5) * gain * (-1 if inverted else 1) + 127.5 + pen.random.uniform(-80, 80)
    return canvas, label, box, 2 * weak + inverted


def _position(pen: _Pen) -> tuple:
    canvas = pen.background()
    half, low, high = pen.side // 2, pen.side // 4, pen.side * 7 // 16
    pen.clutter(canvas, int(pen.random.integers(2, 5)))
    pen.digit(canvas, int(pen.random.integers(low, high + 1)), left_from=half)
    label, box = pen.digit(canvas, int(pen.random.integers(low, high + 1)), left_to=half)
    return canvas, label, box, 0


TASKS: dict[str, Callable[[_Pen], tuple]] = {
    "clutter": _clutter,
    "crowd": functools.partial(_clutter, pieces=(8, 13), sizes=(8, 21)),
    "scale": _scale,
    "light": _light,
    "position": _position,
}


@functools.lru_cache(8)
def make(task: str, split: str, count: int, seed: int = 0, side: int = SIDE) -> Samples:
    """Make `count` images of a task.

    Args:
        task: one of `TASKS`.
        split: "train" or "val", which share no digit.
        count: number of images.
        seed: of everything random; the two splits differ for the same seed.
        side: pixels.

    Raises:
        ValueError: no such task or split.
    """
    if task not in TASKS or split not in ("train", "val"):
        raise ValueError(f"no task {task!r} of split {split!r}; give one of {', '.join(TASKS)}, and train or val")
    pen = _Pen(split, side, np.random.default_rng([seed, list(TASKS).index(task), split == "val"]))
    drawn = [TASKS[task](pen) for _ in range(count)]
    images = np.stack([canvas for canvas, *_ in drawn]).clip(0, 255).astype(np.uint8)
    labels, boxes, factors = (np.array([row[i] for row in drawn], dtype=np.int64) for i in (1, 2, 3))
    return Samples(images, labels, boxes, factors)
