"""A network outside timm that blocks were put into, as a folder: its state dict, and what was put where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

from safetensors.torch import save_model
from torch import nn

from ..models.cbam2 import is_cbam2

__all__ = ["INSERTED", "inserted_blocks", "read_inserted", "write_inserted"]

INSERTED = "cbam2.json"
FORMAT = 1
MAX_BYTES = 10_000_000


def inserted_blocks(model: nn.Module) -> list[dict[str, Any]]:
    """What `timm_cbam2.insert` put into `model`: for each block its module, kind, slot, channels and options."""
    found = []
    for name, block in model.named_modules():
        if is_cbam2(block) and hasattr(block, "inserted"):
            module = name.removesuffix(block.inserted["slot"]).removesuffix(".")
            found.append({"module": module, **block.inserted})
    return found


def write_inserted(
    model: nn.Module, folder: Path, label_names: Sequence[str] | None, data_config: dict[str, Any] | None
) -> None:
    """Write `model.safetensors` and `cbam2.json` into a folder that exists; see `timm_cbam2.load_inserted`."""
    save_model(model, str(folder / "model.safetensors"))
    content = {
        "format": FORMAT,
        "network": f"{type(model).__module__}.{type(model).__qualname__}",
        "blocks": inserted_blocks(model),
        "label_names": list(label_names) if label_names else None,
        "data_config": data_config,
    }
    text = json.dumps({key: value for key, value in content.items() if value is not None}, indent=2)
    (folder / INSERTED).write_text(text + "\n", encoding="utf-8")


def read_inserted(folder: Path) -> dict[str, Any]:
    """The contents of a folder's `cbam2.json`.

    Raises:
        ValueError: it is missing, damaged, or of a later version.
    """
    path = folder / INSERTED
    if not path.is_file():
        hint = "; it has a config.json: open it with timm or transformers" if (folder / "config.json").is_file() else ""
        raise ValueError(f"{folder} has no {INSERTED}, which says what was inserted where{hint}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: that says nothing of blocks")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    blocks = content.get("blocks") if isinstance(content, dict) else None
    if not isinstance(blocks, list) or not all(_is_block(block) for block in blocks):
        raise ValueError(f"{path} does not say what was inserted where; save the model anew")
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r}, this version of timm_cbam2 reads {FORMAT}")
    return content


def _is_block(block: Any) -> bool:
    types = {"module": str, "kind": str, "slot": str, "channels": int, "options": dict}
    return isinstance(block, dict) and all(isinstance(block.get(name), kind) for name, kind in types.items())
