"""`--batch-size auto`: as many images at a time as a GPU takes; on a CPU so few that an epoch has enough steps."""

from __future__ import annotations

import copy
from typing import Any, Callable, Mapping

import torch
from accelerate.utils import find_executable_batch_size, gather_object
from torch import nn

from ..errors import UserError
from .optimise import make_optimizer

__all__ = ["choose_batch_size", "largest"]

CPU_SIZES, CPU_STEPS = (8, 64), 50  # on a CPU larger batches are no faster, and fewer steps learn less
GPU_SIZES, GPU_STEPS = (8, 1024), 20


def choose_batch_size(
    accelerator: Any, network: nn.Module, settings: Mapping[str, Any], side: tuple[int, ...], images: int
) -> dict[str, Any]:
    """Images per step and process.

    Args:
        accelerator: of the run.
        network: before it is prepared.
        settings: of the run.
        side: (C, H, W) of an image.
        images: to train on.

    Returns:
        "chosen", and "why", for a person.

    Raises:
        UserError: not even the smallest batch fits.
    """
    together = accelerator.num_processes * settings["accumulate"]
    on_gpu = accelerator.device.type != "cpu"
    (least, most), steps = (GPU_SIZES, GPU_STEPS) if on_gpu else (CPU_SIZES, CPU_STEPS)
    asked = max(images // (steps * together), 1)
    size = min(max(1 << (asked.bit_length() - 1), least), most)  # a power of two
    size = max(2, min(size, 1 << (max(images // together, 2).bit_length() - 1)))
    why = f"{steps} steps or more of an epoch of {images} images, {least} to {most}"
    if on_gpu:
        found = largest(lambda batch_size: _try(accelerator, network, settings, side, batch_size), size)
        found = min(gather_object([found]))
        why = f"the largest power of two that one step fits in memory with, at most {size}"
        if not found:
            raise UserError("--batch-size auto: not even 2 images fit into the GPU's memory: give a smaller --img-size")
        size = found
    return {"chosen": size, "why": why}


def largest(trial: Callable[[int], None], start: int) -> int:
    """`start`, halved until `trial` does not run out of memory, by Accelerate; 0 where 2 images are too many."""
    size = start

    def halve() -> int:
        nonlocal size
        size = size // 2 if size > 2 else 0
        return size

    def attempt(batch_size: int) -> int:
        trial(batch_size)
        return batch_size

    try:
        # Not as a decorator, which in accelerate 1.10 forgets how to reduce.
        return find_executable_batch_size(attempt, start, halve)()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        return 0


def _try(
    accelerator: Any, network: nn.Module, settings: Mapping[str, Any], side: tuple[int, ...], batch_size: int
) -> None:
    """Two steps of training a copy, with whatever else the run keeps in the GPU's memory."""
    trial = copy.deepcopy(network).to(accelerator.device).train()
    kept = [copy.deepcopy(trial)] if settings["ema"] is not None else []
    lr = settings["lr"] if isinstance(settings["lr"], float) else 1e-6
    optimizer = make_optimizer(trial, {**settings, "lr": lr})
    layout = torch.channels_last if settings["channels_last"] else torch.contiguous_format
    images = torch.zeros((batch_size, *side), device=accelerator.device).contiguous(memory_format=layout)
    for _ in range(2):
        with accelerator.autocast():
            loss = trial(images).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    del kept
