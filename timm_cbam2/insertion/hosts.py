"""Which modules can hold a CBAM2 block, and where in each it sits: known residual blocks, or any module's output."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Iterator

import torch
from torch import nn

from ..models.cbam2 import Cbam2, is_cbam2

__all__ = ["OUTPUT", "Kind", "Seat", "attach", "detach", "kind_of", "last_layer", "own_blocks", "seats", "slot_of"]

CHILD = "cbam2"  # name of the block where the host's library has no slot for it
OUTPUT = "output"  # name of the kind that takes any module
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Kind:
    """How modules of one class hold a block.

    Attributes:
        name: in files that say what was inserted where.
        slot: the block's name in its host.
        last: the norm, convolution or linear layer whose output the block takes; its weight's length is the number of
            channels.
        attended: "module:class" that the host's class becomes, where its own does not do all that is wanted.
    """

    name: str
    slot: str
    last: str
    attended: str | None = None


_TIMM = "timm.models."
_VISION = "torchvision.models."
_HF = "transformers.models."
_OURS = "timm_cbam2.insertion."
_KINDS = {
    f"{_TIMM}resnet.BasicBlock": Kind("timm.resnet", "se", "bn2", "timm_cbam2.models.residual_cbam2:BasicBlockCbam2"),
    f"{_TIMM}resnet.Bottleneck": Kind("timm.resnet", "se", "bn3", "timm_cbam2.models.residual_cbam2:BottleneckCbam2"),
    f"{_TIMM}convnext.ConvNeXtBlock": Kind(
        "timm.convnext", "attn", "mlp.fc2", "timm_cbam2.models.convnext_cbam2:ConvNeXtCbam2Block"
    ),
    f"{_VISION}resnet.BasicBlock": Kind(
        "torchvision.resnet", CHILD, "bn2", f"{_OURS}torchvision_hosts:BasicBlockCbam2"
    ),
    f"{_VISION}resnet.Bottleneck": Kind(
        "torchvision.resnet", CHILD, "bn3", f"{_OURS}torchvision_hosts:BottleneckCbam2"
    ),
    f"{_VISION}convnext.CNBlock": Kind("torchvision.convnext", f"block.{CHILD}", "block.5"),
    f"{_HF}resnet.modeling_resnet.ResNetBasicLayer": Kind(
        "transformers.resnet", f"layer.{CHILD}", "layer.1.normalization"
    ),
    f"{_HF}resnet.modeling_resnet.ResNetBottleNeckLayer": Kind(
        "transformers.resnet", f"layer.{CHILD}", "layer.2.normalization"
    ),
    f"{_HF}convnext.modeling_convnext.ConvNextLayer": Kind(
        "transformers.convnext", CHILD, "pwconv2", f"{_OURS}transformers_hosts:ConvNextLayerCbam2"
    ),
    f"{_HF}convnextv2.modeling_convnextv2.ConvNextV2Layer": Kind(
        "transformers.convnextv2", CHILD, "pwconv2", f"{_OURS}transformers_hosts:ConvNextV2LayerCbam2"
    ),
}
_ATTENDED = {kind.attended.replace(":", "."): kind for kind in _KINDS.values() if kind.attended}


@dataclass(frozen=True)
class Seat:
    """A block in its place: `host` is the module called `name`, `block` the name of the attention itself."""

    name: str
    host: nn.Module
    kind: Kind
    block: str
    attention: Cbam2


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(module: nn.Module) -> Kind | None:
    """How `module` holds a block on its residual branch; None where it is not a residual block that is understood."""
    name = _class_name(type(module))
    return _KINDS.get(name) or _ATTENDED.get(name)


def _parent(host: nn.Module, path: str) -> tuple[nn.Module, str]:
    where, _, name = path.rpartition(".")
    return host.get_submodule(where), name


def slot_of(host: nn.Module, kind: Kind) -> nn.Module | None:
    """What `host` holds where its block would be."""
    parent, name = _parent(host, kind.slot)
    return getattr(parent, name, None)


def output_kind(module: nn.Module) -> Kind:
    """How a module of any class holds a block: after its output.

    Raises:
        ValueError: it iterates over its own parts, which a block would be one of.
    """
    if isinstance(module, CONTAINERS) and type(module).forward is not nn.Sequential.forward:
        raise ValueError(f"a {type(module).__name__} cannot hold a block; choose a module in it or around it")
    return Kind(OUTPUT, CHILD, "")


def attend_output(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The forward hook of a module whose output has attention."""
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"{type(module).__name__} gives {type(output).__name__}; CBAM2 takes tensors (B, C, H, W)")
    return module.get_submodule(CHILD)(output)


def attach(host: nn.Module, kind: Kind, attention: Cbam2) -> None:
    """Put `attention` into `host`, in place."""
    parent, name = _parent(host, kind.slot)
    if parent._modules.get(name) is None and name in parent.__dict__:
        delattr(parent, name)  # timm's empty slot
    parent.add_module(name, attention)
    if kind.attended and _class_name(type(host)) in _KINDS:
        module, _, name = kind.attended.partition(":")
        host.__class__ = getattr(import_module(module), name)
    if kind.name == OUTPUT and type(host).forward is not nn.Sequential.forward:  # which calls what is added to it
        host.register_forward_hook(attend_output, prepend=True)


def detach(host: nn.Module, kind: Kind) -> None:
    """Take the block out of `host` again, in place."""
    parent, name = _parent(host, kind.slot)
    delattr(parent, name)
    if kind.name == "timm.resnet":
        parent.se = None
    if _class_name(type(host)) in _ATTENDED:
        host.__class__ = type(host).__bases__[0]
    for key, hook in list(host._forward_hooks.items()):
        if kind.name == OUTPUT and hook is attend_output:
            del host._forward_hooks[key]


def seats(model: nn.Module) -> list[Seat]:
    """Every block of `model` that `detach` can take out, in the order of its modules."""
    found: dict[int, Seat] = {}
    for name, host in model.named_modules():
        kind = kind_of(host)
        held = slot_of(host, kind) if kind is not None else None
        if held is None and CHILD in host._modules:
            called = type(host).forward is nn.Sequential.forward or attend_output in host._forward_hooks.values()
            kind, held = Kind(OUTPUT, CHILD, ""), host._modules[CHILD] if called else None
        if kind is not None and held is not None and is_cbam2(held) and id(held) not in found:
            found[id(held)] = Seat(name, host, kind, f"{name}.{kind.slot}".lstrip("."), held)
    return list(found.values())


def own_blocks(model: nn.Module) -> Iterator[str]:
    """Names of the blocks that the network's own code calls, so that they cannot be taken out."""
    seated = {id(seat.attention) for seat in seats(model)}
    for name, module in model.named_modules():
        if is_cbam2(module) and id(module) not in seated:
            yield name


_PASSES_SCALE = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d)


def last_layer(host: nn.Module, kind: Kind) -> nn.Module | None:
    """The norm, convolution or linear layer into which a factor for each channel of the block's input can go.

    None where there is none: it would have to be the last in `host`, but for what multiplying by a number passes
    through, such as a ReLU.
    """
    if kind.name != OUTPUT:
        return host.get_submodule(kind.last)
    if isinstance(host, nn.Sequential):
        for child in reversed([m for name, m in host.named_children() if name != CHILD]):
            if not isinstance(child, _PASSES_SCALE):
                return last_layer(child, kind)
        return None
    plain = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    scalable = type(host).__module__.startswith("torch.nn.") and isinstance(host, plain)
    return host if scalable and host.weight is not None else None
