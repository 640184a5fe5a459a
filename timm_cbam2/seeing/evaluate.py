"""Measure a model on labelled images: top-1, top-5, every class, who is taken for whom, and how sure it is of it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Iterator, Sequence

import numpy as np
import typer
from torch import nn

from ..data.images import Images
from ..data.loading import ImageDataset, data_config, make_loader
from ..data.sources import find_images, images_of_run
from ..errors import UserError, require
from ..files import write_whole
from ..hub.zoo import class_names, load, resolve, run_settings, whole_name
from ..terminal import say
from ..training.predictions import predict_all
from .measured import draw, lines, numbers
from .views_averaged import TTA_HELP, with_views

__all__ = ["evaluate", "match_classes", "translated"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def match_classes(model: nn.Module, images: Images, name: str) -> list[int]:
    """For each class of the data, its index in the model's output.

    Raises:
        UserError: the model lacks a class of the data, does not name its classes and has another number of them, or
            tells one label of an image where the data have several, or the other way round.
    """
    if getattr(model, "multi_label", False) != images.multi_label:
        of_data, of_model = ("several labels", "one") if images.multi_label else ("one label", "several")
        hint = "" if images.multi_label else "; give a table with --multi-label"
        raise UserError(f"labels do not match: {images.name} has {of_data} an image, {name} tells {of_model}{hint}")
    known = class_names(model)
    if known is None:
        if model.num_classes != len(images.classes):
            raise UserError(
                f"labels do not match: {name} tells {model.num_classes} classes apart without naming them, "
                f"{images.name} has {len(images.classes)}; give data with the same classes"
            )
        return list(range(model.num_classes))
    missing = [c for c in images.classes if c not in known]
    if missing and len(missing) == len(images.classes):
        raise UserError(
            f"labels do not match: {name} knows the classes {_some(known)}; {images.name} has {_some(images.classes)}: "
            f"give data with the same classes, or fine-tune on these with `timm-cbam2 finetune --model {name} --data …`"
        )
    if missing:
        raise UserError(
            f"labels do not match: {name} does not know {len(missing)} of the classes in {images.name}: "
            f"{_some(missing)}; remove them, or fine-tune on this data"
        )
    return [known.index(c) for c in images.classes]


def translated(labels: Sequence[Any], targets: Sequence[int], classes: int) -> list[Any]:
    """Labels of the data as a model's: class indices, or rows of 0 and 1 for each of its `classes`.

    Args:
        labels: of the data.
        targets: see `match_classes`.
        classes: number of the model's.
    """
    if all(isinstance(label, int) for label in labels):
        return [targets[label] for label in labels]
    found = np.zeros((len(labels), classes), dtype=np.int8)
    found[:, targets] = np.array(labels)
    return list(found)


def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run or model folder, hf-hub: id, or name.")],
    data: Annotated[str | None, typer.Option(help="As for finetune; for a run, its own data.")] = None,
    split: Annotated[str | None, typer.Option(help="train, val, test or all; val where there is one.")] = None,
    val_split: Annotated[str | None, typer.Option(help="Images to hold out as val, as for finetune.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images at a time.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read images.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side in pixels, in place of the model's own.")] = None,
    image_column: Annotated[str | None, typer.Option(help="Column with the images, for a data set in tables.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the labels, for a data set in tables.")] = None,
    labels: Annotated[str | None, typer.Option(help="Table that says what is in the images of a folder.")] = None,
    multi_label: Annotated[bool, typer.Option(help="Several labels an image, as for finetune.")] = False,
    tta: Annotated[str | None, typer.Option(help=TTA_HELP)] = None,
    skip_bad_images: Annotated[bool, typer.Option(help="Count unreadable images and go on.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the picture and the numbers.")] = None,
) -> dict[str, Any]:
    """Measure a model: top-1 with its 95 % interval, top-5, macro F1, calibration, per class; and draw it.

    Of images with several labels: mean average precision in place of top-1 and top-5.

    Raises:
        UserError: no such model or data, labels that do not match, an unreadable image.
    """
    from accelerate import Accelerator

    require("matplotlib", "sklearn")
    run = run_settings(model)
    resolve(model)  # a misspelt model is said before the data are read
    if data is None and run is None:
        raise UserError(f"{model} is not a run, so say what to measure on: --data FOLDER, a data set, digits, clutter")
    own = run is not None and (data is None or data == run["data"] or _same_folder(data, run["data"]))
    settings = run if own else {}
    if own:
        images = images_of_run(_relabelled(run, labels, multi_label), image_column, label_column, val_split)
    else:
        images = find_images(data, image_column, label_column, labels, multi_label)
        images = images if val_split is None else images.with_val(val_split)
    split = _chosen_split(images, split)

    accelerator = Accelerator()
    network = load(model)
    targets = match_classes(network, images, model)
    several = images.multi_label
    folder = output or (Path(run["folder"]) if run else Path("evaluations")) / _folder_name(model, images, split, run)
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # A model's own configuration already holds what its training data asked for; others get what these data ask for.
    saved = resolve(model).startswith(("local-dir:", "hf-hub:"))
    config = data_config(network, img_size, **({} if saved else images.data_config))
    samples = images.splits[split]
    samples.labels = translated(samples.labels, targets, network.num_classes)
    names = class_names(network) or images.classes
    network, config = with_views(network, config, tta, (run or {}).get("augment"), several)
    dataset = ImageDataset(samples, config, skip_bad=skip_bad_images or bool(settings.get("skip_bad_images")))
    dataset.check_headers()
    workers = settings.get("workers", 0) if workers is None else workers
    loader = make_loader(dataset, batch_size or settings.get("batch_size", 64), workers)
    network, loader = accelerator.prepare(network, loader)
    found = predict_all(accelerator, network, loader)
    if not found.loss.isfinite().all():
        raise UserError(f"{model} gives no finite numbers: its training diverged; use an earlier checkpoint")

    result = {"model": model, "data": images.name, "split": split, "tta": tta, "bad_images": int(dataset.bad.sum())}
    result |= numbers(found, names)
    if accelerator.is_main_process:
        _show(result, folder, _write(result, folder, several), images.notes)
    return result


def _relabelled(run: dict[str, Any], labels: str | None, multi_label: bool) -> dict[str, Any]:
    """A run's settings, with the labels that were given in place of its own."""
    given = {"labels": labels and str(Path(labels).expanduser().resolve()), "multi_label": multi_label}
    return run | {name: value for name, value in given.items() if value}


