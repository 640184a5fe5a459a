"""A task made for position: every image holds the same patch on noise, and its class is where the patch lies."""

from __future__ import annotations

import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from ...errors import UserError, require

__all__ = ["position", "write"]

SIDE, PATCH, CELLS = 32, 3, 8
TRAIN, VAL = 4000, 1000


def make(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) of bytes, and the cell of an 8 by 8 grid, 0 to 63, in which the patch (3, 3) lies whole.

    Background and patch are the same in every class and the place within the cell is random, so that nothing but the
    position tells the classes apart.
    """
    random = np.random.default_rng(seed)
    images = random.normal(128, 40, (count, SIDE, SIDE, 3)).clip(0, 255).astype(np.uint8)
    labels = random.permutation(np.arange(count) % CELLS**2)
    cell = SIDE // CELLS
    patch = np.where(np.indices((PATCH, PATCH)).sum(0)[..., None] % 2, (255, 255, 0), (0, 0, 255)).astype(np.uint8)
    for image, label, (dy, dx) in zip(images, labels, random.integers(0, cell - PATCH + 1, (count, 2))):
        top, left = label // CELLS * cell + dy, label % CELLS * cell + dx
        image[top : top + PATCH, left : left + PATCH] = patch
    return images, labels


def write(path: Path, seed: int = 0) -> None:
    """Write the task as a parquet file of 5,000 images, of which the last 1,000 are meant to validate."""
    require("datasets")
    from datasets import ClassLabel, Dataset, Features, disable_progress_bars
    from datasets import Image as ImageFeature

    images, labels = make(TRAIN + VAL, seed)
    if not sys.stderr.isatty():
        disable_progress_bars()
    names = [f"row {i // CELLS + 1}, column {i % CELLS + 1}" for i in range(CELLS**2)]
    columns = {"image": [{"bytes": _png(image), "path": None} for image in images], "label": labels.tolist()}
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        Dataset.from_dict(columns, features=features).to_parquet(temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):  # it has moved, or could not be made
            temporary.unlink()


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def position(
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")] = Path("position.parquet"),
    seed: Annotated[int, typer.Option(min=0, help="Of the noise and the places.")] = 0,
) -> None:
    """Write the images of the position task: the same patch on noise, the class is where it lies.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write(output, seed)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    print(f"{output}: {TRAIN + VAL} images of {SIDE}x{SIDE} pixels in {CELLS**2} classes; validate on the last {VAL}")
