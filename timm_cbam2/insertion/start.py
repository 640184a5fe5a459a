"""A timm network from weights that were read: which it is, what it is built with, and whether every key fits."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.models import get_arch_name
from torch import nn

from ..errors import UserError, one_line
from ..hub.zoo import without_memory
from ..models.cbam2 import LIVE, is_cbam2
from ..models.resnet_cbam2 import CIFAR_DEPTHS
from .misfit import misfits
from .read import Source
from .translate import in_timms_keys

__all__ = ["architecture_of", "build", "channels_in", "classes_in", "describe", "fit"]

CARRIED = (
    *("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"),
    *("label_names", "label_descriptions", "license"),
)
LISTED = 8


def architecture_of(source: Source, model: str | None, option: str = "--model") -> str:
    """timm's name of the network that the weights are of: the one given, or else the one that they tell.

    Raises:
        UserError: neither, or timm knows no such network; those that the weights fit are named.
    """
    if model is not None:
        architecture = get_arch_name(model)
        if not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, timm.list_models(), 3)
            raise UserError(f"{option} {model} is unknown" + (f"; did you mean {', '.join(near)}?" if near else ""))
        return architecture
    if source.architecture is not None:
        if not timm.is_model(source.architecture):
            raise UserError(f"{source.name} is of {source.architecture}, which this timm does not have")
        return source.architecture
    fitting = _fitting(source)
    if not fitting:
        raise UserError(
            f"{source.name} does not say of which network it is, and fits no ResNet or ConvNeXt of timm's: name one "
            f"with {option} to see what does not fit"
        )
    more = f" and {len(fitting) - LISTED} more" if len(fitting) > LISTED else ""
    raise UserError(
        f"{source.name} does not say of which network it is: give {option}; it fits {', '.join(fitting[:LISTED])}{more}"
    )


def _fitting(source: Source) -> list[str]:
    """The plain ResNets and ConvNeXts that the weights fit, but for the classifier; most common names first."""
    names = [*timm.list_models(module="resnet"), *timm.list_models(module="convnext"), *CIFAR_DEPTHS]
    fitting = []
    for name in names:
        wanted = without_memory(name).state_dict()
        weights = in_timms_keys(source.weights, wanted)[0]
        head = timm.get_pretrained_cfg(name).classifier
        shapes, own = ({k: v.shape for k, v in w.items() if not _optional(k, head)} for w in (weights, wanted))
        if not misfits(shapes, own):
            fitting.append(name)
    return sorted(fitting, key=len)


def _optional(key: str, head: str) -> bool:
    return key.startswith(f"{head}.") or key.endswith(".num_batches_tracked")


def classes_in(source: Source, architecture: str) -> int:
    """How many classes the weights' classifier has; 0 where they have none."""
    wanted = without_memory(architecture, **source.arguments).state_dict()
    weights = in_timms_keys(source.weights, wanted)[0]
    weight = weights.get(f"{timm.get_pretrained_cfg(architecture).classifier}.weight")
    return 0 if weight is None else weight.shape[0]


def build(architecture: str, source: Source, num_classes: int, **more: Any) -> nn.Module:
    """The network that the weights are of, with random ones and their preprocessing and class names.

    Raises:
        UserError: timm cannot make it.
    """
    arguments = {**channels_in(source, architecture), **source.arguments, **more}
    if not architecture.endswith("_cbam2"):
        arguments = {k: v for k, v in arguments.items() if not k.startswith("cbam2")}
    try:
        network = timm.create_model(architecture, num_classes=num_classes, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{architecture} cannot be made: {one_line(error, 300)}") from error
    describe(network, source)
    return network


def describe(network: nn.Module, source: Source) -> None:
    """Take over the preprocessing, the class names and the licence that come with the weights."""
    kept = {key: source.cfg[key] for key in CARRIED if source.cfg.get(key) is not None}
    kept = {key: tuple(value) if key in ("input_size", "mean", "std") else value for key, value in kept.items()}
    cfg = {key: value for key, value in network.pretrained_cfg.items() if key != "license"}  # of other weights
    network.pretrained_cfg = {**cfg, **kept, "num_classes": network.num_classes}
    network.default_cfg = network.pretrained_cfg


def channels_in(source: Source, architecture: str) -> dict[str, int]:
    """Of the input, where the weights take others than pictures in colour."""
    first = timm.get_pretrained_cfg(architecture).first_conv
    wanted = without_memory(architecture).state_dict()
    weight = in_timms_keys(source.weights, wanted)[0].get(f"{first}.weight")
    found = 3 if weight is None else weight.shape[1]
    return {} if found == wanted[f"{first}.weight"].shape[1] else {"in_chans": found}


def fit(network: nn.Module, source: Source, new_head: bool = False) -> list[str]:
    """Load the weights, strictly.

    Only attention may be missing, all of it, which then stays as it is, and a classifier that starts anew.

    Args:
        network: of timm, maybe with attention.
        source: what was read.
        new_head: leave the classifier as it is, whatever the weights hold; it also stays where they hold one of another
            size.

    Returns:
        What a person should know of that, a line each.

    Raises:
        UserError: something does not fit; it is named.
    """
    own = network.state_dict()
    weights, aside, whose = in_timms_keys(source.weights, own)
    head = {key for key in own if key.startswith(f"{network.pretrained_cfg.get('classifier')}.")}
    attention = {
        f"{name}.{key}" for name, block in network.named_modules() if is_cbam2(block) for key in block.state_dict()
    }
    notes = [source.note] if source.note else []
    if whose != "timm":
        notes.append(f"the keys are those of {whose}, and are read as timm's")
    if aside:
        more = f" and {len(aside) - 10} more" if len(aside) > 10 else ""
        notes.append(f"outside the network and left aside, {len(aside)} in all: {', '.join(aside[:10])}{more}")
    sizes = [tuple(weights[key].shape) for key in head if key in weights and weights[key].ndim > 1]
    if new_head or any(key not in weights or weights[key].shape != own[key].shape for key in head):
        weights = {key: value for key, value in weights.items() if key not in head}
        had = f" (it had {sizes[0][0]} classes)" if sizes else ""
        notes.append(f"the classifier starts anew, for {network.num_classes} classes{had}")
        optional = set(head)
    else:
        optional = set()
    if attention and not attention & weights.keys():
        notes.append(
            "the weights have no attention: it starts as the network's own, the identity unless asked otherwise"
        )
        optional |= attention
    optional |= {key for key in own if key.endswith(".num_batches_tracked")}
    wanted = {key: value.shape for key, value in own.items() if key in weights or key not in optional}
    problem = misfits({key: value.shape for key, value in weights.items()}, wanted)
    if any(key.endswith("spatial.router.fc2.bias") for key in weights.keys() - own.keys()):
        off = " ".join(f"--cbam2 {option}=False" for option in LIVE)
        problem = f"saved without router_norm, as by 0.1: give {off}; {problem}"
    if problem:
        raise UserError(f"{source.name} does not fit {network.pretrained_cfg['architecture']}: {problem}")
    network.load_state_dict({**own, **weights})
    return notes
