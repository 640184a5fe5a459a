"""All that a run consists of, made from its options: network, optimizer, data, and what its checkpoints tell of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ..data.balance import balance_notes
from ..data.images import Images
from ..errors import UserError
from . import prepare
from .automatic import AUTO, said
from .batch_size import choose_batch_size
from .distill import make_distillation
from .loop import Run
from .optimise import attention_lr_scale, freeze, make_optimizer, make_schedule
from .range_test import choose_lr
from .settings import OF_THE_CALL

__all__ = ["assemble"]


def assemble(accelerator: Any, settings: dict[str, Any], images: Images, folder: Path) -> Run:
    """A run that is ready to train or to be resumed; `settings` are completed in place.

    Raises:
        UserError: model, data and options do not go together.
    """
    settings["mixed_precision"] = accelerator.mixed_precision
    process = accelerator.process_index, accelerator.num_processes
    network, pretrained, notes = prepare.build(settings, images)
    prepare.complete(settings, images, pretrained)
    if settings["attention_lr_scale"] is None:
        settings["attention_lr_scale"] = attention_lr_scale(network, settings["opt"], settings["train"], pretrained)
    if settings["attention_delay_epochs"] >= settings["epochs"]:
        notes.append("attention does not learn: give --attention-delay-epochs less than --epochs")
    config, val_config = prepare.make_configs(settings, images, network)
    resumed = settings["resume"] is not None and any((folder / "checkpoints").glob("step-*"))
    parts = prepare.make_datasets(settings, images, config, val_config, process, resumed)
    trainable = freeze(network, settings["train"])
    teacher = make_distillation(settings, images, config, accelerator)
    if teacher is not None:
        notes.append(
            f"{100 * teacher.alpha:g} % of the loss is how far it is from what {settings['distill_from']} says"
        )
    loss = prepare.make_run_loss(settings, images, accelerator)
    found = _find(accelerator, network, settings, parts["train"], loss, teacher, config)
    train_loader, val_loader = prepare.make_loaders(settings, parts, process[1])
    network = prepare.use_sync_bn(settings, network, accelerator).to(accelerator.device)
    if settings["channels_last"]:
        network = network.to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in network.parameters())
    optimizer = make_optimizer(network, settings)
    blueprint = prepare.whole_copy(network, accelerator)
    average = _average(network, settings, blueprint is not None)
    if settings["compile"]:
        network.compile()
    network, optimizer = accelerator.prepare(network, optimizer)
    if not settings["streaming"]:
        train_loader, val_loader = accelerator.prepare(train_loader, val_loader)
    run = Run(
        accelerator=accelerator,
        network=network,
        ema=average,
        optimizer=optimizer,
        scheduler=None,
        train_loader=train_loader,
        val_loader=val_loader,
        parts=parts,
        folder=folder,
        settings=settings,
        images=images,
        config=val_config,
        info=_compared(settings, images, accelerator),
        trained=(trainable, parameters),
        notes=[*notes, *said(found), *balance_notes(images, settings["balance"])],
        side=tuple(config["input_size"][1:]),
        blueprint=blueprint,
        teacher=teacher,
        loss=loss,
        found=found,
    )
    run.scheduler = make_schedule(optimizer, settings, run.updates_per_epoch)
    return run


def _find(
    accelerator: Any,
    network: nn.Module,
    settings: dict[str, Any],
    dataset: Any,
    loss: tuple[nn.Module, Any],
    teacher: nn.Module | None,
    config: dict[str, Any],
) -> dict[str, Any]:
    """What is left to the run itself, filled into `settings` in place."""
    found = {}
    if settings["batch_size"] == AUTO:
        found["batch_size"] = choose_batch_size(accelerator, network, settings, config["input_size"], len(dataset))
        settings["batch_size"] = found["batch_size"]["chosen"]
    if settings["lr"] == AUTO:
        found["lr"] = choose_lr(accelerator, network, settings, dataset, loss, teacher)
        settings["lr"] = found["lr"]["chosen"]
    return found


def _average(network: nn.Module, settings: dict[str, Any], divided: bool) -> ModelEmaV3 | None:
    if settings["ema"] is None:
        return None
    if divided:
        raise UserError("--ema needs the whole model in each process, which FSDP and DeepSpeed divide: leave it out")
    return ModelEmaV3(network, decay=settings["ema"], use_warmup=True)


def _compared(settings: dict[str, Any], images: Images, accelerator: Any) -> dict[str, Any]:
    """What goes into checkpoint.json, to be compared on resuming."""
    training = {k: v for k, v in settings.items() if k not in OF_THE_CALL}
    return {
        "settings": json.loads(json.dumps(training, default=str)),
        "data": prepare.fingerprint(images),
        "processes": accelerator.num_processes,
        "versions": {**prepare.versions(), "device": accelerator.device.type},
    }
