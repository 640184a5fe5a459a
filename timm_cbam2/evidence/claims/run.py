"""One training of the bench, and all that is measured of it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from ...data.reading import read_image
from ...data.sources import find_images
from ...data.tasks import TASKS, Samples, make
from ..ablation.runner import code_version
from .measures import measure
from .networks import build
from .training import RECIPES, predict, train
from .variants import VARIANTS

__all__ = ["train_and_measure"]

START = ("side", "count", "depth", "seed", "start", "recipe", "family", "mixed_precision")
WARM_LR = 0.5  # of the recipe's, where training goes on from a trained network


@functools.lru_cache(4)
def _samples(task: str, split: str, count: int, side: int) -> Samples:
    """Made ones, or the first of a data set whose last 5,000 are kept to validate on."""
    if task in TASKS:
        return make(task, split, count, side=side)
    images = find_images(task).with_val("last:5000")
    chosen = images.splits[split].select(range(min(count, len(images.splits[split]))))
    pixels = [np.asarray(read_image(source).resize((side, side))).transpose(2, 0, 1) for source in chosen.sources()]
    labels = np.array(chosen.labels, dtype=np.int64)
    return Samples(np.stack(pixels), labels, None, np.zeros(len(labels), np.int64))


@functools.lru_cache(2)
def _trained_plain(
    task: str, side: int, count: int, depth: int, seed: int, epochs: int, recipe: str, family: str, precision: str
) -> dict:
    """The weights of a plain network after so many epochs, from which every variant of a seed goes on."""
    made = _samples(task, "train", count, side)
    network = build("plain", depth, seed, family=family)
    images, labels = torch.from_numpy(made.images), torch.from_numpy(made.labels)
    how = dict(bf16=precision == "bf16", mirror=made.boxes is None)
    train(network, images, labels, seed + 1000, RECIPES[recipe], epochs, **how)
    return network.state_dict()


def train_and_measure(
    job: dict[str, Any], val_count: int, data: str | None = None, start_data: str | None = None
) -> dict[str, Any]:
    """Train the network that `job` (see results.KEYS) asks for, and measure it on `val_count` images.

    `data` is the file of a task that is not made here, `start_data` that of one that is begun on.

    Returns:
        `job`, its accuracy on both splits (that of the training split on 2,000 images at most), seconds, number of
        parameters, what its variant is made of, and all that `measures.measure` finds.
    """
    source = data or job["task"]
    before = start_data or job["start_on"]
    made = _samples(source, "train", job["count"], job["side"])
    val = _samples(source, "val", val_count, job["side"])
    variant = VARIANTS[job["variant"]]
    weights = _trained_plain(before, *(job[key] for key in START)) if job["start"] else None
    network = build(job["variant"], job["depth"], job["seed"], job["stages"], weights, family=job["family"])
    recipe = {**RECIPES[job["recipe"]], **variant.get("recipe", {})}
    if job["start"]:
        recipe["lr"] *= WARM_LR
    images, labels = torch.from_numpy(made.images), torch.from_numpy(made.labels)
    how = dict(bf16=job["mixed_precision"] == "bf16", mirror=made.boxes is None)
    seconds = train(network, images, labels, job["seed"], recipe, job["epochs"], job["batch_size"], **how)

    def accuracy(x: torch.Tensor, y: torch.Tensor) -> float:
        return (predict(network, x) == y).double().mean().item()

    return {
        **job,
        "accuracy": accuracy(torch.from_numpy(val.images), torch.from_numpy(val.labels)),
        "train_accuracy": accuracy(images[:2000], labels[:2000]),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in network.parameters()),
        "what": {**{key: value for key, value in variant.items() if key != "about"}, "recipe": recipe},
        "val_count": val_count,
        "commit": code_version(),
        **_rounded(measure(network, val)),
    }


def _rounded(value: Any) -> Any:
    """Five digits after the point are more than 3,000 images tell."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value
