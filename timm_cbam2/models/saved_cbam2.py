"""Model folders, written and read the same by every timm: what 1.0.31 does, here for the older ones too.

Those describe, in `config.json`, the source of the weights in place of the model; keep neither the arguments that it
was built with nor its number of input channels; and, before 1.0.26, take safetensors in a folder for a pickle.
"""

import functools
import json
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence

import timm
import torch.nn as nn
from packaging.version import Version
from timm.data import resolve_data_config
from timm.models._hub import save_config_for_hf

from .cbam2 import resolve_options

__all__ = [
    "OLD_TIMM",
    "TellsOptions",
    "arguments_of",
    "input_channels",
    "overlay_of_folder",
    "remembering",
    "write_config",
]

OLD_TIMM = Version(timm.__version__) < Version("1.0.31")
_OF_A_TRAINING = {"drop_block_rate", "drop_path_rate", "drop_rate"}
_OF_THE_CALL = {"cache_dir", "device", "dtype", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"}


def input_channels(model: nn.Module) -> int:
    """The number of channels that a model of images takes.

    Raises:
        ValueError: its `pretrained_cfg` names a first convolution that it does not have.
    """
    if getattr(model, "in_chans", None):
        return model.in_chans
    cfg = getattr(model, "pretrained_cfg", None)
    if not cfg:  # none of timm's
        return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    first = cfg.get("first_conv")
    if not first:
        return cfg["input_size"][0]
    name = first[0] if isinstance(first, (list, tuple)) else first
    layer: Any = next((module for found, module in model.named_modules() if found == name), None)
    if not hasattr(layer, "in_channels"):
        raise ValueError(f"first_conv={first!r} in pretrained_cfg is no convolution of {type(model).__name__}.")
    return layer.in_channels


def overlay_of_folder(folder: Any) -> Dict[str, Any]:
    """A `pretrained_cfg_overlay` with which every timm reads the weights of a model folder."""
    return {"source": "", "file": str(Path(folder, "model.safetensors"))} if OLD_TIMM else {}


class TellsOptions(nn.Module):
    """A mixin: timm's own saving, too, writes every option of the attention, not only those that the caller gave."""

    __jit_unused_properties__ = ["_model_args"]

    @property
    def _model_args(self) -> Dict[str, Any]:  # where timm's factory keeps what a model was built with
        own = self.__dict__
        return {**own.get("_given_args", own.get("_model_args", {})), "cbam2": dict(self.cbam2_options)}

    @_model_args.setter
    def _model_args(self, value: Dict[str, Any]) -> None:
        self.__dict__.pop("_model_args", None)  # of a network that was a plain one; TorchScript would take its type
        self.__dict__["_given_args"] = value


def remembering(entrypoint: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The entrypoint, reading any folder; its models keep the arguments it was called with where timm 1.0.31 does."""

    @functools.wraps(entrypoint)
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        cfg: Any = kwargs.get("pretrained_cfg")
        source = cfg.get("source") if isinstance(cfg, Mapping) else None
        if source in ("local-dir", "hf-hub") and entrypoint.__name__.endswith("_cbam2"):
            kwargs["cbam2"] = resolve_options(kwargs.get("cbam2"), saved=True)
        if kwargs.get("norm_layer", "") is None:  # the network's own, which timm 1.0.22 asks for by leaving it out
            del kwargs["norm_layer"]
        if source == "local-dir":
            overlay = kwargs.get("pretrained_cfg_overlay") or {}
            kwargs["pretrained_cfg_overlay"] = {**overlay, **overlay_of_folder(cfg["file"])}
        model = entrypoint(pretrained, **kwargs)
        model._model_args = {key: value for key, value in kwargs.items() if key not in _OF_THE_CALL}
        return model

    return build


def write_config(
    model: nn.Module,
    path: Path,
    label_names: Optional[Sequence[str]] = None,
    data_config: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write the `config.json` of a timm model.

    Args:
        model: As timm built it.
        path: The file.
        label_names: Class names in label order.
        data_config: The preprocessing it was trained with, in place of its own.
    """
    named = {"label_names": list(label_names)} if label_names else {}
    if not OLD_TIMM:
        save_config_for_hf(model, path, model_config=named, data_config=data_config)
        return
    arguments = arguments_of(model)
    save_config_for_hf(model, path, model_config=named, model_args=arguments)
    config = json.loads(path.read_text(encoding="utf-8"))
    config["global_pool"] = arguments.get("global_pool")
    _describe(config["pretrained_cfg"], model, dict(data_config or {}))
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def arguments_of(model: nn.Module) -> Dict[str, Any]:
    """What to build the model with again: drop rates belong to a training, and the rest may have changed since."""
    kept = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in _OF_A_TRAINING}
    pool = getattr(getattr(model, "head", model), "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    pooling = {"global_pool": pool} if isinstance(pool, str) else {}
    return {**kept, "in_chans": input_channels(model), "num_classes": model.num_classes, **pooling}


def _describe(cfg: Dict[str, Any], model: nn.Module, asked: Dict[str, Any]) -> None:
    """Turn a description of the weights' source into that of the model, with the preprocessing asked for."""
    for key in ("input_size", "crop_pct"):
        if asked.get(key):
            cfg.pop(f"test_{key}", None)
    channels = input_channels(model)
    size = tuple(asked.get("input_size") or cfg["input_size"])[1:]
    if size != tuple(cfg["input_size"][1:]):
        cfg["pool_size"] = None
    for key in ("mean", "std"):
        value = tuple(asked.get(key) or cfg[key])
        asked[key] = value if len(value) in (1, channels) else (sum(value) / len(value),)
    if model.num_classes != cfg.get("num_classes"):
        for key in ("label_names", "label_descriptions"):
            cfg.pop(key, None)
    cfg.pop("label_offset", None)  # was applied when the weights were loaded
    asked["input_size"] = (channels, *size)
    cfg.update(resolve_data_config(asked, pretrained_cfg=cfg), num_classes=model.num_classes, custom_load=False)
