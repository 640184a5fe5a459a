"""Model and optimizer that processes divide between them (FSDP): whole files from one, or each its own shards."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from .states import pack, read_state, unpack, write_state

__all__ = ["load_divided", "save_divided"]

PARTS = ("model", "optimizer")
TREE = "tree.json"  # of a folder of shards: all but its tensors
# The writer's option with which each process writes its own part; torch 2.8 has the other name.
OWN_PART = next(
    word for word in ("save_distributed", "save_sharded") if word in signature(HuggingFaceStorageWriter).parameters
)


def save_divided(accelerator: Any, folder: Path) -> None:
    """Write model and optimizer as Accelerate's FSDP_STATE_DICT_TYPE says; all processes call this.

    FULL_STATE_DICT gives the files of a run that is not divided, whose memory the main process must have. With
    SHARDED_STATE_DICT each process writes its own part as safetensors; any number of processes reads them again.
    """
    for buffer in accelerator._models[0].buffers():  # of one process, whichever of them is to write it
        broadcast(buffer)
    options = StateDictOptions(full_state_dict=not _shards(accelerator), cpu_offload=True)
    states = get_state_dict(*_wrapped(accelerator), options=options)
    for name, state in zip(PARTS, states):
        if not _shards(accelerator):
            if accelerator.is_main_process:
                write_state(state, folder / f"{name}.safetensors")
            continue
        tree, tensors = pack(state)
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / name), **{OWN_PART: True}))
        if accelerator.is_main_process:
            (folder / name / TREE).write_text(json.dumps(tree), encoding="utf-8")


def load_divided(accelerator: Any, folder: Path) -> None:
    """Read what `save_divided` wrote, in either way and from any number of processes; all processes call this.

    Raises:
        UserError, or one of `NO_STATE`: a file is missing, holds something else, or does not fit.
    """
    shards = (folder / PARTS[0]).is_dir()
    options = StateDictOptions(full_state_dict=not shards, cpu_offload=True, broadcast_from_rank0=not shards)
    if shards:  # into tensors of today's division
        states = [
            _read_shards(folder / name, state)
            for name, state in zip(PARTS, get_state_dict(*_wrapped(accelerator), options=options))
        ]
    else:  # the main process reads and tells the others
        main = accelerator.is_main_process
        states = [read_state(folder / f"{name}.safetensors") if main else {} for name in PARTS]
    set_state_dict(*_wrapped(accelerator), model_state_dict=states[0], optim_state_dict=states[1], options=options)


def _read_shards(folder: Path, state: Any) -> Any:
    tree = json.loads((folder / TREE).read_text(encoding="utf-8"))
    _, tensors = pack(state)
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    return unpack(tree, tensors)


def _shards(accelerator: Any) -> bool:
    return accelerator.is_fsdp2 and "SHARDED" in str(accelerator.state.fsdp_plugin.state_dict_type)


def _wrapped(accelerator: Any) -> tuple[Any, Any]:
    return accelerator._models[0], accelerator._optimizers[0].optimizer
