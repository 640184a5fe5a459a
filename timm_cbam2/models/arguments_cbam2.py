"""Which arguments a saved configuration may give to timm's networks, so that a wrong one is named before it is used."""

import inspect
import sys
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Callable, Iterator, Mapping, Optional

import torch
from timm.layers import get_act_layer, get_norm_act_layer, get_norm_layer
from timm.models._pretrained import PretrainedCfg

from .options_cbam2 import MAX_COUNT

__all__ = ["MAX_CLASSES", "check_arguments", "check_config", "check_pretrained_cfg", "naming", "refuse_fixed"]

MAX_CLASSES = 1_000_000
MAX_DEPTH = 1000  # blocks of a stage
# Of timm's builder, not of a network.
OF_THE_BUILDER = {
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict", "cache_dir"),
    *("features_only", "out_indices", "feature_cfg", "feature_cls"),
}
# What timm raises about arguments that it does not check.
CONFUSED = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError),
)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_count(value: Any, largest: int = MAX_COUNT) -> bool:
    return _is_whole(value) and 1 <= value <= largest


def _are(check: Callable[[Any], bool], *lengths: int) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (list, tuple)) and (not lengths or len(v) in lengths) and all(map(check, v))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return abs(value) <= sys.float_info.max  # type: ignore[operator]  # mypy's Real has no order


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(rule: tuple[Callable[[Any], bool], str]) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v is None or rule[0](v), f"null or {rule[1]}"


def _one_of(*values: Any) -> tuple[Callable[[Any], bool], str]:
    shown = ", ".join(repr(value) for value in values)
    return lambda v: type(v) in (str, int) and v in values, f"one of {shown}"


def _is_layer(*known: Callable[[str], Any]) -> Callable[[Any], bool]:
    """Whether a value is a class of layers, or a name that timm finds one by."""

    def check(value: Any) -> bool:
        if not isinstance(value, str):
            return callable(value)
        for find in known:
            try:
                return find(value) is not None
            except KeyError:
                continue
        return False

    return check


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, (str, torch.device)) and bool(torch.device(value))
    except RuntimeError:
        return False


