"""The networks that are compared: a small ResNet or ConvNeXt, with each kind of attention in the same slot."""

from __future__ import annotations

from functools import partial
from typing import Any, Mapping

import torch
from timm.layers import create_attn
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from ...models.cbam2 import Cbam2, is_cbam2, resolve_options
from ...models.convnext_cbam2 import ConvNeXtCbam2Block
from ...models.resnet_cbam2 import CifarResNet, CifarResNetCbam2
from .tried import Trial
from .variants import VARIANTS

__all__ = ["FAMILIES", "build"]

FAMILIES = {"resnet": "123", "convnext": "1234"}  # and their stages
CHANNELS = (16, 32, 64)
DIMS = (16, 32, 64, 64)
LAYER_SCALE = 0.1  # timm's 1e-6 is for long training


def _options(variant: dict[str, Any]) -> dict[str, Any]:
    """Of the attention: what a variant does not name is off, whatever networks are registered with."""
    return resolve_options(variant.get("cbam2"), saved=True)


def _resnet(variant: dict[str, Any], depth: int, stages: str, classes: int) -> nn.Module:
    arguments = dict(block=BasicBlock, layers=(depth,) * len(CHANNELS), channels=CHANNELS, num_classes=classes)
    arguments["zero_init_last"] = variant.get("zero_init_last", True)
    kind = variant["attention"]
    if kind == "cbam2":
        network = CifarResNetCbam2(**arguments, cbam2=_options(variant))
    else:
        layer: Any = partial(Trial, **variant.get("trial", {})) if kind == "trial" else kind
        network = CifarResNet(**arguments, block_args={"attn_layer": layer} if layer else None)
    for module in network.modules():
        if isinstance(module, Trial):
            module.reset_parameters()
    for number in set(FAMILIES["resnet"]) - set(stages):
        for block in getattr(network, f"layer{number}"):
            block.se = None
    return network


def _convnext(variant: dict[str, Any], depth: int, stages: str, classes: int) -> nn.Module:
    network = ConvNeXt(
        depths=(depth,) * len(DIMS), dims=DIMS, patch_size=1, ls_init_value=LAYER_SCALE, num_classes=classes
    )
    kind = variant["attention"]
    for number, stage in enumerate(network.stages, 1):
        for block in stage.blocks if kind is not None and str(number) in stages else ():
            channels = DIMS[number - 1]
            block.__class__ = ConvNeXtCbam2Block
            if kind == "cbam2":
                block.attn = Cbam2(channels, **_options(variant))
            elif kind == "trial":
                block.attn = Trial(channels, **variant["trial"])
            else:
                block.attn = create_attn(kind, channels)
    return network


def _start_at(squeezes: float, logits: float, block: nn.Module) -> None:
    """What normalised squeezes and router logits are multiplied by at first."""
    routers = [part.router for part in (block.channel, block.spatial) if part.router is not None]
    for norm, gain in [(block.channel.norm, squeezes), *((router.norm, logits) for router in routers)]:
        if norm is not None:
            nn.init.constant_(norm.weight, gain)


def build(
    variant: str,
    depth: int,
    seed: int,
    stages: str = "123",
    weights: Mapping[str, Tensor] | None = None,
    classes: int = 10,
    family: str = "resnet",
) -> nn.Module:
    """A network with stages of `depth` blocks; every layer that a plain one has starts as in the plain one of `seed`.

    Args:
        variant: one of `VARIANTS`.
        depth: residual blocks a stage.
        seed: of all first weights.
        stages: those whose blocks carry attention.
        weights: of a trained plain network, to start from instead.
        classes: of the classifier.
        family: one of `FAMILIES`.

    Raises:
        ValueError: no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; give one of {', '.join(VARIANTS)}")
    make = {"resnet": _resnet, "convnext": _convnext}[family]
    torch.manual_seed(seed)
    plain = make({**VARIANTS[variant], "attention": None}, depth, stages, classes)
    torch.manual_seed(seed + 1000)  # of attention alone
    network = make(VARIANTS[variant], depth, stages, classes)
    for block in network.modules():
        if is_cbam2(block) and "gains" in VARIANTS[variant]:
            _start_at(*VARIANTS[variant]["gains"], block)
    network.load_state_dict(plain.state_dict() if weights is None else weights, strict=False)
    return network.to(memory_format=torch.channels_last)
