"""`report.html` of a run: what ran, how it went, where the model errs and what it attended to, in one file."""

from __future__ import annotations

import json
import shlex
import time
from functools import partial
from html import escape
from pathlib import Path
from typing import Annotated, Any, Callable, Mapping, Sequence

import typer
from torch import Tensor

from ..errors import UserError, require
from ..files import duration, write_whole
from ..hub.run_folder import best_row, read_metrics, score, score_name
from ..hub.zoo import run_settings
from ..terminal import say
from ..training.options import option_names
from .attention_picture import BRANCH_COLOURS, FUSION_COLOURS
from .figures import draw_accuracy, draw_loss, figure_bytes
from .health_picture import health_panels, health_rows
from .html_parts import bytes_image, page, side_by_side, stacked_bars, table
from .labels_part import labels_part
from .mistakes import calibration_part, confusion_part, look, mistakes_part, open_images
from .range_part import range_part

__all__ = ["report", "write_report"]

# Of one call, not of the training that it made.
OF_THE_CALL = ("output", "resume", "recipe", "track", "push_to")
SHOWN = (
    "model pretrained data epochs batch_size lr opt sched weight_decay warmup_epochs label_smoothing augment seed "
    "device processes mixed_precision"
).split()


def write_report(folder: str | Path, seconds: float | None = None, confusion: Tensor | None = None) -> Path:
    """Write `report.html`, `confusion.png` and `health.png` of a run, from its folder and its own validation images.

    Args:
        folder: of the run: run.json, metrics.jsonl, and the models best/ or last/.
        seconds: time to look at images, after which those seen so far must do; None means all of them.
        confusion: counts (K, K) of the best model on all validation images, drawn in confusion.png, if they are known.

    Returns:
        The file.

    Raises:
        UserError: the folder holds no run with results, or cannot be written.
    """
    require("matplotlib")
    settings = run_settings(str(folder))
    if settings is None:
        raise UserError(f"{folder} is no run: give the folder that `timm-cbam2 finetune` wrote, with run.json in it")
    folder = Path(settings["folder"])
    rows = _read_rows(folder)
    name = Path(str(settings["model"])).name.rpartition(":")[2]
    title = f"{name} on {Path(str(settings['data'])).name}"
    path = folder / "report.html"
    try:
        parts = [
            _head(title, settings, rows, folder),
            _curves(rows),
            range_part(folder),
            _errors(settings, seconds, confusion, folder),
            _health(rows, folder),
            _speed(rows),
            _reproduce(settings),
            _files(folder),
            _settings(settings),
        ]
        write_whole(path, page(title, "\n".join(part for part in parts if part)).encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder} has no epoch to report on: metrics.jsonl is missing or empty")
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _head(title: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    best = best_row(rows)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / "metrics.jsonl").stat().st_mtime))
    top5 = f", top-5 {_percent(best['val_top5'])}" if best.get("val_top5") not in (None, 1.0) else ""
    what = score_name(best) if "val_map" in best else "top-1"
    stopped = ""
    if rows[-1]["epoch"] < settings["epochs"]:
        stopped = f" The run holds {rows[-1]['epoch']} of the {settings['epochs']} epochs asked for."
    start = "trained weights" if settings.get("pretrained") else "random weights"
    counts = ", ".join(f"{count:,} {split}" for split, count in (settings.get("images") or {}).items())
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="big"><b>{_percent(score(best))}</b> {what}{top5} on {best.get("val_images", "the")} '
        f"validation images, after epoch {best['epoch']} of {rows[-1]['epoch']}.</p>"
        f"<p>{escape(str(settings['model']))}, {settings.get('parameters', 0) / 1e6:.2f} M parameters, from {start}; "
        f"{len(settings.get('classes', ()))} classes; images: {escape(counts)}. Finished {when}.{stopped}</p>"
    )


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    loss, accuracy = (_plot(partial(draw, rows=rows)) for draw in (draw_loss, draw_accuracy))
    images = bytes_image(loss, "loss against the epoch") + bytes_image(accuracy, "accuracy against the epoch")
    return f'<h2>Curves</h2><div class="plots">{images}</div>'


