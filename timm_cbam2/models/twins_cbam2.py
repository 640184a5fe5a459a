"""What both families share: a `<name>_cbam2` twin for each architecture, and its warm start from timm's weights."""

import dataclasses
import warnings
from collections import deque
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Set
from urllib.error import URLError

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, is_model, list_models, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import DefaultCfg

from .cbam2 import Cbam2

__all__ = [
    "TakesPlainWeights",
    "attended_stages",
    "build_twin",
    "entrypoint_arguments",
    "register_once",
    "require_safetensors",
    "reset_attention",
    "twin_cfgs",
    "twin_entrypoints",
]

MAX_CLASSES = 1_000_000
WARM_START = "from_"  # prefix of the tags whose weights are timm's own
Weights = Dict[str, torch.Tensor]


class TakesPlainWeights:
    """A mixin: a network whose attention is at the identity also loads, strictly, what its twin without it has."""

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, so that `checkpoint_path=` of `timm.create_model` takes the twin's file too, with a warning."""
        own = super().state_dict()
        attention = _attention_keys(self)
        if strict and state_dict.keys() == own.keys() - attention and _is_identity(self):
            warnings.warn(
                "These weights have no attention: it stays the identity, and the network computes what they did "
                "without it.",
                stacklevel=2,
            )
            state_dict = {**state_dict, **{key: own[key] for key in attention}}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _is_identity(model: nn.Module) -> bool:
    """Whether every block multiplies by 1, whatever it is given."""
    for block in model.modules():
        if isinstance(block, Cbam2):
            last = [block.channel.fc2, *(branch.pw for branch in block.spatial.branches)]
            if block.channel.gate != "unit_sigmoid" or block.spatial.conv is not None:
                return False
            if any(parameter.detach().any() for layer in last for parameter in layer.parameters()):
                return False
    return True


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
    for entrypoint in entrypoints:
        entrypoint.__module__ = module.__name__
        setattr(module, entrypoint.__name__, entrypoint)
        if not is_model(entrypoint.__name__):
            register_model(entrypoint)


def _attention_keys(model: nn.Module) -> Set[str]:
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Cbam2))
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def _listed(keys: Set[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join(shown) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _needs_attention(cfg: Any, tag: Optional[str]) -> bool:
    """Whether the weights were trained with attention: those of a model folder, or of a tag that is no warm start."""
    if isinstance(cfg, Mapping) and cfg.get("source") in ("hf-hub", "local-dir"):
        return True
    return bool(tag) and not tag.startswith(WARM_START)


def _check_weights(weights: Weights, model: nn.Module, remap: Optional[Callable], needs_attention: bool) -> Weights:
    """Refuse weights that do not fit, and complete a warm start with the attention the model was built with.

    timm's loader turns lenient as soon as the number of classes differs, so strictness is enforced here, before it.
    """
    cfg = model.pretrained_cfg
    if remap is not None:
        weights = remap(weights, model)
    weights = dict(weights)
    own = model.state_dict()
    attention = _attention_keys(model)
    classifier = {f"{cfg['classifier']}.{part}" for part in ("weight", "bias")} if cfg.get("classifier") else set()
    first_conv = f"{cfg.get('first_conv')}.weight"

    warm_start = not needs_attention and not attention & weights.keys()
    optional = set(attention) if warm_start else set()
    if (cfg.get("tag") or "").endswith("fcmae"):
        optional |= {key for key in own if key.startswith("head.norm.")}  # as in timm
    if cfg["num_classes"] != model.num_classes:
        optional |= classifier
    missing = own.keys() - weights.keys() - optional
    unexpected = weights.keys() - own.keys()
    if cfg["num_classes"] != model.num_classes:
        unexpected -= classifier
    adapted = {first_conv} if cfg["input_size"][0] != model.in_chans else set()
    if cfg["num_classes"] != model.num_classes or cfg.get("label_offset"):
        adapted |= classifier  # timm drops or shortens it
    reshaped = {k for k in own.keys() & weights.keys() - adapted if own[k].shape != weights[k].shape}

    problems = [f"missing: {_listed(missing)}"] if missing else []
    problems += [f"unexpected: {_listed(unexpected)}"] if unexpected else []
    problems += [f"{k}: shape {tuple(weights[k].shape)}, not {tuple(own[k].shape)}" for k in sorted(reshaped)[:5]]
    if problems:
        raise ValueError(
            f"These weights do not fit {cfg['architecture']}: {'; '.join(problems)}. "
            "Give the weights of this architecture and these options, or pretrained=False."
        )
    if warm_start and any(m.channel.gate != "unit_sigmoid" for m in model.modules() if isinstance(m, Cbam2)):
        warnings.warn(
            "This warm start changes the backbone's function: only gate='unit_sigmoid' is the identity at its start.",
            stacklevel=2,
        )
    for key in optional - weights.keys() - classifier:
        weights[key] = own[key]
    return weights


def require_safetensors(where: Any, **options: Any) -> None:
    """Refuse a model folder or repository whose weights are not in safetensors, before anything reads them.

    Args:
        where: The folder, or the repository's id.
        **options: For `hf_hub_download`, such as `revision`.

    Raises:
        ValueError: It has other weights or none.
    """
    for name in ("model.safetensors", "model.safetensors.index.json"):
        try:
            if Path(where, name).is_file() if Path(where).is_dir() else hf_hub_download(str(where), name, **options):
                return
        except RemoteEntryNotFoundError:
            continue
    raise ValueError(
        f"{where} has no model.safetensors. Other weights, such as pytorch_model.bin, are pickles, which can run code "
        "when they are read: have them saved anew as safetensors."
    )


def _check_source(cfg: Any) -> None:
    """Refuse a model folder or repository from which timm would read a pickle, or that asks for absurd memory."""
    if not isinstance(cfg, Mapping) or cfg.get("source") not in ("hf-hub", "local-dir"):
        return
    if not 0 <= int(cfg.get("num_classes") or 0) <= MAX_CLASSES:
        raise ValueError(f"num_classes={cfg['num_classes']} is not allowed; give a number from 0 to {MAX_CLASSES:,}.")
    repo, _, revision = (cfg.get("hf_hub_id") or "").partition("@")
    require_safetensors(repo or cfg["file"], revision=revision or None)


def build_twin(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool = False,
    remap: Optional[Callable[[Weights, nn.Module], Weights]] = None,
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
            or a model folder has only a pickle.
        RuntimeError: When the weights can be reached neither on the Hub nor in its cache.
    """
    given = kwargs.get("pretrained_cfg")

    def check(weights: Weights, model: nn.Module) -> Weights:
        return _check_weights(weights, model, remap, _needs_attention(given, model.pretrained_cfg.get("tag")))

    try:
        if pretrained:
            _check_source(given)
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=check, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"The weights of {variant} are damaged or cut off ({error}). Get them again.") from error
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, URLError) as error:
        cfg = resolve_pretrained_cfg(variant, given, kwargs.get("pretrained_cfg_overlay"))
        raise RuntimeError(
            f"The pretrained weights of {variant} could not be fetched from {cfg.hf_hub_id or cfg.url} and are not "
            f"cached ({type(error).__name__}). Go online once to cache them, or pass pretrained=False."
        ) from error
