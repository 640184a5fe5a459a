"""Warm starts of the grid: a trained plain network's weights in a twin with attention, saved as a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import timm
import torch
from torch import nn

from ...data.loading import ImageDataset, data_config, make_loader
from ...data.sources import images_of_run
from ...errors import UserError, one_line
from ...hub.folder import save
from ...hub.zoo import class_names, load
from ...models.cbam2 import is_cbam2
from .grid import Job

__all__ = ["accuracy", "prepare"]


def prepare(source: Path, folder: Path, job: Job) -> float:
    """Write the model that `job` starts from, unless it is there, and measure it.

    Args:
        source: folder of the trained network.
        folder: where to.
        job: its `start` says which architecture (that of the source by default) with which cbam2 options.

    Returns:
        The accuracy on the validation images before any training.

    Raises:
        UserError: the weights do not fit.
    """
    if not folder.exists():
        trained = load(str(source))
        network = trained
        if job.start.get("model"):
            torch.manual_seed(job.seed)
            options = {"cbam2": job.start["cbam2"]} if job.start.get("cbam2") else {}
            network = timm.create_model(job.start["model"], num_classes=trained.num_classes, **options)
            _transplant(trained, network)
        save(network, folder, label_names=class_names(trained), data_config=data_config(trained))
    return accuracy(folder, job.options)


def _transplant(trained: nn.Module, network: nn.Module) -> None:
    """Copy every weight; only attention may be new."""
    try:
        fit = network.load_state_dict(trained.state_dict(), strict=False)
    except RuntimeError as error:
        raise UserError(f"the weights do not fit: {one_line(error, 300)}") from error
    blocks = tuple(f"{name}." for name, module in network.named_modules() if is_cbam2(module))
    strange = [*fit.unexpected_keys, *(key for key in fit.missing_keys if not key.startswith(blocks))]
    if strange:
        raise UserError(f"the weights do not fit: {', '.join(strange[:5])}")


@torch.no_grad()
def accuracy(folder: Path, options: Mapping[str, Any]) -> float:
    """Share of the validation images that the model in `folder` gets right, in full precision as `evaluate` says it.

    Args:
        folder: of the model.
        options: of `finetune`, which tell the data.
    """
    network = load(str(folder)).eval()
    images = images_of_run(options)
    samples = ImageDataset(images.splits["val"], data_config(network), skip_bad=bool(options.get("skip_bad_images")))
    hits = 0
    for batch, labels, _ in make_loader(samples, 250, 0):
        hits += int((network(batch).argmax(1) == labels).sum())
    return hits / len(samples)
