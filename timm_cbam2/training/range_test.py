"""`--lr auto`: a learning rate that rises until the loss does, and the one to train with a tenth below its best."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import Any, Iterator, Mapping

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from ..data.loading import kept_quiet, make_loader, seeded
from ..errors import UserError
from .optimise import keep_frozen, make_optimizer

__all__ = ["choose_lr", "find_lr"]

LOW, HIGH, STEPS = 1e-6, 10.0, 100
SMOOTHING = 0.9  # share of the average of the losses before
TOO_MUCH = 4.0  # times the lowest loss, where the test ends


def choose_lr(
    accelerator: Any,
    network: nn.Module,
    settings: Mapping[str, Any],
    dataset: Any,
    loss: tuple[nn.Module, Any],
    teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """The learning rate for a run, found on the main process; network and generators stay as they are.

    Args:
        accelerator: of the run.
        network: before it is prepared.
        settings: of the run.
        dataset: the training images.
        loss: criterion, and what mixes a batch before it or None.
        teacher: see `distill.Distillation`.

    Returns:
        "chosen", and what was seen: "lrs" and smoothed "losses".

    Raises:
        UserError: the model is divided among processes, or no learning rate lowers the loss.
    """
    if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED"):
        raise UserError(
            "--lr auto needs the whole model in one process, which FSDP and DeepSpeed divide: give a number"
        )
    found: Any = None
    if accelerator.is_main_process:
        try:
            found = _test(accelerator, network, settings, dataset, loss, teacher)
        except UserError as error:
            found = str(error)
    (found,) = broadcast_object_list([found])
    if isinstance(found, str):
        raise UserError(found)
    return found


def find_lr(lrs: list[float], losses: list[float]) -> float:
    """A tenth of the learning rate with the lowest smoothed loss, rounded to two digits.

    Raises:
        UserError: the loss never fell.
    """
    if len(losses) < 10 or min(losses) > 0.99 * losses[0]:
        raise UserError(
            "--lr auto: the loss falls with no learning rate that was tried, so none can be recommended: give one with "
            "--lr, and look at the labels"
        )
    return float(f"{lrs[losses.index(min(losses))] / 10:.1e}")


def _test(
    accelerator: Any,
    network: nn.Module,
    settings: Mapping[str, Any],
    dataset: Any,
    loss: tuple[nn.Module, Any],
    teacher: nn.Module | None,
) -> dict[str, Any]:
    """Train a copy with a rate that rises from step to step: Smith, 2015, https://arxiv.org/abs/1506.01186."""
    criterion, mixup = loss
    trial = copy.deepcopy(network).to(accelerator.device).train()
    keep_frozen(trial)
    optimizer = make_optimizer(trial, {**settings, "lr": LOW})
    together = accelerator.num_processes * settings["accumulate"]  # batches of one step of the run
    # fp16 would need its loss scaled; for a few steps fp32 will do.
    context = nullcontext if settings["mixed_precision"] == "fp16" else accelerator.autocast
    lrs, losses, average = [], [], 0.0
    dataset.set_epoch(0)
    batches = _batches(dataset, settings)
    with seeded(settings["seed"], 0):
        torch.manual_seed(settings["seed"])  # a GPU's too, which the run seeds anew when it begins
        for step in range(STEPS):
            lr = LOW * (HIGH / LOW) ** (step / (STEPS - 1))
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)
            total = 0.0
            for _ in range(together):
                images, targets = (tensor.to(accelerator.device) for tensor in next(batches))
                if settings["channels_last"]:
                    images = images.contiguous(memory_format=torch.channels_last)
                if mixup is not None:
                    even = len(images) // 2 * 2
                    images, targets = mixup(images[:even], targets[:even])
                with context():
                    logits = trial(images).float()
                value = criterion(logits, targets)
                value = value if teacher is None else teacher(images, logits, value)
                (value / together).backward()
                total += value.item() / together
            if settings["clip_grad"] is not None:
                nn.utils.clip_grad_norm_(trial.parameters(), settings["clip_grad"])
            optimizer.step()
            optimizer.zero_grad()
            average = SMOOTHING * average + (1 - SMOOTHING) * total
            smoothed = average / (1 - SMOOTHING ** (step + 1))
            if not math.isfinite(smoothed) or losses and smoothed > TOO_MUCH * min(losses):
                break
            lrs.append(lr)
            losses.append(smoothed)
    return {"chosen": find_lr(lrs, losses), "lrs": lrs, "losses": losses}


def _batches(dataset: Any, settings: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels without end, the same every time."""
    loader = make_loader(dataset, settings["batch_size"], settings["workers"], shuffle=True, seed=settings["seed"])
    while True:
        for images, labels, _ in kept_quiet(loader):
            yield images, labels
