"""Long trainings of the shipped CIFAR networks, as model folders for `checkpoints/`."""

from __future__ import annotations

import json
import time

import timm
import torch

import timm_cbam2
from timm_cbam2.data.loading import data_config

from . import Place
from .ablation import PAD, settings_of
from .lean import Crops, Fleet
from .pictures import CLASSES, cifar

__all__ = ["resnet20", "resnet56"]

RECIPE = dict(
    opt="sgd", lr=0.1, weight_decay=5e-4, batch_size=128, sched="cosine", warmup_epochs=3.0, label_smoothing=0.05,
    augment="mild", mixed_precision="bf16",
)  # fmt: skip
TRIAL = 2  # epochs whose time says how many fit
LONGEST = {"resnet20_cbam2": 300, "resnet56_cbam2": 200}
AIM = {"resnet20_cbam2": 0.92, "resnet56_cbam2": 0.93}


def resnet20(place: Place) -> None:
    """At least 92 % of the last 5,000 images is the aim."""
    _train(place, "resnet20_cbam2")


def resnet56(place: Place) -> None:
    """At least 93 %."""
    _train(place, "resnet56_cbam2")


def _fleet(place: Place, name: str, epochs: int, train: object) -> Fleet:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).to(place.device, memory_format=torch.channels_last)
    settings = settings_of(place, RECIPE)
    if not place.quick:
        settings |= {"epochs": epochs, "warmup_epochs": min(settings["warmup_epochs"], epochs / 10)}
    return Fleet([network], [0], settings, train, Crops(PAD))


def _train(place: Place, name: str) -> None:
    train, val, real = cifar(place)
    trial = _fleet(place, name, TRIAL, train)
    start = time.monotonic()
    for number in range(TRIAL):
        if number:  # the first one sets everything up
            start = time.monotonic()
        trial.epoch(number)
        if place.cuda:
            torch.cuda.synchronize()
    each = time.monotonic() - start
    epochs = 1 if place.quick else max(1, min(LONGEST[name], int((place.left - 25) / (1.1 * each))))
    place.say(model=name, seconds_per_epoch=round(each, 2), epochs=epochs, recipe=RECIPE, cifar=real)
    fleet = _fleet(place, name, epochs, train)
    rows = []
    for number in range(epochs):
        fleet.epoch(number)
        if (number + 1) % 10 == 0 or number + 1 == epochs:
            rows.append({"epoch": number + 1, "val_accuracy": fleet.accuracies(val)[0]})
            place.say(model=name, **rows[-1])
    folder = place.out / f"{name}.cifar10"
    network = fleet.networks[0].cpu()
    timm_cbam2.save(network, folder, label_names=list(CLASSES), data_config=data_config(network))
    (folder / "training.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    last = rows[-1]["val_accuracy"]
    # The last epoch counts, so that nothing is chosen by the images that judge it.
    place.say(model=name, folder=folder.name, val_accuracy=last, aim=AIM[name], reached=last >= AIM[name])
