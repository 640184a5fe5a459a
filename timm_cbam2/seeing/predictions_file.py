"""Predictions and features of many images as files that spreadsheets, pandas and NumPy open."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Sequence

import numpy as np
from torch import Tensor

from ..errors import UserError
from ..files import write_whole

__all__ = ["check_names", "write_features", "write_predictions"]


def check_names(output: Path | None, features: Path | None) -> None:
    """Refuse, before any work, files that could not be written as asked.

    Raises:
        UserError: a name that does not end in .csv, .json or .npz, or whose folder is not there.
    """
    for option, path, endings in (("output", output, (".csv", ".json")), ("features", features, (".npz",))):
        if path is None:
            continue
        if path.suffix.lower() not in endings:
            raise UserError(f"--{option} {path}: give a file that ends in {' or '.join(endings)}")
        if not path.absolute().parent.is_dir():
            raise UserError(f"--{option} {path}: there is no folder {path.parent}; make it first")


def write_predictions(
    path: Path,
    model: str,
    names: Sequence[str],
    images: Sequence[str],
    probabilities: Tensor,
    threshold: float | None = None,
) -> Path:
    """A row for each image: its name, the answer, and the probability of each class, of (N, K).

    The answer is the most likely class or, with a `threshold`, all classes from it on, with | between them.
    """
    if threshold is None:
        best = [names[i] for i in probabilities.argmax(1).tolist()]
    else:
        best = ["|".join(name for name, p in zip(names, row) if p >= threshold) for row in probabilities.tolist()]
    rows = probabilities.double().numpy().round(7).tolist()
    if path.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "prediction", *names])
        writer.writerows([image, answer, *row] for image, answer, row in zip(images, best, rows))
        content = text.getvalue()
    else:
        found = [
            {"image": image, "prediction": answer, "probabilities": row}
            for image, answer, row in zip(images, best, rows)
        ]
        content = json.dumps({"model": model, "classes": list(names), "images": found}, indent=1, ensure_ascii=False)
    write_whole(path, content.encode(errors="surrogateescape"))  # names may be bytes of no text
    return path


def write_features(path: Path, images: Sequence[str], features: Tensor) -> Path:
    """`numpy.load(path)` gives "images" (N,) and "features" (N, D), float32."""
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array(images), features=features.numpy())
    write_whole(path, buffer.getvalue())
    return path
