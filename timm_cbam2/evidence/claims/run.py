"""One training of the bench, and all that is measured of it."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ...data.tasks import make
from .measures import measure
from .networks import build
from .training import RECIPES, predict, train
from .variants import VARIANTS

__all__ = ["train_and_measure"]

START = ("task", "side", "count", "depth", "seed", "start", "recipe")
WARM_LR = 0.5  # of the recipe's, where training goes on from a trained network


@functools.lru_cache(2)
def _trained_plain(task: str, side: int, count: int, depth: int, seed: int, epochs: int, recipe: str) -> dict:
    """The weights of a plain network after so many epochs, from which every variant of a seed goes on."""
    made = make(task, "train", count, side=side)
    network = build("plain", depth, seed)
    train(network, torch.from_numpy(made.images), torch.from_numpy(made.labels), seed + 1000, RECIPES[recipe], epochs)
    return network.state_dict()


def train_and_measure(job: dict[str, Any], val_count: int) -> dict[str, Any]:
    """Train the network that `job` (see results.KEYS) asks for, and measure it on `val_count` images.

    Returns:
        `job`, its accuracy on both splits (that of the training split on 2,000 images at most), seconds, number of
        parameters, what its variant is made of, and all that `measures.measure` finds.
    """
    made = make(job["task"], "train", job["count"], side=job["side"])
    val = make(job["task"], "val", val_count, side=job["side"])
    variant = VARIANTS[job["variant"]]
    weights = _trained_plain(*(job[key] for key in START)) if job["start"] else None
    network = build(job["variant"], job["depth"], job["seed"], job["stages"], weights)
    recipe = {**RECIPES[job["recipe"]], **variant.get("recipe", {})}
    if job["start"]:
        recipe["lr"] *= WARM_LR
    images, labels = torch.from_numpy(made.images), torch.from_numpy(made.labels)
    seconds = train(network, images, labels, job["seed"], recipe, job["epochs"], job["batch_size"])

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
        **_rounded(measure(network, val)),
    }


def _rounded(value: Any) -> Any:
    """Five digits after the point are more than 3,000 images tell."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 5) if isinstance(value, float) else value
