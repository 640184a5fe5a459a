"""A plain timm network with attention in it becomes the registered `…_cbam2` model, and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Sequence

import timm
import torch
from timm.layers import DropPath
from timm.models import convnext as timm_convnext
from timm.models import resnet as timm_resnet
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import nn

from ..models.convnext_cbam2 import ConvNeXtCbam2
from ..models.resnet_cbam2 import CifarResNet, CifarResNetCbam2, ResNetCbam2
from ..models.saved_cbam2 import arguments_of
from ..models.twins_cbam2 import entrypoint_arguments
from ..models.weights_cbam2 import WARM_START
from .hosts import Seat, own_blocks, seats

__all__ = ["become_plain", "become_twin", "twin_of"]

_TWINS = {ResNet: ResNetCbam2, CifarResNet: CifarResNetCbam2, ConvNeXt: ConvNeXtCbam2}
_HELPERS = {"resnet": (timm_resnet, "_create_resnet"), "convnext": (timm_convnext, "_create_convnext")}


def twin_of(architecture: str) -> str | None:
    """The registered `…_cbam2` name of timm's `architecture`, also where that has an attention layer of its own.

    "seresnet50" is a resnet50 but for its attention, so its twin is "resnet50_cbam2"; None where there is none. A
    `…_cbam2` name is its own.
    """
    if not timm.is_model(architecture):
        return None
    if architecture.endswith("_cbam2"):
        return architecture
    if timm.is_model(f"{architecture}_cbam2"):
        return f"{architecture}_cbam2"
    family = timm.model_entrypoint(architecture).__module__.rpartition(".")[2]
    if family not in _HELPERS:
        return None
    wanted = _without_attention(*_HELPERS[family], architecture)
    for name in timm.list_models(module=family):
        if timm.is_model(f"{name}_cbam2") and _without_attention(*_HELPERS[family], name) == wanted:
            return f"{name}_cbam2"
    return None


def _without_attention(family: ModuleType, helper: str, name: str) -> dict[str, Any]:
    arguments = entrypoint_arguments(getattr(family, name), helper)
    inner = {k: v for k, v in (arguments.pop("block_args", None) or {}).items() if k != "attn_layer"}
    return {**arguments, **({"block_args": inner} if inner else {})}


def _stages(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The stages of a timm network and their names, as `cbam2_stages` numbers them."""
    if isinstance(model, ConvNeXt):
        return [(f"stages.{i}.blocks", stage.blocks) for i, stage in enumerate(model.stages)]
    return [
        (name, getattr(model, name)) for name in ("layer1", "layer2", "layer3", "layer4") if len(getattr(model, name))
    ]


def _attended(model: nn.Module, found: Sequence[Seat]) -> list[int] | None:
    """The stages whose blocks have attention; None where only some of a stage's have, or a module elsewhere has."""
    names = {seat.name for seat in found if seat.kind.name.startswith("timm.")}
    attended = []
    for number, (where, stage) in enumerate(_stages(model)):
        blocks = {f"{where}.{i}" for i in range(len(stage))}
        if blocks <= names:
            attended.append(number)
            names -= blocks
    return None if names or not attended or len(found) != sum(len(_stages(model)[n][1]) for n in attended) else attended


def become_twin(model: nn.Module) -> bool:
    """Make `model` an instance of the registered class, if it is all that such a model is.

    Returns:
        Whether it is one now.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if type(model) not in _TWINS or not isinstance(cfg, dict) or next(own_blocks(model), None) is not None:
        return False
    found = seats(model)
    architecture, attended = twin_of(cfg.get("architecture") or ""), _attended(model, found)
    options = [getattr(seat.attention, "inserted", {}).get("options") for seat in found]
    if architecture is None or attended is None or options[0] is None or any(o != options[0] for o in options):
        return False
    known = hasattr(model, "_model_args")
    arguments = dict(model._model_args if known else arguments_of(model))
    inner = {k: v for k, v in (arguments.pop("block_args", None) or {}).items() if k != "attn_layer"}
    arguments |= {"cbam2": dict(options[0])} | ({"block_args": inner} if inner else {})
    if len(attended) < len(_stages(model)):
        arguments["cbam2_stages"] = attended
    if not known and not _is_built_with(architecture, arguments, model):
        return False
    tag = cfg.get("tag")
    model.__class__ = _TWINS[type(model)]
    model.cbam2_options = dict(options[0])
    _describe(model, architecture, tag and WARM_START + tag, arguments)
    return True


def _is_built_with(architecture: str, arguments: dict[str, Any], model: nn.Module) -> bool:
    """Whether these arguments are all that a network was built with, for timm before 1.0.31, which keeps none.

    Rates of dropping are of a training, and stay as they are in the network.
    """
    with torch.device("meta"):
        twin = timm.create_model(architecture, **arguments)
    dropping = (DropPath, nn.Dropout, nn.Identity)
    parts = [
        {
            name: (type(part), part.extra_repr())
            for name, part in network.named_modules()
            if name and type(part) not in dropping
        }
        for network in (twin, model)
    ]
    return parts[0] == parts[1]


def become_plain(model: nn.Module) -> None:
    """Undo `become_twin` for a model whose attention has been taken out."""
    plain = {twin: cls for cls, twin in _TWINS.items()}.get(type(model))
    if plain is None:
        return
    cfg = model.pretrained_cfg
    dropped = ("cbam2", "cbam2_stages")
    arguments = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in dropped}
    model.__class__ = plain
    model.__dict__.pop("_given_args", None)
    del model.cbam2_options
    tag = (cfg.get("tag") or "").removeprefix(WARM_START)
    _describe(model, cfg["architecture"].removesuffix("_cbam2"), tag, arguments)


def _describe(model: nn.Module, architecture: str, tag: str | None, arguments: dict[str, Any]) -> None:
    model.pretrained_cfg = {**model.pretrained_cfg, "architecture": architecture, "tag": tag}
    model.default_cfg = model.pretrained_cfg  # as in timm
    model._model_args = arguments
