"""The networks that are compared: one small ResNet, with each kind of attention in the same slot."""

from __future__ import annotations

from functools import partial
from typing import Any, Mapping

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from ...models.resnet_cbam2 import CifarResNet, CifarResNetCbam2
from .tried import Trial
from .variants import VARIANTS

__all__ = ["build"]

CHANNELS = (16, 32, 64)


def _make(variant: dict[str, Any], depth: int, classes: int) -> nn.Module:
    arguments = dict(block=BasicBlock, layers=(depth,) * len(CHANNELS), channels=CHANNELS, num_classes=classes)
    kind = variant["attention"]
    if kind == "cbam2":
        return CifarResNetCbam2(**arguments, cbam2=variant.get("cbam2"))
    if kind == "trial":
        layer: Any = partial(Trial, **variant.get("trial", {}))
    else:
        layer = kind
    network = CifarResNet(**arguments, block_args={"attn_layer": layer} if layer else None)
    for module in network.modules():
        if isinstance(module, Trial):
            module.reset_parameters()
    return network


def build(
    variant: str,
    depth: int,
    seed: int,
    stages: str = "123",
    weights: Mapping[str, Tensor] | None = None,
    classes: int = 10,
) -> nn.Module:
    """A network with 3 stages of `depth` blocks; every layer that a plain one has starts as in the plain one of `seed`.

    Args:
        variant: one of `VARIANTS`.
        depth: residual blocks a stage.
        seed: of all first weights.
        stages: those whose blocks carry attention.
        weights: of a trained plain network, to start from instead.
        classes: of the classifier.

    Raises:
        ValueError: no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; give one of {', '.join(VARIANTS)}")
    torch.manual_seed(seed)
    plain = _make(VARIANTS["plain"], depth, classes)
    torch.manual_seed(seed + 1000)  # of attention alone
    network = _make(VARIANTS[variant], depth, classes)
    for number in set("123") - set(stages):
        for block in getattr(network, f"layer{number}"):
            block.se = None
    network.load_state_dict(plain.state_dict() if weights is None else weights, strict=False)
    return network.to(memory_format=torch.channels_last)
