"""`timm-cbam2 remove`: a model folder without its attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Iterator

import typer
from torch import nn

from ..data.loading import ImageDataset, data_config, make_loader
from ..data.sources import find_images, images_of_run
from ..errors import UserError, one_line, run_commands
from ..hub.folder import save
from ..hub.zoo import class_names, load, run_settings
from ..models.saved_cbam2 import OLD_TIMM
from ..terminal import say
from .read import WEIGHTS
from .remove import remove as take_out

__all__ = ["remove"]

BATCH_SIZE = 32


def remove(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run or model folder, hf-hub: id, or name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model without attention.")],
    fold: Annotated[bool, typer.Option("--fold", help="Keep the masks' means, in the weights before them.")] = False,
    data: Annotated[
        str | None, typer.Option(help="With --fold, images to average over, as for finetune; for a run, its own.")
    ] = None,
) -> nn.Module:
    """Take CBAM2 out of a model: what is left is timm's plain network, with the weights it had beside the attention.

    With --fold, what each mask is on average is multiplied into the layer before it, and what that costs is told.

    Returns:
        The model.

    Raises:
        UserError: no such model or data, a model without attention, or the folder is taken.
    """
    taken = [file for file in ("config.json", *WEIGHTS) if (output / file).exists()]
    if taken:
        raise UserError(f"--output {output} already holds a model ({', '.join(taken)}): give another folder")
    if data is not None and not fold:
        raise UserError(f"--data {data} is what --fold averages over: add --fold, or leave it out")
    run = run_settings(model)
    if fold and data is None and run is None:
        raise UserError(f"{model} is not a run, so say what to average over: --data FOLDER, a data set, or digits")
    network = load(model).eval()
    names, before = class_names(network), sum(p.numel() for p in network.parameters())
    batches = _Batches(network, data, run) if fold else None
    try:
        take_out(network, fold, batches, say=say)
    except ValueError as error:
        raise UserError(f"{model}: {one_line(error)}") from error
    save(network, output, label_names=names, tag="removed")
    left = sum(p.numel() for p in network.parameters())
    say(f"{network.pretrained_cfg['architecture']}: {before - left:,} of {before:,} parameters taken out")
    of_timm, ours = f"timm.create_model({f'local-dir:{output}'!r}, pretrained=True)", f"load({str(output)!r})"
    say(f"{output} opens with  {f'timm_cbam2.hub.zoo.{ours}' if OLD_TIMM else of_timm}")
    return network


class _Batches:
    """Images, held out ones if there are some, and their labels where these are classes that the network tells."""

    def __init__(self, network: nn.Module, data: str | None, run: dict[str, Any] | None):
        images = images_of_run(run) if data is None and run is not None else find_images(str(data))
        samples = images.splits[next(s for s in ("val", "test", "all", "train") if s in images.splits)]
        known = class_names(network) or (images.classes if network.num_classes == len(images.classes) else [])
        self.labelled = not images.multi_label and set(images.classes) <= set(known)
        if self.labelled:
            samples.labels = [known.index(images.classes[label]) for label in samples.labels]
        dataset = ImageDataset(samples, data_config(network))
        dataset.check_headers()
        self.loader = make_loader(dataset, BATCH_SIZE, workers=0)

    def __iter__(self) -> Iterator[Any]:
        for pictures, labels, _ in self.loader:
            yield (pictures, labels) if self.labelled else pictures


if __name__ == "__main__":
    run_commands(remove)
