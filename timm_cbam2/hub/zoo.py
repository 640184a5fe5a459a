"""What there is to choose from: the table of models, the nearest name to a misspelt one, loading by any name."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_arch_name, parse_model_name
from torch import nn
from torch.overrides import TorchFunctionMode

import timm_cbam2  # noqa: F401  (registers the models)

from ..errors import UserError, one_line
from ..models.reach_cbam2 import promptly
from ..models.resnet_cbam2 import CIFAR_DEPTHS
from ..models.saved_cbam2 import overlay_of_folder
from ..models.weights_cbam2 import WARM_START
from .inserted import INSERTED
from .run_folder import read_settings

__all__ = [
    "ModelRow",
    "check_classifier",
    "class_names",
    "load",
    "meaning",
    "names",
    "pretrained_tags",
    "resolve",
    "row",
    "suggest",
    "table",
    "whole_name",
    "without_memory",
]


def names() -> list[str]:
    """Every model of ours: the `_cbam2` ones, and the plain CIFAR ResNets that are their controls."""
    return sorted({*timm.list_models("*_cbam2"), *CIFAR_DEPTHS}, key=_natural)


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def suggest(name: str, count: int = 3) -> list[str]:
    """The registered names nearest to `name`, best first; `architecture.tag` ones when only the tag is wrong."""
    architecture, _, tag = str(name).rpartition(":")[2].partition(".")
    if tag and timm.is_model(architecture):
        tags = pretrained_tags(architecture)
        begun = [t for t in tags if t.startswith((tag, WARM_START + tag))]
        close = [*begun, *difflib.get_close_matches(tag, tags, count, 0.0)]
        return [f"{architecture}.{t}" for t in dict.fromkeys(close)][:count] or [architecture]
    candidates = names()
    lowered = architecture.lower().replace("-", "_")
    found = [c for c in (lowered, f"{lowered}_cbam2", f"{lowered}_cbam2".replace("_cbam_", "_")) if c in candidates]
    found += difflib.get_close_matches(lowered, candidates, count, 0.5)
    return list(dict.fromkeys(found))[:count]


def pretrained_tags(name: str) -> list[str]:
    """Tags of the weights that `timm.create_model(f"{name}.{tag}", pretrained=True)` loads, the default first."""
    tags = [full.partition(".")[2] for full in timm.list_pretrained(name)]
    default = timm.get_pretrained_cfg(name)
    default_tag = (default.tag if default is not None else "") or ""
    return sorted(tags, key=lambda t: t != default_tag)


class _NoInit(TorchFunctionMode):
    """Skips in-place operations: initialising tensors that hold nothing takes most of the time of making them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else next(iter(kwargs.values()))
        return func(*args, **(kwargs or {}))


def without_memory(name: str, **arguments: Any) -> nn.Module:
    """A registered model whose tensors have shapes and nothing in them, which takes little time."""
    with torch.device("meta"), _NoInit():
        return timm.create_model(name, **arguments)


@dataclass(frozen=True)
class ModelRow:
    """One line of the table; `parameters` counts them with the default number of classes."""

    name: str
    parameters: int
    tags: tuple[str, ...]
    pretrained: str


def table(pattern: str | None = None) -> Iterator[ModelRow]:
    """The models whose name matches `pattern` (a glob, or part of a name), sized without allocating them.

    Raises:
        UserError: none matches.
    """
    every = names()
    chosen = every
    if pattern is not None:
        glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        chosen = [n for n in every if fnmatch.fnmatch(n, glob)]
        if not chosen:
            raise UserError(f"no model is called {pattern!r}; {_nearest(pattern)}")
    for name in chosen:
        yield row(name)


def row(name: str) -> ModelRow:
    """What is known of one registered model, which is built without memory to count its parameters."""
    parameters = sum(p.numel() for p in without_memory(name).parameters())
    tags = tuple(pretrained_tags(name))
    return ModelRow(name, parameters, tags, meaning(tags))


def meaning(tags: tuple[str, ...]) -> str:
    """What `pretrained=True` means for a model with these tags."""
    if not tags:
        return "no weights yet: train it"
    if tags[0].startswith(WARM_START):
        return "warm start: timm's weights, attention at identity"
    return "trained with its attention"


def _nearest(name: str) -> str:
    found = suggest(name)
    return f"did you mean {', '.join(found)}?" if found else "`timm-cbam2 models` lists them all"


def resolve(name: str) -> str:
    """Turn a run folder, model folder, Hub id (`hf-hub:owner/name`) or registered name into timm's own model name.

    Raises:
        UserError: it is none of these; the nearest names are given.
    """
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if os.path.isdir(path):  # which, unlike Path's, takes a name of any length
        for folder in (path, path / "best", path / "last"):
            if (folder / "config.json").is_file():
                return f"local-dir:{folder}"
        if (path / INSERTED).is_file():
            raise UserError(
                f"{name} is of a network outside timm, which no command builds: in Python, "
                "timm_cbam2.load_inserted(network, folder), then timm_cbam2.explain(network, images) or remove(network)"
            )
        raise UserError(f"{name} holds neither a run (best/, last/) nor a model (config.json with model.safetensors)")
    if name.startswith("local-dir:") or ":" not in name and ("/" in name or os.path.exists(path)):
        raise UserError(f"{name}: no such run or model folder; a model on the Hub is written hf-hub:owner/name")
    try:
        source, identifier = parse_model_name(name)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    if source:
        return name
    architecture = get_arch_name(identifier)
    if not timm.is_model(architecture):
        raise UserError(f"unknown model {name}; {_nearest(name)}")
    tag = identifier.partition(".")[2]
    if tag and tag not in pretrained_tags(architecture):
        raise UserError(f"{architecture} has no weights tagged {tag}; {_nearest(name)}")
    return name


