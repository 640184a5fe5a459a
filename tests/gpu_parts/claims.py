"""The bench of claims on a GPU: every variant and task with eight seeds, by the loop of lean.py.

Rows are those of `python -m timm_cbam2.evidence.claims run`, whose `table --results` reads them.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

import torch
from torch import Tensor, nn

from timm_cbam2.data.tasks import TASKS, make
from timm_cbam2.evidence.claims import __main__ as command
from timm_cbam2.evidence.claims import run as bench
from timm_cbam2.evidence.claims import training
from timm_cbam2.evidence.claims.measures import measure
from timm_cbam2.evidence.claims.networks import build
from timm_cbam2.evidence.claims.results import append
from timm_cbam2.evidence.claims.variants import VARIANTS

from . import Place
from .ablation import SEEDS, known, settings_of
from .lean import Crops, Fleet, Pictures

__all__ = ["claims"]

SETTINGS = (dict(start=8, epochs=4), dict(start=0))  # put into a trained network, and from the beginning
FIRST = ("plain", "se", "cbam", "cbam2", "eca")
MEASURED = 1000  # images on which masks and routers are looked at, which happens on the CPU


def claims(place: Place) -> None:
    """One row a variant and task in the results, and one a network in claims.jsonl beside them."""
    defaults = {name: p.default for name, p in inspect.signature(command.run).parameters.items()}
    names = [*FIRST, *(name for name in VARIANTS if name not in FIRST)]
    if place.quick:
        defaults |= {"count": 96, "val_count": 48}
    seeds, longest = (SEEDS[:1] if place.quick else SEEDS), 0.0
    for setting in SETTINGS:
        trained: dict[str, list[dict[str, Tensor]]] = {}
        for variant in ("cbam2",) if place.quick else names:
            for task in list(TASKS)[:1] if place.quick else TASKS:
                keys = ("side", "count", "depth", "stages", "start", "epochs", "batch_size", "recipe")
                job = {"task": task, **{key: defaults[key] for key in keys}, **setting, "variant": variant}
                if place.quick:
                    job |= {"start": min(job["start"], 1), "epochs": 1}
                if known(place, bench="claims", seeds=seeds, **job):
                    continue
                if place.left < 1.2 * longest + 5:
                    place.say(left=job)
                    continue
                start = time.monotonic()
                accuracies = _train(place, job, seeds, defaults["val_count"], trained)
                seconds = time.monotonic() - start
                longest = max(longest, seconds)
                key = dict(bench="claims", seeds=seeds, **job, device=place.device, quick=place.quick)
                place.say(**key, accuracies=accuracies, seconds=round(seconds, 1))


def _pictures(place: Place, samples: Any) -> Pictures:
    pixels, labels = torch.from_numpy(samples.images)[:, None], torch.from_numpy(samples.labels)
    return Pictures(pixels.to(place.device), labels.to(place.device), (training.MEAN,), (training.STD,))


def _fleet(place: Place, job: dict[str, Any], networks: list[nn.Module], seeds: list[int], epochs: int) -> Fleet:
    recipe = {**training.RECIPES[job["recipe"]], **VARIANTS[job["variant"]].get("recipe", {})}
    if job["start"]:
        recipe["lr"] *= bench.WARM_LR
    options = {**recipe, "epochs": epochs, "batch_size": job["batch_size"], "mixed_precision": "bf16"}
    settings = settings_of(place, {**options, "warmup_epochs": training.SETTINGS["warmup_epochs"]})
    settings["epochs"] = epochs
    there = [network.to(place.device) for network in networks]
    train = _pictures(place, make(job["task"], "train", job["count"], side=job["side"]))
    return Fleet(there, seeds, settings, train, Crops(training.SHIFT, "replicate", mirror=False))


def _train(
    place: Place, job: dict[str, Any], seeds: list[int], val_count: int, trained: dict[str, list[dict[str, Tensor]]]
) -> list[float]:
    """Train one variant by every seed and measure each network; their accuracies."""
    task = job["task"]
    if job["start"] and task not in trained:
        plain = {**job, "variant": "plain", "start": 0}
        networks = [build("plain", job["depth"], seed) for seed in seeds]
        beginning = _fleet(place, plain, networks, [seed + 1000 for seed in seeds], job["start"])
        beginning.train_all()
        trained[task] = [{k: v.cpu().clone() for k, v in n.state_dict().items()} for n in beginning.networks]
    states = trained[task] if job["start"] else [None] * len(seeds)
    networks = [build(job["variant"], job["depth"], s, job["stages"], state) for s, state in zip(seeds, states)]
    fleet = _fleet(place, job, networks, seeds, job["epochs"])
    seconds = fleet.train_all()
    val = make(task, "val", val_count, side=job["side"])
    accuracies = fleet.accuracies(_pictures(place, val))
    few = make(task, "val", min(MEASURED, val_count), side=job["side"])
    for seed, network, accuracy in zip(seeds, fleet.networks, accuracies):
        row = {**job, "seed": seed, "accuracy": accuracy, "seconds": round(seconds or 0.0, 1), "val_count": val_count}
        row |= {"parameters": sum(p.numel() for p in network.parameters()), "device": place.device}
        append(place.out / "claims.jsonl", row | measure(network.cpu(), few))
    return accuracies
