"""What a run shows and leaves behind: progress, metrics.jsonl, curves and confusion matrices as pictures."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Sequence

import torch
from torch import Tensor

from .run_folder import best_row

__all__ = [
    "MetricsFile",
    "Progress",
    "confusion_picture",
    "curves_picture",
    "draw_accuracy",
    "draw_loss",
    "duration",
    "figure_bytes",
    "plain",
    "save_figure",
    "write_whole",
]

TRAIN, VAL = "#4477aa", "#cc6644"


def duration(seconds: float) -> str:
    """`seconds` for a person: 8 s, 2 min 05 s, 3 h 12 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class Progress:
    """Loss, accuracy, images/s and time left: a bar on a terminal, else a plain line now and then.

    Sums stay on the device and are read only when something is shown, so that a GPU is never waited for.

    Args:
        total: images in the whole run.
        shown: off on all but the main process.
        every: seconds between plain lines.
    """

    def __init__(self, total: int, shown: bool = True, every: float = 30.0):
        self.total, self.shown, self.every = total, shown, every
        self.bar = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=" images", unit_scale=True, dynamic_ncols=True, mininterval=0.5)
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()

    def skip(self, images: int) -> None:
        """Leave out what an earlier part of the run has done."""
        self.total -= images
        if self.bar is not None:
            self.bar.total = self.total

    def begin(self, title: str) -> None:
        """Start an epoch."""
        self.title, self.sums, self.began, self.here = title, None, time.monotonic(), 0
        if self.bar is not None:
            self.bar.set_description(title, refresh=False)

    def step(self, images: int, sums: Tensor) -> None:
        """Count a batch over all processes; `sums` (3,) holds this process's loss sum, hits and images."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.done, self.here = self.done + images, self.here + images
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(images)
        if self.shown and now - self.last > (0.5 if self.bar is not None else self.every):
            self.last = now
            loss, hits, count = self.sums.tolist()
            text = f"loss {loss / max(count, 1):.3f}  accuracy {100 * hits / max(count, 1):.1f} %"
            if self.bar is not None:
                self.bar.set_postfix_str(text)
            else:
                left = (now - self.start) / self.done * (self.total - self.done)
                print(f"{self.title}: {text}  {self.speed():.0f} images/s  {duration(left)} left", flush=True)

    def speed(self) -> float:
        """Images per second since the epoch began, over all processes."""
        return self.here / max(time.monotonic() - self.began, 1e-9)

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class MetricsFile:
    """`metrics.jsonl`: one JSON object per evaluation, appended and on disk before training goes on."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []

    def resume(self, rows: Sequence[dict[str, Any]]) -> None:
        """Go on after `rows`: later ones in the file, which will be made again, and half a line are left out."""
        self.rows = list(rows)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not self.path.exists() or self.path.read_text(encoding="utf-8", errors="replace") != text:
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self.path)

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def plain(text: str) -> str:
    """`text` for matplotlib to write as it is: a dollar sign would start a formula."""
    return text.replace("$", r"\$")


def figure_bytes(figure: Any) -> bytes:
    """A figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    figure.set_dpi(120)
    with warnings.catch_warnings():  # names in scripts that the font lacks are boxes in the picture
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasAgg(figure).print_png(buffer)  # the same picture as savefig, which draws it twice
    return buffer.getvalue()


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all."""
    write_whole(path, figure_bytes(figure))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        with suppress(OSError):  # it has moved, or could not be made
            temporary.unlink()


def draw_loss(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the losses of the rows of `metrics.jsonl` against the epoch."""
    _curve(axes, rows, "loss", 1, "loss (cross-entropy)")


def draw_accuracy(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the accuracies of the rows of `metrics.jsonl` against the epoch."""
    _curve(axes, rows, "accuracy", 100, "accuracy (%)")
    best = best_row(rows)
    axes.axvline(best["epoch"], color=VAL, linewidth=1, linestyle=":")
    axes.set_title(f"best: {100 * best['val_accuracy']:.2f} % after epoch {best['epoch']}", fontsize=10)


def _curve(axes: Any, rows: Sequence[dict[str, Any]], key: str, factor: float, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    mark = "o" if len(rows) < 30 else ""
    for split, colour, label in (("train", TRAIN, "training, augmented"), ("val", VAL, "validation")):
        values = [factor * row[f"{split}_{key}"] for row in rows]
        axes.plot(epochs, values, color=colour, marker=mark, markersize=4, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def curves_picture(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw loss and accuracy against the epoch, from the rows of `metrics.jsonl`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_loss(left, rows)
    draw_accuracy(right, rows)
    figure.suptitle(plain(title), fontsize=11)
    save_figure(figure, path)


def confusion_picture(matrix: Tensor, classes: Sequence[str], path: Path, title: str) -> None:
    """Draw a confusion matrix (K, K) of counts, rows the truth, coloured by the share of each row.

    Up to 20 classes the counts are written in, up to 60 the names.
    """
    from matplotlib.figure import Figure

    count = len(classes)
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    side = min(max(4.5, 2.5 + 0.42 * count), 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    if count <= 60:
        names = [plain(name if len(name) <= 24 else name[:23] + "…") for name in classes]
        size = 9 if count <= 20 else 6
        axes.set_xticks(range(count), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
        axes.set_yticks(range(count), names, fontsize=size)
    if count <= 20:
        for row, column in torch.nonzero(matrix).tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(matrix[row, column])), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(plain(title), fontsize=11)
    save_figure(figure, path)
