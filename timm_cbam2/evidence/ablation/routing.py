"""Is the attention alive? What routers and masks do over a validation set, and what reacting to the image is worth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from torch import Tensor, nn

from ...data.loading import ImageDataset, data_config, make_loader
from ...data.sources import images_of_run
from ...errors import UserError
from ...hub.zoo import load, run_settings
from ...models.cbam2 import is_cbam2, record_attention
from ...terminal import say
from .masks import Moments, fixed_mask_accuracy

__all__ = ["measure", "routing", "summary"]

PARTS = ("channel", "spatial")
DEAD = 0.05  # a choice whose weight stays below this for 99 % of the images plays no part


def summary(weights: Tensor, labels: Tensor) -> dict[str, Any]:
    """What weights (N, K) that sum to 1 do over N images of the classes `labels` (N,).

    Returns:
        `mean` (K,); `between_samples`, the largest standard deviation over images; `between_classes`, that of the class
        means; `class_share`, how much of the variance between images their class explains, 0 to 1; `entropy` of an
        image's weights from 0 (one takes all) to 1 (all equal), mean over images; `dead`, the choices whose weight is
        below 0.05 for 99 % of the images; `first`, the share of images for which each choice weighs most.
    """
    weights = weights.double()
    choices = weights.shape[1]
    classes = labels.unique()
    means = torch.stack([weights[labels == c].mean(0) for c in classes])  # (classes, K)
    shares = torch.stack([(labels == c).double().mean() for c in classes])
    total = weights.var(0, correction=0)
    between = (shares[:, None] * (means - weights.mean(0)) ** 2).sum(0)
    entropy = -torch.special.xlogy(weights, weights).sum(1).mean().item() / math.log(choices) if choices > 1 else 1.0
    dead = (weights.quantile(0.99, dim=0) < DEAD).nonzero().flatten().tolist()
    return {
        "mean": weights.mean(0).tolist(),
        "between_samples": total.max().sqrt().item(),
        "between_classes": between.max().sqrt().item(),
        "class_share": (between.sum() / total.sum()).item() if total.sum() > 0 else 0.0,
        "entropy": entropy,
        "dead": dead,
        "first": torch.bincount(weights.argmax(1), minlength=choices).div(len(weights)).tolist(),
    }


@torch.no_grad()
def measure(model: nn.Module, loader: Any) -> dict[str, Any]:
    """
    Returns:
        `blocks`: for each CBAM2 block of `model` by name, `fusion` (None unless routed) and `branches`, see `summary`,
        `channel` and `spatial`, see `Moments.summary`; `accuracy`: see `fixed_mask_accuracy`.
    """
    model.eval()
    weights: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    blocks = {name: module for name, module in model.named_modules() if is_cbam2(module)}
    masks = {n: {part: Moments(getattr(block, part).gate) for part in PARTS} for n, block in blocks.items()}
    labels = []
    with record_attention(model) as records:
        for images, targets, _ in loader:
            model(images)
            labels.append(targets)
            for name, record in records.items():
                fusion, branches = weights.setdefault(name, ([], []))
                chosen = record.router_weights.float()
                branches.append(chosen.flatten(2).mean(2) if chosen.dim() == 4 else chosen)  # over positions
                if record.fusion_weights is not None:
                    fusion.append(record.fusion_weights.float())
                masks[name]["channel"].add(record.channel_mask)
                masks[name]["spatial"].add(record.spatial_mask)
    truth = torch.cat(labels)
    means = {name: {part: found.mean for part, found in pair.items()} for name, pair in masks.items()}
    return {
        "accuracy": fixed_mask_accuracy(model, loader, means),
        "blocks": {
            name: {
                "fusion": summary(torch.cat(fusion), truth) if fusion else None,
                "branches": summary(torch.cat(branches), truth),
                **{part: masks[name][part].summary() for part in PARTS},
            }
            for name, (fusion, branches) in weights.items()
        },
    }


def routing(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run or model folder, hf-hub: id, or name.")],
    data: Annotated[Optional[str], typer.Option(help="As for finetune; for a run, its own data.")] = None,
    val_split: Annotated[Optional[str], typer.Option(help="As for finetune; for a run, its own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 250,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Also write every number, as JSON.")] = None,
) -> dict[str, Any]:
    """Measure on validation images whether routers and masks depend on the image, and what their doing so is worth.

    Raises:
        UserError: no such model or data, or a model without a CBAM2 block.
    """
    settings = run_settings(model) or {}
    if data is None and "data" not in settings:
        raise UserError(f"{model} is not a run, so say what to measure on: --data FOLDER, a data set, digits, clutter")
    images = images_of_run(settings if data is None else {**settings, "data": data}, val_split=val_split)
    network = load(model)
    if not any(is_cbam2(module) for module in network.modules()):
        raise UserError(f"{model} has no CBAM2 block to look at: give a model named …_cbam2")
    skip_bad = bool(settings.get("skip_bad_images"))
    samples = ImageDataset(images.splits["val"], data_config(network), skip_bad=skip_bad)
    found = {"model": Path(model).name, "images": len(samples)}
    found |= measure(network, make_loader(samples, batch_size, 0))
    say(f"{model} on {len(samples)} validation images of {images.name}; spreads are standard deviations", "")
    _print_tables(found)
    if output is not None:
        try:
            output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    return found


def _print_tables(found: dict[str, Any]) -> None:
    print("| block | weights | mean | entropy | between samples | between classes | class explains | dead |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | --- |")
    for name, block in found["blocks"].items():
        for kind in ("fusion", "branches"):
            row = block[kind]
            if row is not None:
                mean = " ".join(f"{value:.2f}" for value in row["mean"])
                print(
                    f"| {name} | {kind} | {mean} | {row['entropy']:.3f} | {row['between_samples']:.3f} "
                    f"| {row['between_classes']:.3f} | {100 * row['class_share']:.0f} % "
                    f"| {', '.join(map(str, row['dead'])) or 'none'} |"
                )
    print(
        "\n| block | mask | mean | between samples | between channels or positions | at the low end | at the high end |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, block in found["blocks"].items():
        for part in PARTS:
            row = block[part]
            print(
                f"| {name} | {part} | {row['mean']:.2f} | {row['between_samples']:.3f} | {row['within']:.3f} "
                f"| {100 * row['low']:.0f} % | {100 * row['high']:.0f} % |"
            )
    print("\nAccuracy, not trained again, with masks replaced by their mean over these images:")
    for kind, accuracy in found["accuracy"].items():
        print(f"- {kind}: {100 * accuracy:.2f} %")
