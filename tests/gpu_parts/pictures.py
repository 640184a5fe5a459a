"""CIFAR-10 from its parquet file by pyarrow alone, decoded once; or, where there is none, made images in its place."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from . import Place
from .lean import Pictures

__all__ = ["CLASSES", "VAL", "cifar"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VAL = 5000  # the last so many images are for validation, as in the ablation
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # timm's, of the CIFAR networks


def cifar(place: Place) -> tuple[Pictures, Pictures, bool]:
    """Images to train on, those to validate, both on the device, and whether they are CIFAR-10's."""
    if place.data is not None:
        images, labels = _read(place)
    else:  # a class is a colour, so that there is something to learn
        random = np.random.default_rng(0)
        labels = torch.from_numpy(random.integers(0, 10, 160))
        noise = torch.from_numpy(random.integers(0, 60, (160, 3, 32, 32)))
        shade = torch.stack([labels * 19, 190 - labels * 19, (labels % 3) * 60], 1)[:, :, None, None]
        images = (noise + shade).clamp(0, 255).byte()
    cut = len(labels) - min(VAL, len(labels) // 4)
    mean, std = (tuple(255 * value for value in values) for values in (MEAN, STD))
    whole = Pictures(images.to(place.device), labels.to(place.device), mean, std)
    return whole.select(slice(0, cut)), whole.select(slice(cut, None)), place.data is not None


def _read(place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (N, 3, 32, 32) and labels (N,) of every row, or in a rehearsal of the first 160."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(place.data)
    if place.quick:
        table = table.slice(0, 160)
    column = next(name for name in ("image", "img") if name in table.column_names)
    encoded = [row["bytes"] for row in table[column].to_pylist()]

    def decode(content: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(decode, encoded)))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())