def whole_name(name: str) -> str:
    """The same model's name from any working directory: a folder by its whole path."""
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    if not os.path.isdir(folder):
        return name
    return f"{'local-dir:' if name.startswith('local-dir:') else ''}{folder.resolve()}"


def load(name: str, *, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """A model by any name that `resolve` takes, with its weights unless `pretrained` is off.

    Raises:
        UserError: unknown name, no weights to load, or weights that are missing, damaged or do not fit.
    """
    resolved = resolve(name)
    if pretrained and ":" not in resolved and not pretrained_tags(get_arch_name(resolved)):
        raise UserError(f"{name} has no pretrained weights: train it with `timm-cbam2 finetune --model {name}`")
    if resolved.startswith("local-dir:"):
        from .folder import read_config

        folder = Path(resolved.removeprefix("local-dir:"))
        kwargs["pretrained_cfg_overlay"] = overlay_of_folder(folder)
        try:
            read_config(folder)
        except ValueError as error:
            raise UserError(f"cannot load {name}: {one_line(error, 400)}") from error
    with promptly(_is_on_the_hub(resolved, pretrained)) as host:
        return _create(name, resolved, host, pretrained=pretrained, **kwargs)


def _is_on_the_hub(resolved: str, pretrained: bool) -> bool:
    if ":" in resolved:
        return resolved.startswith("hf-hub:")
    cfg = timm.get_pretrained_cfg(resolved)
    return pretrained and cfg is not None and bool(cfg.hf_hub_id) and not cfg.file


def _create(name: str, resolved: str, host: str | None, **kwargs: Any) -> nn.Module:
    try:
        model = timm.create_model(resolved, **kwargs)
        model.multi_label = _tells_several(resolved)
        return model
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AssertionError) as error:
        if host is not None:
            raise UserError(
                f"cannot load {name}: {host} cannot be reached, and it is not in the cache: go online once to fetch it"
            ) from error
        raise UserError(f"cannot load {name}: {one_line(error, 400)}") from error
    except SafetensorError as error:
        raise UserError(f"cannot load {name}: its model.safetensors is damaged ({one_line(error, 200)})") from error


def _tells_several(resolved: str) -> bool:
    """Whether the configuration of a model says that it tells several labels of an image."""
    from .folder import MULTI_LABEL, read_config

    source, _, identifier = resolved.partition(":")
    if source == "hf-hub":  # where timm has just read it
        from huggingface_hub import hf_hub_download
        from timm.models._hub import hf_split

        repository, revision = hf_split(identifier)
        folder = Path(hf_hub_download(repository, "config.json", revision=revision)).parent
    elif source == "local-dir":
        folder = Path(identifier)
    else:
        return False
    return read_config(folder).get("problem_type") == MULTI_LABEL


def check_classifier(model: nn.Module, name: str) -> None:
    """Raise UserError if the model gives features in place of classes."""
    if getattr(model, "num_classes", None) == 0:
        raise UserError(
            f"{name} has no classifier, so it cannot tell what an image is: fine-tune it on labelled images"
        )


def class_names(model: nn.Module, describe: bool = False) -> list[str] | None:
    """Names of the model's classes in label order, None if it does not say.

    ImageNet models that carry none get WordNet ids, or with `describe` their English names.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:  # transformers' own
        names = getattr(getattr(model, "config", None), "id2label", None) or {}
        return [str(names[index]) for index in sorted(names, key=int)] or None
    labels = cfg.get("label_names")
    if isinstance(labels, dict):
        labels = [labels[key] for key in sorted(labels, key=int)]
    if not labels and model.num_classes == cfg.get("num_classes"):
        subset = timm.data.infer_imagenet_subset(model)
        labels = timm.data.ImageNetInfo(subset).label_names() if subset else None
    if not labels or len(labels) != model.num_classes:
        return None
    if describe:
        descriptions = cfg.get("label_descriptions") or {}
        if not descriptions and all(str(label).startswith("n0") or str(label).startswith("n1") for label in labels):
            info = timm.data.ImageNetInfo("imagenet-22k")
            known = set(info.label_names())
            descriptions = {s: info.label_name_to_description(s) for s in labels if s in known}
        labels = [descriptions.get(label, label) for label in labels]
    return [str(label) for label in labels]


def run_settings(name: str) -> dict[str, Any] | None:
    """The resolved settings (`run.json`) of the run that `name` is or lies in; None when it is not one.

    Raises:
        UserError: the settings are damaged.
    """
    path = Path(name.removeprefix("local-dir:")).expanduser()
    for folder in (path, path.parent):
        settings = read_settings(folder) if os.path.isdir(path) else None
        if settings is not None:
            return settings | {"folder": str(folder)}
    return None
