"""All that a run needs to go on bit by bit, in a folder of a file each: nothing is pickled, so nothing read can run."""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, one_line
from .states import NO_STATE, read_state, refuse_code, write_state

__all__ = ["FORMAT", "POSITION", "check_shapes", "fitting", "going_on", "load_all", "save_all"]

POSITION = "position.safetensors"  # where a run is
# What following a place that is none raises; a stream that cannot be reached raises others.
NO_PLACE = (LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError)
FORMAT = 2  # of the folder, in checkpoint.json; those before it, without a number, were pickled by Accelerate


def save_all(accelerator: Any, folder: Path, parts: dict[str, Any]) -> None:
    """Write model, optimizer, everything in `parts`, and each process's random generators; all processes call this.

    Args:
        accelerator: with one prepared model and optimizer.
        folder: exists and is empty.
        parts: by name, what has `state_dict` and `load_state_dict`.
    """
    write_state(_generators(accelerator), folder / _random(accelerator))
    if accelerator.distributed_type.value == "DEEPSPEED":
        accelerator._models[0].save_checkpoint(str(folder), "deepspeed")
        states = {}
    elif accelerator.distributed_type.value == "FSDP":
        from .divided import save_divided

        save_divided(accelerator, folder)
        states = {}
    else:
        model = accelerator.unwrap_model(accelerator._models[0])
        states = {"model": model.state_dict(), "optimizer": accelerator._optimizers[0].state_dict()}
    if accelerator.is_main_process:
        if accelerator.scaler is not None:
            parts = {**parts, "amp": accelerator.scaler}
        states |= {name: part.state_dict() for name, part in parts.items()}
        for name, state in states.items():
            write_state(state, folder / f"{name}.safetensors")


def load_all(accelerator: Any, folder: Path, parts: dict[str, Any], processes: int) -> None:
    """Read what `save_all` wrote; all processes call this.

    Args:
        processes: how many wrote it; when there are others now, random generators stay as they are.

    Raises:
        UserError: a file is missing, holds something else, or does not fit this run.
    """
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        refuse_code(folder / "deepspeed")
        accelerator._models[0].load_checkpoint(str(folder), "deepspeed")
    elif kind == "FSDP":
        from .divided import load_divided

        with fitting(folder):
            load_divided(accelerator, folder)
    else:
        parts = {
            "model": accelerator.unwrap_model(accelerator._models[0]),
            "optimizer": accelerator._optimizers[0],
            **parts,
        }
    if accelerator.scaler is not None:
        parts = {**parts, "amp": accelerator.scaler}
    for name, part in parts.items():
        file = folder / f"{name}.safetensors"
        state = read_state(file)
        with fitting(file):
            part.load_state_dict(state)
            if name == "optimizer":
                check_shapes(part)
    if processes == accelerator.num_processes:
        file = folder / _random(accelerator)
        state = read_state(file)
        with fitting(file):
            _set_generators(accelerator, state)


def check_shapes(optimizer: Any) -> None:
    """Make sure that what an optimizer remembers of each parameter can be of it; torch finds out at the next step.

    Raises:
        ValueError: a tensor has another shape.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for name, value in optimizer.state.get(parameter, {}).items():
                if not isinstance(value, Tensor) or value.ndim != parameter.ndim:
                    continue  # such as a count of steps, or the factors of a second moment
                if any(side not in (1, whole) for side, whole in zip(value.shape, parameter.shape)):
                    raise ValueError(f"{name} has shape {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")


@contextmanager
def fitting(file: Path) -> Iterator[None]:
    """Within the context, what is raised because a file's content does not fit becomes one line.

    Raises:
        UserError: the content of `file` does not fit.
    """
    try:
        yield
    except UserError:
        raise
    except NO_STATE as error:
        raise UserError(
            f"{file} does not fit this run ({one_line(error, 160)}): bring back a copy, or start anew in another folder"
        ) from error


def going_on(batches: Iterator[Any], file: Path | None) -> Iterator[Any]:
    """The same batches; if a stream cannot give the first, it was sent where no image is by the place in `file`.

    Raises:
        UserError: it was.
    """
    try:
        first = next(batches, None)
    except NO_PLACE as error:
        if file is None or isinstance(error, UserError):
            raise
        with fitting(file):
            raise
    if first is not None:
        yield first
        yield from batches


def _random(accelerator: Any) -> str:
    return f"random_{accelerator.process_index}.safetensors"


def _generators(accelerator: Any) -> dict[str, Any]:
    """Of Python, NumPy, and PyTorch on the CPU and on this process's device; and Accelerate's count of batches."""
    device = accelerator.device.type
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        device: None if device == "cpu" else torch.get_device_module(device).get_rng_state(),
        "step": accelerator.step,
    }


def _set_generators(accelerator: Any, state: dict[str, Any]) -> None:
    device = accelerator.device.type
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device != "cpu" and device in state:  # otherwise another device, of which `check_resumable` has told
        torch.get_device_module(device).set_rng_state(state[device])
    accelerator.step = int(state["step"])
