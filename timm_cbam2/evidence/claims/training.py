"""A lean training loop for the bench: pictures stay in memory as bytes, and runs that are compared share all chance.

It is not the package's own training, whose loaders, checkpoints and logs cost more than a step of networks as small as
these; optimizer and schedule are. Paired runs (same seed) see the same images in the same order, shifted alike, and
start from the same weights in every layer that both have.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.cbam2 import is_cbam2
from ...training.optimise import make_optimizer, make_schedule

__all__ = ["RECIPES", "predict", "to_input", "train"]

MEAN, STD = 127.5, 60.0
SHIFT = 2  # pixels by which a training image moves at most

RECIPES: dict[str, dict[str, Any]] = {
    "adamw": dict(opt="adamw", lr=6e-3, weight_decay=0.05),
    "adamw-slow": dict(opt="adamw", lr=2e-3, weight_decay=0.05),
    "adamw-fast": dict(opt="adamw", lr=2e-2, weight_decay=0.05),
    "sgd": dict(opt="sgd", lr=0.1, weight_decay=5e-4),
    "sgd-fast": dict(opt="sgd", lr=0.3, weight_decay=5e-4),
}
SETTINGS = dict(
    epochs=8,
    sched="cosine",
    warmup_epochs=1.0,
    layer_decay=None,
    attention_lr_scale=1.0,
    attention_weight_decay=None,  # SE's as all others'
    attention_delay_epochs=0.0,
    opt_kwargs={},
    momentum=None,
    min_lr=0.0,
    warmup_lr=0.0,
)


def to_input(images: Tensor) -> Tensor:
    """Bytes (B, H, W) or (B, 3, H, W) as the network takes them, (B, 3, H, W)."""
    if images.dim() == 3:
        images = images[:, None].expand(-1, 3, -1, -1)
    x = (images.float() - MEAN) / STD
    return x.contiguous(memory_format=torch.channels_last)


def _shifted(images: Tensor, random: np.random.Generator) -> Tensor:
    """Each image moved by up to SHIFT pixels, the border repeated."""
    height, width = images.shape[-2:]
    dy, dx = torch.from_numpy(random.integers(-SHIFT, SHIFT + 1, (2, len(images))))
    rows = (torch.arange(height) + dy[:, None]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + dx[:, None]).clamp(0, width - 1)
    batch = torch.arange(len(images))[:, None, None]
    if images.dim() == 3:
        return images[batch, rows[:, :, None], columns[:, None]]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def train(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    seed: int,
    recipe: dict[str, Any],
    epochs: int = 8,
    batch_size: int = 32,
    bf16: bool = True,
    mirror: bool = False,
) -> float:
    """Train `network` in place; returns the seconds it took.

    Args:
        network: a timm model.
        images: bytes (N, H, W) or (N, 3, H, W).
        labels: (N,).
        seed: of order and shifts, which depend on nothing else.
        recipe: a value of `RECIPES`, perhaps with other numbers.
        epochs: passes over the images.
        batch_size: images a step; a last, smaller batch is left out.
        bf16: autocast to bfloat16.
        mirror: half of the images, for what has no handedness.
    """
    settings = {**SETTINGS, **recipe, "epochs": epochs}
    if any(is_cbam2(module) for module in network.modules()):  # decayed, too, where the variant does not say otherwise
        settings["attention_weight_decay"] = recipe.get("attention_weight_decay", recipe["weight_decay"])
    optimizer = make_optimizer(network, settings)
    steps = len(labels) // batch_size
    schedule = make_schedule(optimizer, settings, steps)
    network.train()
    update, start = 0, time.perf_counter()
    for epoch in range(epochs):
        random = np.random.default_rng([seed, epoch])
        order = torch.from_numpy(random.permutation(len(labels)))
        for chosen in order[: steps * batch_size].split(batch_size):
            schedule.step_update(update)
            moved = _shifted(images[chosen], random)
            if mirror:
                flipped = torch.from_numpy(random.random(len(chosen)) < 0.5)
                moved[flipped] = moved[flipped].flip(-1)
            x = to_input(moved)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = network(x)
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update += 1
    network.eval()
    return time.perf_counter() - start


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """The classes (N,) that a trained network gives, in single precision."""
    network.eval()
    return torch.cat([network(to_input(part)).argmax(1) for part in images.split(batch_size)])
