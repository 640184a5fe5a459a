"""States of a run in files that hold only data: tensors as safetensors, all else as JSON in the same file's header."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError, one_line

__all__ = ["NO_STATE", "pack", "read_state", "refuse_code", "unpack", "write_state"]

KEY = "timm_cbam2"  # of the header's metadata
# What reading something else than a state raises: each of them is a file that is not what it should be.
NO_STATE = (
    *(SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError),
    *(AssertionError, OverflowError),
)

# DeepSpeed's own containers of numbers, without which none of its checkpoints could be read.
OF_DEEPSPEED = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def write_state(state: Any, file: Path) -> None:
    """Write dicts, lists and tuples of numbers, text, tensors and arrays, as deep as need be.

    Raises:
        TypeError: something else is in it.
    """
    tree, tensors = pack(state)
    save_file(tensors, file, metadata={"format": "pt", KEY: json.dumps(tree)})


def read_state(file: Path, device: str = "cpu") -> Any:
    """What `write_state` wrote, equal bit by bit; nothing of it can run.

    Raises:
        UserError: the file is missing or holds no such state.
    """
    try:
        with safe_open(file, "pt", device=device) as content:
            tree = json.loads(content.metadata()[KEY])
            return unpack(tree, {name: content.get_tensor(name) for name in content.keys()})
    except NO_STATE as error:
        raise UserError(
            f"{file} holds no state of a run ({one_line(error, 120)}), so nothing of it is used: bring back a copy, or "
            "start anew in another folder"
        ) from error


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """`state` as JSON, and its tensors by where they stand in it."""
    tensors: dict[str, Tensor] = {}
    return _pack(state, (), tensors, set()), tensors


def _pack(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor], storages: set[int]) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    name = ".".join(path)
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(np.array(value))
        return {"array": name}
    if isinstance(value, DTensor):  # a shard of its own, which no other has part of
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Tensor):
        value = value.detach()
        storage = value.untyped_storage().data_ptr()
        # By falling stride, so that a tensor in channels_last memory is read into the same memory format.
        order = None if value.is_contiguous() else sorted(range(value.ndim), key=lambda d: -value.stride(d))
        stored = (value if order is None else value.permute(order)).contiguous()
        tensors[name] = stored.clone() if storage in storages else stored
        storages.add(storage)
        return {"tensor": name} if order is None else {"tensor": name, "order": order}
    if isinstance(value, (list, tuple)):
        parts = [_pack(part, (*path, str(index)), tensors, storages) for index, part in enumerate(value)]
        return parts if isinstance(value, list) else {"tuple": parts}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _pack(part, (*path, str(key)), tensors, storages)] for key, part in value.items()]}
    raise TypeError(f"{name or 'the state'} is {type(value).__name__}, which a checkpoint cannot hold")


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(tree, list):
        return [unpack(part, tensors) for part in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree))
    if kind == "tensor":
        value = tensors[tree[kind]]
        if "order" not in tree:
            return value
        return value.permute([tree["order"].index(d) for d in range(value.ndim)])
    if kind == "array":
        return tensors[tree[kind]].numpy()
    if kind == "dtype" and isinstance(getattr(torch, tree[kind]), torch.dtype):
        return getattr(torch, tree[kind])
    if kind == "tuple":
        return tuple(unpack(part, tensors) for part in tree[kind])
    if kind == "dict":
        return {key: unpack(part, tensors) for key, part in tree[kind]}
    raise ValueError(f"unknown kind {kind!r}")


def refuse_code(folder: Path) -> None:
    """Look through a checkpoint of DeepSpeed, which unpickles whatever it finds in its files.

    Raises:
        UserError: a file holds something else than tensors and numbers, or cannot be looked through.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        try:
            found = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - OF_DEEPSPEED
        except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            found = {one_line(error, 100)}
        if found:
            raise UserError(
                f"{file} holds more than tensors ({', '.join(sorted(found)[:3])}) and could run code when DeepSpeed "
                "reads it, so nothing of it is used: start anew in another folder"
            )
    if not files:
        raise UserError(f"{folder} is missing: it holds the weights; start anew in another folder")
