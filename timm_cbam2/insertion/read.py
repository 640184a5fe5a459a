"""Weights from a file or a folder, or the Hub, with what it says of their network; nothing but tensors is unpickled."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from ..errors import UserError, one_line
from ..hub.inserted import INSERTED
from ..hub.zoo import without_memory
from ..models.cbam2 import resolve_options
from ..models.reach_cbam2 import promptly

__all__ = ["Source", "read_source"]

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Where training scripts put the weights, the averaged ones first: timm's and torchvision's, Lightning's, and others'.
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net", "network")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MAX_CONFIG = 10_000_000  # bytes


@dataclass
class Source:
    """Weights, and what the file or the folder says of their network.

    Attributes:
        name: as a person gave it.
        weights: by key, as they were saved.
        architecture: timm's name, where one is given.
        arguments: of timm's `create_model`, where they are given.
        cfg: timm's `pretrained_cfg`: preprocessing and class names.
        note: which of several sets of weights was taken; or "".
    """

    name: str
    weights: dict[str, Tensor]
    architecture: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    cfg: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def read_source(name: str) -> Source:
    """Read FOLDER, FILE or hf-hub:ID.

    Raises:
        UserError: there is nothing of the kind, it is damaged, or reading it would run code.
    """
    if name.startswith("hf-hub:"):
        return _from_folder(_fetched(name), name)
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        for folder in (path, path / "best", path / "last"):
            if any((folder / weights).is_file() for weights in WEIGHTS):
                return _from_folder(folder, name)
        raise UserError(f"{name} holds no model.safetensors or pytorch_model.bin: give a model's folder or its file")
    if not path.is_file():
        raise UserError(f"{name}: no such file or folder; weights on the Hub are written hf-hub:owner/name")
    beside = _from_folder(path.parent, name, path) if path.name in WEIGHTS else None
    return beside or _from_file(path, name)


def _fetched(name: str) -> Path:
    """The cached files of a repository on the Hub."""
    repo, _, revision = name.removeprefix("hf-hub:").partition("@")
    with promptly() as host:
        try:
            _download(repo, revision, "config.json")
            found = next(filter(None, (_download(repo, revision, file) for file in WEIGHTS)), None)
        except (OSError, ValueError) as error:
            reason = f"{host} cannot be reached, and it is not in the cache" if host else one_line(error, 200)
            raise UserError(f"{name} cannot be fetched: {reason}") from error
    if found is None:
        raise UserError(f"{name} has neither {' nor '.join(WEIGHTS)}")
    return found.parent


def _download(repo: str, revision: str, file: str) -> Path | None:
    """A file of a repository, None where it has no such file."""
    try:
        return Path(hf_hub_download(repo, file, revision=revision or None))
    except RemoteEntryNotFoundError:
        return None


def _from_folder(folder: Path, name: str, weights: Path | None = None) -> Source:
    """Weights with the config.json beside them, which timm, transformers or this package wrote."""
    weights = weights or next(folder / file for file in WEIGHTS if (folder / file).is_file())
    source = _from_file(weights, name)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / INSERTED).is_file():
            raise UserError(
                f"{name} is of a network outside timm: build that, then timm_cbam2.load_inserted(network, folder)"
            )
        return source
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.stat().st_size < MAX_CONFIG else None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {one_line(error, 200)}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} is no model's configuration")
    if isinstance(config.get("architecture"), str):
        source.architecture = config["architecture"]
        arguments = config.get("model_args") or {}
        source.arguments = {k: v for k, v in arguments.items() if k not in ("num_classes", "pretrained")}
        if source.architecture.endswith("_cbam2"):
            source.arguments["cbam2"] = resolve_options(arguments.get("cbam2"), saved=True)
        source.cfg = dict(config.get("pretrained_cfg") or {})
        for key in ("label_names", "label_descriptions"):
            if config.get(key):
                source.cfg[key] = config[key]
    elif config.get("model_type") in ("resnet", "convnext", "convnextv2"):
        source.architecture = _of_transformers(config)
        labels = config.get("id2label") or {}
        if labels:
            source.cfg["label_names"] = [labels[key] for key in sorted(labels, key=int)]
    return source


def _of_transformers(config: Mapping[str, Any]) -> str | None:
    """timm's name of the network that transformers describes, None where timm has none."""
    depths, sizes = config.get("depths"), config.get("hidden_sizes")
    if config["model_type"] == "resnet":
        basic = config.get("layer_type") == "basic"
        known = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"} if basic else {
            (2, 2, 2, 2): "resnet26", (3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152",
        }  # fmt: skip
        if config.get("downsample_in_bottleneck") or sizes != [
            n // (4 if basic else 1) for n in (256, 512, 1024, 2048)
        ]:
            return None
        return known.get(tuple(depths or ()))
    for size in ("atto", "femto", "pico", "nano", "tiny", "small", "base", "large", "xlarge", "huge"):
        name = f"{config['model_type']}_{size}"
        if timm.is_model(name) and _convnext_shape(name) == (depths, sizes):
            return name
    return None


def _convnext_shape(name: str) -> tuple[list[int], list[int]]:
    model = without_memory(name)
    return [len(stage.blocks) for stage in model.stages], [info["num_chs"] for info in model.feature_info]


def _from_file(path: Path, name: str) -> Source:
    if path.suffix == ".safetensors":
        try:
            return Source(name, load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{name} is damaged or cut off ({one_line(error, 100)}): get or save it again") from error
    if path.suffix not in PICKLES:
        raise UserError(f"{name} is no file of weights; give .safetensors, {', '.join(PICKLES)}, or a folder")
    content = _tensors_of(path, name)
    if not isinstance(content, Mapping):
        raise UserError(f"{name} holds a {type(content).__name__}, no weights")
    key = next((key for key in KEYS if isinstance(content.get(key), Mapping) and _some_tensor(content[key])), None)
    weights = {k: v for k, v in clean_state_dict(content[key] if key else content).items() if torch.is_tensor(v)}
    if not weights:
        raise UserError(f"{name} holds no weights under {', '.join(KEYS)}, nor by itself")
    averaged = key in ("state_dict_ema", "model_ema")
    return Source(name, weights, _architecture(content), note=f"the averaged weights ({key})" if averaged else "")


def _some_tensor(values: Mapping[str, Any]) -> bool:
    return any(torch.is_tensor(value) for value in values.values())


def _tensors_of(path: Path, name: str) -> Any:
    """What torch saved, without running anything: a Namespace of options, which timm and torchvision put in, is data.

    Raises:
        UserError: there is more in it than that, or it is damaged.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except (RuntimeError, ValueError, pickle.UnpicklingError):
            others = []
        others = sorted(set(others) - {"argparse.Namespace"}, key=lambda other: (other.startswith("torch."), other))
        if not others:
            raise UserError(f"{name} is damaged, or no file that torch saved ({one_line(error, 100)})") from error
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{name} holds more than tensors ({', '.join(others[:3])}{more}), and reading that can run code: where it "
            "is trusted, save its weights alone, with torch.save(model.state_dict(), FILE)"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{name} is damaged or cut off ({one_line(error, 100)}): get or save it again") from error


def _architecture(content: Mapping[str, Any]) -> str | None:
    """The architecture that a training script noted, if timm knows it."""
    options = content.get("args")
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    hyper = content.get("hyper_parameters")
    for group in (content, options, hyper):
        for key in ("arch", "architecture", "model", "model_name"):
            value = group.get(key) if isinstance(group, Mapping) else None
            if isinstance(value, str) and timm.is_model(value.partition(".")[0]):
                return value.partition(".")[0]
    return None
