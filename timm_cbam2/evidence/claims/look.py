"""What a model of one's own looks at, measured on made pictures whose object is known to the pixel."""

from __future__ import annotations

from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ...data.tasks import CLASSES, Samples
from ...hub.zoo import load
from ...models.saved_cbam2 import input_channels
from .measures import measure
from .training import MEAN, STD, predict

__all__ = ["look"]


def _take_bench_input(model: nn.Module) -> None:
    """Let `model` take what `training.to_input` makes: scaled as its own configuration says, before all else."""
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))

    def scaled(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return ((args[0] * STD + MEAN) / 255 - mean) / std

    model.register_forward_pre_hook(scaled)


def look(name: str, samples: Samples) -> dict[str, Any]:
    """Measure a trained model on pictures of a task that it was trained for, without training it.

    Args:
        name: Registered name with weights, run, model folder or hf-hub: id.
        samples: Pictures (N, H, W), of the size that the model was trained at.

    Returns:
        Its accuracy, and all that `measures.measure` finds.

    Raises:
        ValueError: no such model, or one of other classes or channels than the pictures'.
    """
    model = load(name).eval()
    digits = [str(n) for n in range(CLASSES)]
    names = list(model.pretrained_cfg.get("label_names") or digits)
    if model.num_classes != CLASSES or names != digits:
        told = ", ".join(map(str, names[:3])) if model.num_classes == len(names) else f"{model.num_classes} classes"
        raise ValueError(f"{name} tells {told} … apart, not the ten digits: finetune one with --data clutter")
    if input_channels(model) != 3:
        raise ValueError(f"{name} takes {input_channels(model)} channels, and these pictures have 3")
    _take_bench_input(model)
    images, labels = torch.from_numpy(samples.images), torch.from_numpy(samples.labels)
    accuracy = (predict(model, images) == labels).double().mean().item()
    return {"accuracy": accuracy, **measure(model, samples)}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """A page of what was found, in markdown."""
    yield f"Accuracy {100 * found['accuracy']:.2f} %. Boxes fill {found['box']:.2f} of a picture; Grad-CAM points into"
    yield f"{found['grad_cam']['pointing']:.3f} of them."
    if "worth" not in found:
        return
    yield "Points of accuracy lost when a decision is replaced by its mean over the pictures, in all blocks:"
    yield ", ".join(f"{kind} {points:+.2f}" for kind, points in sorted(found["worth"].items())) + "."
    yield ""
    yield "| block | mask inside less outside (of the mean mask) | points into the box | dead: channel, spatial |"
    yield "| --- | ---: | ---: | ---: |"
    for name, block in found["blocks"].items():
        mask = block["spatial"]
        dead = f"{block['channel']['dead']:.2f}, {mask['dead']:.2f}"
        yield f"| {name} | {mask['inside']:.2f} ({mask['inside_of_mean']:.2f}) | {mask['pointing']:.3f} | {dead} |"
