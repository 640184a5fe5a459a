"""One folder that holds a model: `config.json`, `model.safetensors`, `README.md`, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..models.cbam2 import is_cbam2
from ..models.configuration_cbam2 import Cbam2Config, entrypoint
from ..models.resnet_cbam2 import CIFAR_DEPTHS
from ..models.saved_cbam2 import write_config
from ..models.weights_cbam2 import WARM_START
from .card import is_generated, write_card
from .inserted import inserted_blocks, write_inserted

__all__ = ["check_folder", "expected_shapes", "model_code", "read_config", "save", "whole", "with_auto_map"]

MULTI_LABEL = "multi_label_classification"  # transformers' own word for several labels an image
MAX_CONFIG = 10_000_000  # bytes


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    tag: str = "finetuned",
) -> Path:
    """Write `model` so that timm ("local-dir:FOLDER") and transformers (`AutoModel…`) give the same logits.

    A network that is none of timm's, or holds blocks elsewhere than a registered model does, is written as its state
    dict and `cbam2.json`, which says what was inserted where; `timm_cbam2.load_inserted` reads both.

    The folder appears in one step when it is new; in one that is there, each file is replaced in one step and the other
    files stay. A failure before that leaves what was there untouched.

    Args:
        model: a timm model or one with inserted blocks, also wrapped by Accelerate, DDP or torch.compile.
        folder: where to; parents are made.
        label_names: class names in label order.
        data_config: the preprocessing it was trained with (`timm_cbam2.data.data_config`), in place of its own.
        tag: the pretrained tag, in place of that of a warm start, whose weights these no longer are.

    Returns:
        The folder.

    Raises:
        ValueError: as many names as classes are needed, timm cannot describe the model, or it is reparameterized.
        OSError: the folder cannot be written.
    """
    from accelerate.utils import extract_model_from_parallel

    # keep_fp32_wrapper=False would take mixed precision from the model itself, and its training go on in fp32.
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(label_names, str):
        raise ValueError(f"label_names={label_names!r} is one name: give a list of them")
    if any(is_cbam2(module) and module.spatial.conv is not None for module in model.modules()):
        raise ValueError("a reparameterized model is for inference, and no library loads it: save it before")
    if not hasattr(model, "cbam2_options") and inserted_blocks(model):
        with whole(Path(folder)) as temporary:
            write_inserted(model, temporary, label_names, data_config)
        return Path(folder)
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} is not a model that timm made, and timm_cbam2.insert put nothing into it: only "
            "those can be saved"
        )
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label_names given, but the model has {model.num_classes} classes")
    with whole(Path(folder)) as temporary:
        hook = model.register_state_dict_post_hook(_plain_tensors)
        try:
            save_file(model.state_dict(), temporary / "model.safetensors")
        finally:
            hook.remove()
        write_config(model, temporary / "config.json", label_names, data_config)
        _complete_config(temporary / "config.json", model, tag)
        if is_generated(Path(folder) / "README.md"):
            write_card(temporary, f"user/{Path(folder).resolve().name}", Path(folder))
    return Path(folder)


def check_folder(folder: str | Path) -> dict[str, Any]:
    """Make sure that a model folder is whole: its weights are exactly those its configuration asks for.

    Nothing is allocated or run for it: the header of the file is compared with a network on the meta device.

    Args:
        folder: With config.json and model.safetensors.

    Returns:
        The contents of config.json.

    Raises:
        ValueError: What is missing, damaged or does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pth", ".pt", ".ckpt"))
        hint = "; {} is a pickle, which can run code when it is read: save it anew as safetensors"
        raise ValueError(f"{folder} has no model.safetensors{hint.format(pickles[0]) if pickles else ''}")
    expected = expected_shapes(config)
    try:
        with safe_open(weights, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged or cut off ({error}): get or save it again") from error
    problems = [f"{key} is missing" for key in sorted(expected.keys() - found.keys())]
    problems += [f"{key} is unexpected" for key in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key} has shape {found[key]}, not {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{weights} does not match config.json ({config['architecture']}): {'; '.join(problems[:3])}{more}"
        )
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a folder's config.json.

    Raises:
        ValueError: It is missing, too large, not JSON or not of a model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a model, such as a run's best/")
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: that is no model's configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{path} names no architecture")
    return config


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every key and shape that the weights of a configuration must have.

    Raises:
        ValueError: The configuration describes no model of ours.
    """
    name = config["architecture"]
    arguments = config.get("model_args") or {}
    try:
        if name in CIFAR_DEPTHS:  # the plain controls
            create: Callable[..., nn.Module] = partial(timm.create_model, name)
        else:
            settings = Cbam2Config.from_dict({k: v for k, v in config.items() if k != "auto_map"})
            create, arguments = entrypoint(name), settings.model_args
        arguments = {k: v for k, v in arguments.items() if k not in ("num_classes", "pretrained")}
        with torch.device("meta"):
            model = create(pretrained=False, num_classes=config.get("num_classes"), **arguments)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"config.json describes no model of ours: {' '.join(str(error).split())[:300]}") from error
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def model_code() -> dict[str, Path]:
    """The files that a repository needs for `trust_remote_code=True`, by name."""
    models = Path(__file__).parent.parent / "models"
    return {path.name: path for path in sorted(models.glob("*cbam2.py"))}


def with_auto_map(config: dict[str, Any]) -> str:
    """config.json of a folder that carries `model_code`."""
    classes = dict(
        AutoModel="Cbam2Model",
        AutoModelForImageClassification="Cbam2ForImageClassification",
        AutoBackbone="Cbam2Backbone",
    )
    auto_map = {name: f"modeling_cbam2.{cls}" for name, cls in classes.items()}
    auto_map["AutoConfig"] = "configuration_cbam2.Cbam2Config"
    return json.dumps({**config, "auto_map": auto_map}, indent=2, sort_keys=True) + "\n"


def _plain_tensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """safetensors takes contiguous tensors only, and channels_last weights are not."""
    for key, value in state.items():
        state[key] = value.detach().cpu().contiguous()


def _complete_config(path: Path, model: nn.Module, tag: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    arguments = config.setdefault("model_args", {})
    arguments.pop("num_classes", None)  # stands at the top level; transformers' own wrapper fails on a second one
    if getattr(model, "multi_label", False):
        config["problem_type"] = MULTI_LABEL
    cfg = config["pretrained_cfg"]
    if not cfg.get("tag") or cfg["tag"].startswith(WARM_START):
        cfg["tag"] = tag
    text = json.dumps(config, indent=2) + "\n"
    if "cbam2" in arguments:
        completed = Cbam2Config.from_dict(config)
        completed.architectures = ["Cbam2ForImageClassification" if model.num_classes else "Cbam2Model"]
        completed.dtype = next(model.parameters()).dtype
        text = completed.to_json_string()
    path.write_text(text, encoding="utf-8")


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place, or whose files do, when the block ends without an error."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o666 & ~_umask())  # safetensors makes private files
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if folder.exists():
            for file in sorted(temporary.iterdir(), key=lambda f: f.name == "config.json"):
                file.replace(folder / file.name)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
