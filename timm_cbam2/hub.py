"""One folder that holds a model: `config.json` and `model.safetensors`, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Sequence

from timm.models import save_for_hf
from torch import nn

from .configuration_cbam2 import Cbam2Config
from .twins_cbam2 import WARM_START

__all__ = ["save"]


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    label_names: Sequence[str] | None = None,
    data_config: dict[str, Any] | None = None,
    tag: str = "finetuned",
) -> Path:
    """Write `model` so that timm ("local-dir:FOLDER") and transformers (`AutoModel…`) give the same logits.

    The folder appears in one step when it is new; in one that is there, each file is replaced in one step and the other
    files stay. A failure before that leaves what was there untouched.

    Args:
        model: a timm model, also one wrapped by Accelerate, DDP or torch.compile.
        folder: where to; parents are made.
        label_names: class names in label order.
        data_config: the preprocessing it was trained with (`timm_cbam2.data.data_config`), in place of its own.
        tag: the pretrained tag, in place of that of a warm start, whose weights these no longer are.

    Returns:
        The folder.

    Raises:
        ValueError: as many names as classes are needed, or timm cannot describe the model.
        OSError: the folder cannot be written.
    """
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if label_names is not None and len(label_names) != model.num_classes:
        raise ValueError(f"{len(label_names)} label_names given, but the model has {model.num_classes} classes")
    with _whole(Path(folder)) as temporary:
        hook = model.register_state_dict_post_hook(_plain_tensors)
        try:
            save_for_hf(
                model,
                temporary,
                model_config={"label_names": list(label_names)} if label_names else None,
                safe_serialization=True,
                data_config=data_config,
            )
        finally:
            hook.remove()
        _complete_config(temporary / "config.json", model, tag)
    return Path(folder)


def _plain_tensors(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """safetensors takes contiguous tensors only, and channels_last weights are not."""
    for key, value in state.items():
        state[key] = value.detach().cpu().contiguous()


def _complete_config(path: Path, model: nn.Module, tag: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    arguments = config.setdefault("model_args", {})
    arguments.pop("num_classes", None)  # stands at the top level; transformers' own wrapper fails on a second one
    if getattr(model, "cbam2_options", None) is not None:
        arguments["cbam2"] = dict(model.cbam2_options)  # resolved: a later default must not change this model
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
def _whole(folder: Path) -> Iterator[Path]:
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
