"""Say what is in images: the best classes of a model, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..data.loading import build_transform, data_config
from ..data.reading import UNREADABLE, read_image
from ..errors import UserError, one_line
from ..hub.zoo import check_classifier, class_names, load

__all__ = ["predict"]


@torch.no_grad()
def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run or model folder, hf-hub: id, or registered name.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name.")] = 3,
    img_size: Annotated[int | None, typer.Option(help="Side in pixels, in place of the model's own.")] = None,
) -> dict[str, list[tuple[str, float]]]:
    """Name the most likely classes of images, with their probabilities.

    Returns:
        For each image its `top_k` (class name, probability), best first.

    Raises:
        UserError: no such model, one without classes, or an image that cannot be read; the others are answered first.
    """
    network = load(model).eval()
    check_classifier(network, model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device)
    config = data_config(network, img_size)
    transform = build_transform(config)
    names = class_names(network, describe=True) or [f"class {i}" for i in range(network.num_classes)]
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    answers: dict[str, list[tuple[str, float]]] = {}
    unread: list[tuple[str, Any]] = []
    for path in images:
        try:
            image = read_image(path, mode)
        except UNREADABLE as error:
            unread.append((path, f"a folder: give {path}/*" if Path(path).is_dir() else error))
            continue
        probabilities = network(transform(image)[None].to(device)).float().softmax(1)[0]
        if not probabilities.isfinite().all():
            raise UserError(f"{model} gives no finite numbers: its training diverged; use an earlier checkpoint")
        best = probabilities.topk(min(top_k, len(names)))
        answers[path] = [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
        print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in answers[path]), flush=True)
    if unread:
        path, error = unread[0]
        more = f", and {len(unread) - 1} more: {', '.join(p for p, _ in unread[1:])}" if len(unread) > 1 else ""
        raise UserError(f"cannot read {path} as an image ({one_line(error, 150)}){more}")
    return answers
