"""`timm-cbam2 insert`: a trained network's file or folder, as a model folder with CBAM2 in it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from ..data.loading import seeded
from ..errors import UserError, one_line, parse_pairs, run_commands
from ..hub.folder import save
from ..hub.zoo import class_names
from ..models.cbam2 import is_cbam2
from ..terminal import say
from .insert import insert as put_in
from .read import WEIGHTS, read_source
from .start import architecture_of, build, classes_in, fit
from .twin import twin_of

__all__ = ["insert"]


def insert(
    weights: Annotated[str, typer.Argument(metavar="SOURCE", help="Model folder, file of weights, or hf-hub: id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the model with attention.")],
    model: Annotated[str | None, typer.Option(help="timm's name of the network, where SOURCE does not say.")] = None,
    cbam2: Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="Options of every block.")] = [],  # noqa: B006
    replace: Annotated[bool, typer.Option("--replace", help="Put CBAM2 in the place of SE or ECA.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the new blocks' inner weights.")] = 0,
) -> nn.Module:
    """Put CBAM2, at the identity, into a trained ResNet or ConvNeXt: the new model answers what the old one did.

    Files of timm's train.py, Lightning, torchvision and transformers are read, and safetensors; nothing but tensors is
    unpickled. The folder opens in timm and transformers, and is a start for finetune.

    Returns:
        The model.

    Raises:
        UserError: SOURCE cannot be read, does not fit the network, or holds attention; or the folder is taken.
    """
    options = parse_pairs("--cbam2", cbam2, "gate=sigmoid")
    taken = [file for file in ("config.json", *WEIGHTS) if (output / file).exists()]
    if taken:
        raise UserError(f"--output {output} already holds a model ({', '.join(taken)}): give another folder")
    source = read_source(weights)
    name = architecture_of(source, model)
    plain = name.removesuffix("_cbam2")
    if twin_of(plain) is None:
        raise UserError(
            f"{plain} has no CBAM2 twin; in Python, timm_cbam2.insert(model, where=…) puts blocks after modules that "
            "you name"
        )
    if any(".channel.temperature." in key for key in source.weights):
        raise UserError(f"{weights} has CBAM2 already: start from it with `timm-cbam2 finetune --start-from {weights}`")
    network = build(plain, source, classes_in(source, plain)).eval()
    notes = fit(network, source)
    noise = torch.rand(2, *network.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, parameters = network(noise), sum(p.numel() for p in network.parameters())
        try:
            with warnings.catch_warnings(record=True) as said, seeded(seed):
                warnings.simplefilter("always")
                put_in(network, replace=replace, **options)
        except ValueError as error:
            raise UserError(one_line(error).replace("pass replace=True", "give --replace")) from error
        same = torch.equal(before, network(noise))
    save(network, output, label_names=class_names(network), tag="inserted")
    for note in (*notes, *(str(warning.message) for warning in said)):
        say(f"note: {note}")
    blocks = sum(is_cbam2(module) for module in network.modules())
    more = sum(p.numel() for p in network.parameters()) - parameters
    say(
        f"{network.pretrained_cfg['architecture']}: {blocks} blocks, {more:,} parameters added to {parameters:,}; "
        + ("outputs equal those before, bit for bit" if same else "outputs differ from those before, as asked")
    )
    say(f"{output} opens with  timm.create_model({f'local-dir:{output}'!r}, pretrained=True)")
    say(f"train it with  timm-cbam2 finetune --start-from {output} --data MY_IMAGES")
    return network


if __name__ == "__main__":
    run_commands(insert)
