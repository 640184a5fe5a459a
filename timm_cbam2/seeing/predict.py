"""Say what is in images: the best classes of a model, by name; of folders, all probabilities and features as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Iterator, Sequence

import torch
import typer
from torch import Tensor, nn

from ..data.folders import image_files
from ..data.images import Samples
from ..data.loading import ImageDataset, data_config, make_loader
from ..data.reading import UNREADABLE, read_image
from ..errors import UserError, one_line
from ..hub.zoo import check_classifier, class_names, load, run_settings
from ..terminal import say
from ..training.launch import usable_cpus
from .predictions_file import check_names, write_features, write_predictions
from .views_averaged import TTA_HELP, with_views

__all__ = ["predict"]

FEW = 64  # images that are read before worker processes would have started


def predict(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run or model folder, hf-hub: id, or registered name.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name, at most.")] = 3,
    img_size: Annotated[int | None, typer.Option(help="Side in pixels, in place of the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read images; by default as needed.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of models that tell several labels: probability from which on.")
    ] = 0.5,
    tta: Annotated[str | None, typer.Option(help=TTA_HELP)] = None,
    output: Annotated[Path | None, typer.Option(help="All probabilities, into a .csv or .json file.")] = None,
    features: Annotated[Path | None, typer.Option(help="What the classifier sees of each image, into .npz.")] = None,
) -> dict[str, list[tuple[str, float]]]:
    """Name the most likely classes of images, with their probabilities.

    Folders are searched for images, also in the folders inside them.

    Returns:
        For each image its `top_k` (class name, probability), best first.

    Raises:
        UserError: no such model, one without classes, or an image that cannot be read; the others are answered first.
    """
    check_names(output, features)
    files = [file for path in images for file in (image_files(path) if os.path.isdir(path) else [path])]
    network = load(model).eval()
    check_classifier(network, model)
    names = class_names(network, describe=True) or [f"class {i}" for i in range(network.num_classes)]
    run = run_settings(model) or {}
    watch = _Watch(network) if features is not None else None
    several = network.multi_label
    network, config = with_views(network, data_config(network, img_size), tta, run.get("augment"), several)
    dataset = ImageDataset(Samples(files, [0] * len(files)), config, skip_bad=True)
    if workers is None:
        workers = 0 if len(files) <= FEW else min(usable_cpus(), 8)
    answers: dict[str, list[tuple[str, float]]] = {}
    read, found, seen = [], [], []
    loader = make_loader(dataset, batch_size, workers)
    for indices, probabilities in _probabilities(network, loader, several, watch, seen):
        if not probabilities.isfinite().all():
            raise UserError(f"{model} gives no finite numbers: its training diverged; use an earlier checkpoint")
        best = probabilities.topk(min(top_k, len(names)))
        for index, values, chosen in zip(indices, best.values.tolist(), best.indices.tolist()):
            answers[files[index]] = [(names[i], p) for p, i in zip(values, chosen)]
            say(f"{files[index]}: {_said(answers[files[index]], threshold if several else 0.0)}")
        if output is not None or features is not None:
            read += [files[index] for index in indices]
            found.append(probabilities)
    if read and output is not None:
        of_all = torch.cat(found)
        say(f"probabilities {write_predictions(output, model, names, read, of_all, threshold if several else None)}")
    if read and features is not None:
        say(f"features {write_features(features, read, torch.cat(seen))}")
    _refuse_unread([file for file, bad in zip(files, dataset.bad.tolist()) if bad], dataset.mode)
    return answers


def _said(answers: Sequence[tuple[str, float]], threshold: float) -> str:
    """Those of the answers that are likely enough, or that none is."""
    likely = [f"{name} {100 * p:.1f} %" for name, p in answers if p >= threshold]
    if likely:
        return ", ".join(likely)
    name, p = answers[0]
    return f"nothing above {100 * threshold:g} % ({name} {100 * p:.1f} %)"


class _Watch:
    """Keeps what goes into a network's classifier, the mean over views where there are several."""

    def __init__(self, network: nn.Module):
        head = network.get_classifier()
        self.inputs: list[Tensor] = []
        (head if isinstance(head, nn.Module) else head[0]).register_forward_pre_hook(
            lambda module, inputs: self.inputs.append(inputs[0].flatten(1).float().cpu())
        )

    def take(self) -> Tensor:
        """(B, D) of the last batch."""
        inputs, self.inputs = self.inputs, []
        return torch.stack(inputs).mean(0)


@torch.no_grad()
def _probabilities(
    network: nn.Module, loader: Any, several: bool, watch: _Watch | None, seen: list[Tensor]
) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of the readable images of each batch, and their probabilities (B, K); features go to `seen`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    for images, labels, indices in loader:
        readable = labels >= 0
        if not readable.any():
            continue
        images = images[readable].to(device, non_blocking=True)
        logits = network(images).float()
        probabilities = (logits.sigmoid() if several else logits.softmax(1)).cpu()
        if watch is not None:
            seen.append(watch.take())
        yield indices[readable].tolist(), probabilities


def _refuse_unread(unread: Sequence[str], mode: str) -> None:
    """Say which images could not be read, and why the first one could not."""
    if not unread:
        return
    try:
        read_image(unread[0], mode)
        reason = "it can be read now"
    except UNREADABLE as error:
        reason = one_line(error, 150)
    others = f": {', '.join(unread[1:4])}{', …' if len(unread) > 4 else ''}"
    more = f", and {len(unread) - 1} more{others}" if len(unread) > 1 else ""
    raise UserError(f"cannot read {unread[0]} as an image ({reason}){more}")
