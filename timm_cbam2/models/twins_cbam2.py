"""What both families share: a `<name>_cbam2` twin for each architecture, and its warm start from timm's weights."""

import dataclasses
from collections import deque
from types import FunctionType, ModuleType
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Set, Type
from urllib.error import URLError

import torch.nn as nn
from huggingface_hub.errors import (
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, is_model, list_models, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import DefaultCfg

from .arguments_cbam2 import check_arguments, check_pretrained_cfg, naming
from .cbam2 import Cbam2
from .reach_cbam2 import promptly
from .saved_cbam2 import remembering
from .weights_cbam2 import WARM_START, Weights, check_source, check_weights, needs_attention

__all__ = [
    "attended_stages",
    "build_twin",
    "entrypoint_arguments",
    "register_once",
    "reset_attention",
    "twin_cfgs",
    "twin_entrypoints",
]


def reset_attention(model: nn.Module) -> None:
    """Initialise every CBAM2 block anew; timm's own initialisers walk over all convolutions, these among them."""
    for module in model.modules():
        if isinstance(module, Cbam2):
            module.reset_parameters()


def attended_stages(cbam2_stages: Optional[Iterable[int]], count: int) -> Set[int]:
    """Which of a network's `count` stages carry attention, the first being 0: all where nothing is asked for.

    Raises:
        ValueError: For what is no list of such numbers, or an empty one.
    """
    if cbam2_stages is None:
        return set(range(count))
    stages = list(cbam2_stages) if isinstance(cbam2_stages, (list, tuple, set)) else []
    if not stages or any(type(stage) is not int or not 0 <= stage < count for stage in stages):
        raise ValueError(
            f"cbam2_stages={cbam2_stages!r} is not allowed; give a list of one or more stages from 0 to {count - 1}."
        )
    return set(stages)


def _rebuild(entrypoint: Callable, helper: str, create: Callable) -> FunctionType:
    """timm's entrypoint with its `_create_…` helper replaced, so that each architecture's numbers stay timm's own."""
    scope = {**entrypoint.__globals__, helper: create}
    return FunctionType(entrypoint.__code__, scope, entrypoint.__name__, entrypoint.__defaults__)


def entrypoint_arguments(entrypoint: Callable, helper: str) -> Dict[str, Any]:
    """What timm's entrypoint passes to its helper: the numbers that make the architecture."""
    return _rebuild(entrypoint, helper, lambda variant, pretrained=False, **kwargs: kwargs)()


def twin_entrypoints(family: ModuleType, helper: str, create: Callable) -> Iterator[Callable]:
    """One entrypoint per architecture of a timm module that does not already carry another attention layer.

    Args:
        family: timm's module, such as `timm.models.resnet`.
        helper: Name of its function that builds every variant.
        create: Ours, called instead as `create(variant, pretrained, **kwargs)`.
    """
    for name in list_models(module=family.__name__.rpartition(".")[2]):
        entrypoint = getattr(family, name)
        arguments = entrypoint_arguments(entrypoint, helper)
        if "attn_layer" in (arguments.get("block_args") or {}):
            continue
        twin = _rebuild(entrypoint, helper, create)
        twin.__name__ = twin.__qualname__ = f"{name}_cbam2"
        twin.__doc__ = f"timm's {name} with a CBAM2 block in every residual branch."
        yield twin


def twin_cfgs(cfgs: Mapping[str, DefaultCfg], names: Iterable[str]) -> Dict[str, DefaultCfg]:
    """Each pretrained tag `x` of timm's as `from_x`, the default first, with timm's own repository as the source."""
    out = {}
    for name in names:
        source = cfgs[name.removesuffix("_cbam2")]
        twin = DefaultCfg(is_pretrained=source.is_pretrained)
        for tag in source.tags:
            cfg = source.cfgs[tag]
            if not cfg.has_weights:
                continue
            if cfg.hf_hub_id == "timm/":
                cfg = dataclasses.replace(cfg, hf_hub_id=f"timm/{name.removesuffix('_cbam2')}.{tag}")
            twin.tags.append(WARM_START + tag)
            twin.cfgs[WARM_START + tag] = cfg
        if not twin.tags:  # untrained in timm: keeps its input configuration
            twin = DefaultCfg(tags=deque([""]), cfgs={"": source.default})
        out[name] = twin
    return out


def register_once(module: ModuleType, entrypoints: Iterable[Callable]) -> None:
    """Put entrypoints in `module` and in timm's registry; a name that is there already is left alone."""
    for entrypoint in map(remembering, entrypoints):
        entrypoint.__module__ = module.__name__
        setattr(module, entrypoint.__name__, entrypoint)
        if not is_model(entrypoint.__name__):
            register_model(entrypoint)


def _arguments_of_folder(cfg: Any, arguments: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """What a model folder asked for, which timm before 1.0.31 hands over among other arguments: what JSON can hold."""
    if not isinstance(cfg, Mapping) or cfg.get("source") not in ("local-dir", "hf-hub"):
        return None
    found = {name: value for name, value in arguments.items() if not name.startswith("pretrained_")}
    return {k: v for k, v in found.items() if v is None or isinstance(v, (bool, int, float, str, list, dict))}


def build_twin(
    model_cls: Type[nn.Module],
    variant: str,
    pretrained: bool = False,
    remap: Optional[Callable[[Weights, nn.Module], Weights]] = None,
    /,
    **kwargs: Any,
) -> nn.Module:
    """Build a CBAM2 model as timm's `build_model_with_cfg` does, with loading that is strict but for a warm start.

    Args:
        model_cls: The network's class.
        variant: Registered name of the architecture.
        pretrained: Load the weights of the model's pretrained configuration.
        remap: Renames foreign weights to timm's keys, called with (weights, model).
        **kwargs: For `build_model_with_cfg` and the class.

    Raises:
        ValueError: When weights are missing, unexpected or of another shape; each is named. Also when they are damaged,
            or a model folder has only a pickle; and when an argument, or a key of a saved configuration, is unknown or
            not allowed, which is named.
        RuntimeError: When the weights can be reached neither on the Hub nor in its cache.
    """
    given = kwargs.get("pretrained_cfg")
    check_arguments(model_cls, kwargs)
    check_pretrained_cfg(given)
    saved = kwargs.get("pretrained_model_args", _arguments_of_folder(given, kwargs))
    cfg = resolve_pretrained_cfg(variant, given, kwargs.get("pretrained_cfg_overlay"))

    def create(**arguments: Any) -> nn.Module:
        with naming(variant, saved):
            return model_cls(**arguments)

    def check(weights: Weights, model: nn.Module) -> Weights:
        return check_weights(weights, model, remap, needs_attention(given, model.pretrained_cfg.get("tag")))

    try:
        with promptly(pretrained and bool(cfg.hf_hub_id) and not cfg.file):
            if pretrained:
                check_source(given)
            model = build_model_with_cfg(create, variant, pretrained, pretrained_filter_fn=check, **kwargs)
        model.pretrained_cfg["first_conv"] = cfg.first_conv
        return model
    except SafetensorError as error:
        raise ValueError(f"The weights of {variant} are damaged or cut off ({error}). Get them again.") from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, URLError) as error:
        raise RuntimeError(
            f"The pretrained weights of {variant} could not be fetched from {cfg.hf_hub_id or cfg.url} and are not "
            f"cached ({type(error).__name__}). Go online once to cache them, or pass pretrained=False."
        ) from error
