"""The ablation on a GPU, with more seeds than a CPU affords, by the loop of lean.py."""

from __future__ import annotations

import statistics
import time
from typing import Any, Iterator

import timm
import torch
from torch import Tensor, nn

import timm_cbam2  # noqa: F401  (registers the models)
from timm_cbam2.evidence.ablation import position
from timm_cbam2.evidence.ablation.grid import Grid, read_grid
from timm_cbam2.evidence.ablation.results import RESULTS, Results, estimate
from timm_cbam2.models.cbam2 import is_cbam2
from timm_cbam2.training.options import Options
from timm_cbam2.training.settings import check_options

from . import Place
from .lean import Crops, Fleet, Pictures
from .pictures import cifar

__all__ = ["SEEDS", "ablation", "known", "settings_of"]

SEEDS = list(range(8))
QUESTIONS = ("controls", "parts", "sgd", "further", "position", "convnext")  # the first is asked first
PAD = 4  # pixels, an eighth of the side, as with --cache-images
NOT_HERE = ("start", "model_kwargs", "cbam2", "model", "img_size", "data")  # of a variant, what is no setting


def settings_of(place: Place, options: dict[str, Any]) -> dict[str, Any]:
    """Every option of finetune, as the variant has it; on a CPU without autocast."""
    given = {key: value for key, value in options.items() if key not in NOT_HERE}
    settings = vars(Options(**given))
    check_options(settings)
    if not place.cuda:
        settings["mixed_precision"] = "no"
    if place.quick:
        settings |= {"epochs": 1, "warmup_epochs": 0.5}
    return settings


def known(place: Place, **key: Any) -> dict[str, Any] | None:
    """The row of a training that was made before, on the same kind of device."""
    wanted = {**key, "device": place.device, "quick": place.quick}
    return next((row for row in place.earlier if all(row.get(k) == v for k, v in wanted.items())), None)


def ablation(place: Place) -> None:
    """One row a variant; then what the pairs say; then whether the loop agrees with finetune's on a CPU."""
    grid = read_grid()
    train, val, real = cifar(place)
    seeds = SEEDS[:2] if place.quick else SEEDS
    trained: dict[str, list[dict[str, Tensor]]] = {}
    found: dict[str, list[float]] = {}
    longest = 0.0
    for variant in _variants(grid, place):
        row = known(place, bench="ablation", variant=variant, seeds=seeds)
        if row is not None:
            found[variant] = row["accuracies"]
            if variant != "plain" or not _needs_plain(place, grid, seeds):
                continue
        if place.left < 1.2 * longest + 5:
            place.say(left=variant)
            continue
        start = time.monotonic()
        data = _positions(place) if grid.options[variant].get("data") == "position" else (train, val)
        fleet = _fleet(place, grid, variant, seeds, data[0], trained)
        if fleet.train_all(lambda: place.left - 3) is None:
            place.say(left=variant)
            break
        if variant == "plain":
            trained["plain"] = [{k: v.clone() for k, v in n.state_dict().items()} for n in fleet.networks]
        found[variant] = fleet.accuracies(data[1])
        longest = max(longest, time.monotonic() - start)
        place.say(
            bench="ablation",
            variant=variant,
            seeds=seeds,
            accuracies=found[variant],
            parameters=sum(p.numel() for p in fleet.networks[0].parameters()),
            epochs=fleet.settings["epochs"],
            seconds=round(time.monotonic() - start, 1),
            images=len(data[0].labels),
            cifar=real,
            device=place.device,
            quick=place.quick,
        )
    _pairs(place, grid, found)
    if real and not place.quick and "plain" in found:
        _agrees(place, found)


def _variants(grid: Grid, place: Place) -> Iterator[str]:
    given = []
    for name in QUESTIONS:
        for variant in grid.question(name).variants:
            if variant not in given:
                given.append(variant)
    if place.quick:
        given = ["plain", "cbam2", "further-attention", "position-coords"]
    yield from given


def _needs_plain(place: Place, grid: Grid, seeds: list[int]) -> bool:
    """Whether a training that starts from the plain networks' weights is still to be made."""
    starting = [v for v in _variants(grid, place) if grid.starts[v]]
    return any(known(place, bench="ablation", variant=v, seeds=seeds) is None for v in starting)


def _fleet(
    place: Place,
    grid: Grid,
    variant: str,
    seeds: list[int],
    train: Pictures,
    trained: dict[str, list[dict[str, Tensor]]],
) -> Fleet:
    options, start = grid.options[variant], grid.starts[variant]
    networks = []
    for number, seed in enumerate(seeds):
        torch.manual_seed(seed)
        name = (start or {}).get("model") or (grid.options[start["run"]]["model"] if start else options["model"])
        arguments = dict(options.get("model_kwargs") or {})
        cbam2 = (start or {}).get("cbam2") or options.get("cbam2")
        if cbam2:
            arguments["cbam2"] = cbam2
        network = timm.create_model(name, num_classes=int(train.labels.max()) + 1, **arguments)
        if start:
            _take(network, trained[start["run"]][number])
        networks.append(network.to(place.device, memory_format=torch.channels_last))
    settings = settings_of(place, options)
    crops = None if settings["augment"] == "none" else Crops(PAD)
    return Fleet(networks, seeds, settings, train, crops)


def _take(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy every weight of a plain network; only attention may be new."""
    fit = network.load_state_dict(state, strict=False)
    blocks = tuple(f"{name}." for name, module in network.named_modules() if is_cbam2(module))
    strange = [*fit.unexpected_keys, *(key for key in fit.missing_keys if not key.startswith(blocks))]
    if strange:
        raise ValueError(f"the weights do not fit: {strange[:5]}")


def _positions(place: Place) -> tuple[Pictures, Pictures]:
    """The position task of the ablation."""
    count, val = (256, 64) if place.quick else (position.TRAIN + position.VAL, position.VAL)
    images, labels = position.make(count)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    truth = torch.from_numpy(labels).to(place.device)
    whole = Pictures(pixels.to(place.device), truth, (127.5,) * 3, (63.0,) * 3)
    return whole.select(slice(0, count - val)), whole.select(slice(count - val, None))


def _pairs(place: Place, grid: Grid, found: dict[str, list[float]]) -> None:
    """Differences to the control of each question, seed by seed, in points."""
    for name in QUESTIONS:
        question = grid.question(name)
        control = found.get(question.control)
        for variant in question.variants:
            if control and variant in found and variant != question.control:
                difference = estimate([100 * (a - b) for a, b in zip(found[variant], control)])
                place.say(question=name, variant=variant, minus=question.control, **_said(difference))


def _said(found: Any) -> dict[str, Any]:
    return {"mean": round(found.mean, 3), "half": found.half and round(found.half, 3), "seeds": found.count}


def _agrees(place: Place, found: dict[str, list[float]]) -> None:
    """Whether the loop's mean accuracy lies within the interval of finetune's on a CPU, as committed."""
    rows = Results(RESULTS).rows
    for variant in ("plain", "cbam2", "se"):
        before = [100 * row["accuracy"] for row in rows if row["variant"] == variant]
        if variant in found and len(before) > 1:
            cpu, here = estimate(before), 100 * statistics.fmean(found[variant])
            place.say(
                what="the lean loop beside finetune on a CPU",
                variant=variant,
                cpu=_said(cpu),
                here=round(here, 3),
                ok=abs(here - cpu.mean) <= cpu.half,
            )