_COUNT = (_is_count, f"a whole number from 1 to {MAX_COUNT}")
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_RATE = (lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
_NUMBER = (_is_number, "a number")
_TEXT = (_is_text, "text")
_TEXTS = (lambda v: _is_text(v) or _are(_is_text)(v), "text or a list of texts")
_WIDTHS = (_are(_is_count, 4), f"four whole numbers from 1 to {MAX_COUNT}")
_DEPTHS = (_are(lambda v: _is_count(v, MAX_DEPTH), 3, 4), f"whole numbers from 1 to {MAX_DEPTH}, one for each stage")
_SIZE = (_are(_is_count, 3), f"three whole numbers from 1 to {MAX_COUNT}: channels, height and width")
_SIDES = (_are(_is_count, 2), f"two whole numbers from 1 to {MAX_COUNT}")
_COLOURS = (_are(_is_number), "a list of numbers")
_CLASSES = (lambda v: _is_whole(v) and 0 <= v <= MAX_CLASSES, f"a number from 0 to {MAX_CLASSES:,}")
_DICT = (lambda v: isinstance(v, Mapping), "an object of names and values")
_ACT = (_is_layer(get_act_layer), "the name of an activation of timm's")
_NORM = (_is_layer(get_norm_layer, get_norm_act_layer), "the name of a norm of timm's")

_ARGUMENTS = {
    "num_classes": _CLASSES,
    "in_chans": _COUNT,
    "output_stride": _one_of(2, 4, 8, 16, 32),
    "global_pool": _one_of(
        *("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")
    ),
    "act_layer": _ACT,
    "norm_layer": _or_none(_NORM),
    "drop_rate": _RATE,
    "drop_path_rate": _RATE,
    "device": _or_none((_is_device, "a device of torch's")),
    "dtype": _or_none((lambda v: isinstance(v, torch.dtype), "nothing: dtype belongs at the top of config.json")),
    "stem_type": _one_of(
        *("", "deep", "deep_tiered", "deep_tiered_narrow", "patch", "overlap", "overlap_tiered", "overlap_act")
    ),
    # ResNet
    "layers": _DEPTHS,
    "channels": _or_none((_are(_is_count, 3, 4), _WIDTHS[1])),
    "aa_layer": _or_none((_is_layer(), "a class of layers")),
    "drop_block_rate": _RATE,
    "block_args": _or_none(_DICT),
    **dict.fromkeys(("cardinality", "base_width", "stem_width", "block_reduce_first", "down_kernel_size"), _COUNT),
    **dict.fromkeys(("replace_stem_pool", "avg_down", "zero_init_last"), _FLAG),
    # ConvNeXt
    "depths": _DEPTHS,
    "dims": _WIDTHS,
    "kernel_sizes": (lambda v: _is_count(v) or _WIDTHS[0](v), f"one or four whole numbers from 1 to {MAX_COUNT}"),
    "ls_init_value": _or_none(_NUMBER),
    "patch_size": _COUNT,
    "head_init_scale": _NUMBER,
    "head_hidden_size": _or_none(_COUNT),
    "norm_eps": _or_none((lambda v: _is_number(v) and v > 0, "a number above 0")),
    **dict.fromkeys(("head_norm_first", "conv_mlp", "conv_bias", "use_grn"), _FLAG),
    # timm's builder
    "features_only": _FLAG,
    "pretrained_strict": _FLAG,
    "feature_cfg": _or_none(_DICT),
    "out_indices": _or_none((lambda v: _is_whole(v) or _are(_is_whole)(v), "whole numbers, the first stage being 0")),
}
_CFG = {
    "num_classes": _CLASSES,
    "input_size": _SIZE,
    "test_input_size": _or_none(_SIZE),
    "min_input_size": _or_none(_SIZE),
    "fixed_input_size": (lambda v: v is False, "false: these networks take images of any size"),
    "interpolation": _one_of("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"),
    "crop_pct": (lambda v: _is_number(v) and 0 < v <= 10, "a number above 0, at most 10"),
    "test_crop_pct": _or_none((lambda v: _is_number(v) and 0 < v <= 10, "a number above 0, at most 10")),
    "crop_mode": _one_of("center", "squash", "border"),
    "mean": _COLOURS,
    "std": (lambda v: _COLOURS[0](v) and all(v), "a list of numbers, none of them 0"),
    "label_offset": _or_none((lambda v: _is_whole(v) and 0 <= v <= MAX_CLASSES, "a whole number from 0")),
    "label_names": _or_none((lambda v: _are(_is_text)(v) or isinstance(v, Mapping), "a list of texts")),
    "label_descriptions": _or_none((lambda v: _are(_is_text)(v) or isinstance(v, Mapping), "an object of texts")),
    "pool_size": _or_none(_SIDES),
    "test_pool_size": _or_none(_SIDES),
    "paper_ids": _or_none(_TEXTS),
    "notes": _or_none(_TEXTS),
    "first_conv": _or_none(_TEXTS),
    "classifier": _or_none(_TEXTS),
    "custom_load": (lambda v: isinstance(v, (bool, str)), "true or false"),
    "state_dict": _or_none(_DICT),
    "url": _or_none(_TEXTS),
    **dict.fromkeys(
        (
            *("file", "hf_hub_id", "hf_hub_filename", "source", "architecture", "tag"),
            *("license", "description", "origin_url", "paper_name"),
        ),
        _or_none(_TEXT),
    ),
}
_CONFIG = {
    "architecture": _TEXT,
    "architectures": _or_none((_are(_is_text), "a list of texts")),
    "model_args": _or_none(_DICT),
    "pretrained_cfg": _or_none(_DICT),
    "num_classes": _or_none(_CLASSES),
    "id2label": _or_none(
        (
            lambda v: isinstance(v, Mapping) and all(str(k).isdecimal() and _is_text(n) for k, n in v.items()),
            "an object of numbers and names",
        )
    ),
    "label2id": _or_none(
        (
            lambda v: isinstance(v, Mapping) and all(_is_text(n) and _is_whole(k) for n, k in v.items()),
            "an object of names and numbers",
        )
    ),
    "out_features": _or_none((_are(_is_text), "a list of texts")),
    "out_indices": _or_none((_are(_is_whole), "a list of whole numbers")),
    "quantization_config": _or_none(_DICT),
    "_attn_implementation": _or_none(_TEXT),
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        _or_none(
            (
                lambda v: isinstance(getattr(torch, v, None) if _is_text(v) else v, torch.dtype),
                "the name of a data type of torch's",
            )
        ),
    ),
}
# With them, timm would read another file than the folder's model.safetensors, such as a pickle, or shift its classes.
_NOT_IN_FOLDERS = ("custom_load", "hf_hub_filename", "state_dict", "label_offset")