def _plot(draw: Callable[[Any], None], title: str = "") -> bytes:
    """A chart as PNG, small enough to be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.subplots()
    if title:
        axes.set_title(title, fontsize=10)
    draw(axes)
    return figure_bytes(figure)


def _errors(settings: Mapping[str, Any], seconds: float | None, confusion: Tensor | None, folder: Path) -> str:
    try:
        if settings.get("multi_label"):
            return labels_part(*open_images(settings, seconds), seconds)
        seen = look(settings, seconds)
    except UserError as error:
        return f'<h2>Mistakes</h2><p class="note">Not measured: {escape(str(error))}</p>'
    return confusion_part(seen, confusion, folder / "confusion.png") + calibration_part(seen) + mistakes_part(seen)


def _health(rows: Sequence[dict[str, Any]], folder: Path) -> str:
    told = health_rows(rows)
    if not told:
        (folder / "health.png").unlink(missing_ok=True)  # of an earlier report
        return ""
    panels = health_panels(rows)
    pictures = [_plot(draw, name) for name, draw in panels]
    write_whole(folder / "health.png", side_by_side(pictures, columns=2))
    plots = [bytes_image(picture, name) for picture, (name, _) in zip(pictures, panels)]
    last = told[-1]["health"]
    if last["warnings"]:
        items = "".join(f"<li>{escape(text)}</li>" for text in last["warnings"])
        words = f'<div class="warnings"><b>After epoch {told[-1]["epoch"]}:</b><ul>{items}</ul></div>'
    else:
        words = f"<p>No warnings after epoch {told[-1]['epoch']}.</p>"
    earlier = [(row["epoch"], "; ".join(row["health"]["warnings"])) for row in told[:-1] if row["health"]["warnings"]]
    if earlier:
        words += (
            f"<details><summary>Warnings of earlier epochs</summary>{table(earlier, ('epoch', 'warnings'))}</details>"
        )
    bars = _bars(last["blocks"], "branches", "Scale chosen by the router", None, BRANCH_COLOURS)
    bars += _bars(last["blocks"], "fusion", "Squeeze fused from", ("average", "maximum"), FUSION_COLOURS)
    return f'<h2>Routers and gates</h2>{words}<div class="plots">{"".join(plots)}</div>{bars}'


def _bars(
    blocks: Mapping[str, Any], field: str, title: str, labels: Sequence[str] | None, colours: Sequence[str]
) -> str:
    rows = [(name.rsplit(".", 1)[0], block[field]) for name, block in blocks.items() if block[field] is not None]
    if not rows:
        return ""
    labels = labels or next(iter(blocks.values()))["branch_names"]
    return f"<h3>{title}, mean over images after the last epoch (%)</h3>{stacked_bars(rows, labels, colours)}"


def _speed(rows: Sequence[Mapping[str, Any]]) -> str:
    timed = [row for row in rows if row.get("images_per_second")]
    if not timed:
        return ""
    speeds = sorted(row["images_per_second"] for row in timed)
    total = sum(row.get("seconds", 0) for row in timed)
    return (
        f"<h2>Speed</h2><p>{speeds[len(speeds) // 2]:.0f} images/s in training (median over epochs; "
        f"{speeds[0]:.0f} to {speeds[-1]:.0f}); {duration(total)} of training in {len(timed)} epochs.</p>"
    )


def command(settings: Mapping[str, Any]) -> str:
    """The command line that makes the same run again, with every option that was in force."""
    words = ["timm-cbam2", "finetune"]
    if settings.get("num_processes") is None and (settings.get("processes") or 1) > 1:  # started by a launcher
        settings = {**settings, "num_processes": settings["processes"]}
    for name in option_names():
        value = settings.get(name)
        flag = "--" + name.replace("_", "-")
        if value is None or name in OF_THE_CALL:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                words += [flag, f"{key}={item}"]
        elif isinstance(value, (list, tuple)):
            for item in value:
                words += [flag, str(item)]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def _reproduce(settings: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (settings.get("versions") or {}).items())
    made = f'<p class="note">Made with {escape(versions)}.</p>' if versions else ""
    return f"<h2>Make it again</h2><pre>{escape(command(settings))}</pre>{made}"


def _files(folder: Path) -> str:
    what = {
        "best/": "the best model, for timm and transformers",
        "last/": "the model after the last epoch",
        "metrics.jsonl": "the numbers of every epoch",
        "run.json": "the settings",
        "curves.png": "the curves as a picture",
        "confusion.png": "the confusion matrix as a picture",
        "health.png": "routers and gates as a picture",
    }
    links = [f'<li><a href="{name}">{name}</a>: {text}</li>' for name, text in what.items() if (folder / name).exists()]
    return f"<h2>Files</h2><ul>{''.join(links)}</ul>"


def _settings(settings: Mapping[str, Any]) -> str:
    rest = [name for name in settings if name not in (*SHOWN, "classes", "folder", "data_config", "versions")]
    listed = [(name, _text(settings[name])) for name in (*SHOWN, *rest) if settings.get(name) is not None]
    config = [(f"data: {name}", _text(value)) for name, value in (settings.get("data_config") or {}).items()]
    classes = ", ".join(map(str, settings.get("classes", ())))
    return (
        f"<h2>What ran</h2><details open><summary>Every setting</summary>{table(listed + config)}</details>"
        f"<details><summary>Classes</summary><p>{escape(classes)}</p></details>"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
) -> Path:
    """Write a run's report.html anew, from the run folder and the validation images: one file, with all in it."""
    path = write_report(run)
    say(f"report {path}")
    return path