def _chosen_split(images: Images, split: str | None) -> str:
    split = split or next(s for s in ("val", "test", "all", "train") if s in images.splits)
    if split not in images.splits:
        raise UserError(f"--split {split}: {images.name} has {', '.join(images.splits)}")
    return split


def _same_folder(one: str, other: str) -> bool:
    a, b = Path(one).expanduser(), Path(other).expanduser()
    return a.exists() and b.exists() and a.samefile(b)


def _folder_name(model: str, images: Images, split: str, run: dict[str, Any] | None) -> str:
    name = f"evaluate-{images.name}-{split}"
    return name if run else f"{Path(whole_name(model)).name.replace(':', '-')}-{name}"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}): give another folder") from error


def _write(result: dict[str, Any], folder: Path, several: bool) -> list[Path]:
    """The numbers, and the pictures, whose paths it gives."""
    share = f"{100 * result['map']:.2f} % mAP on" if several else f"{100 * result['top1']:.2f} % of"
    with _writing(folder):
        write_whole(folder / "evaluation.json", (json.dumps(result, indent=2) + "\n").encode())
        return draw(result, folder, f"{result['data']}, {result['split']}: {share} {result['images']} images")


def _show(result: dict[str, Any], folder: Path, pictures: list[Path], notes: list[str]) -> None:
    for note in notes:
        say(f"note: {note}")
    say(f"{result['model']} on {result['data']}, {result['split']} split, {result['images']} images")
    told = lines(result)
    if result["tta"]:
        told.insert(2, f"probabilities averaged over views of each image: --tta {result['tta']}")
    if result["bad_images"]:
        told.insert(2, f"{result['bad_images']} unreadable images left out")
    say(*(f"  {line}" for line in told))
    say(f"  numbers  {folder / 'evaluation.json'}", f"  pictures {', '.join(map(str, pictures))}")