def check_arguments(network: type, arguments: Mapping[str, Any]) -> None:
    """Check what `build_twin` gets for a network.

    Args:
        network: its class.
        arguments: By name, for it and for timm's builder.

    Raises:
        ValueError: Naming the argument, its value and what is allowed.
    """
    builders = [cls.__dict__["__init__"] for cls in network.__mro__ if "__init__" in cls.__dict__]
    parameters = {name for builder in builders for name in inspect.signature(builder).parameters}
    known = (parameters | OF_THE_BUILDER) - {"self", "args", "kwargs"}
    for name, value in arguments.items():
        if name not in known:
            raise ValueError(f"{network.__name__} has no argument {name}={_shown(value)}: leave {name} out.")
        _check(name, value, _ARGUMENTS, "")


def check_pretrained_cfg(cfg: Any) -> None:
    """Check timm's description of weights and input, where it is given as one.

    Raises:
        ValueError: Naming the key, its value and what is allowed.
    """
    if not isinstance(cfg, Mapping):
        return
    from_folder = cfg.get("source") in ("hf-hub", "local-dir")
    names = {field.name for field in fields(PretrainedCfg)} | _CFG.keys()  # timm's releases differ
    for name, value in cfg.items():
        if name not in names:
            raise ValueError(f"pretrained_cfg {name}={_shown(value)} is unknown to timm: leave {name} out.")
        if from_folder and name in _NOT_IN_FOLDERS and value:
            raise ValueError(f"pretrained_cfg {name}={_shown(value)} is not allowed in a model folder: leave it out.")
        _check(name, value, _CFG, "pretrained_cfg ")


def check_config(config: Mapping[str, Any]) -> None:
    """Check the keys of a config.json that mean something to both libraries.

    Raises:
        ValueError: Naming the key, its value and what is allowed.
    """
    for name, value in config.items():
        _check(name, value, _CONFIG, "")
    for name, value in (config.get("model_args") or {}).items():
        _check(name, value, _ARGUMENTS, "model_args ")
    check_pretrained_cfg(config.get("pretrained_cfg"))


def refuse_fixed(variant: str, arguments: Mapping[str, Any], *fixed: str) -> None:
    """Refuse arguments that an architecture has settled.

    Raises:
        ValueError: Naming the argument.
    """
    for name in fixed:
        if name in arguments:
            raise ValueError(f"{name}={_shown(arguments[name])} is not allowed: {variant} has its own; leave it out.")


@contextmanager
def naming(variant: str, arguments: Optional[Mapping[str, Any]]) -> Iterator[None]:
    """Within the context, what goes wrong because of a saved configuration's arguments is told with their names.

    Raises:
        ValueError: `variant` cannot be built with `arguments`; nothing changes where there are none.
    """
    try:
        yield
    except CONFUSED as error:
        if not arguments or isinstance(error, ValueError) and any(f"{name}=" in str(error) for name in arguments):
            raise
        raise ValueError(
            f"{variant} cannot be built with {', '.join(f'{k}={_shown(v)}' for k, v in arguments.items())}: "
            f"{' '.join(str(error).split())[:200] or type(error).__name__}"
        ) from error


def _check(name: str, value: Any, rules: Mapping[str, Any], where: str) -> None:
    is_allowed, allowed = rules.get(name, (None, ""))
    if is_allowed is not None and not is_allowed(value):
        raise ValueError(f"{where}{name}={_shown(value)} is not allowed; give {allowed}.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:299]}…"
