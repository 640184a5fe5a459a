"""Curves and confusion matrices as pictures, and how every picture of the package is written."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor

from ..files import write_whole
from ..hub.run_folder import best_row, score, score_name
from ..terminal import visible

__all__ = [
    "bars_bytes",
    "confusion_picture",
    "curves_picture",
    "draw_accuracy",
    "draw_loss",
    "figure_bytes",
    "plain",
    "save_figure",
]

TRAIN, VAL = "#4477aa", "#cc6644"


def plain(text: str) -> str:
    """`text` for matplotlib to write as it is: a dollar sign would start a formula, a newline another line."""
    return visible(text).replace("$", r"\$")


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


def draw_loss(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the losses of the rows of `metrics.jsonl` against the epoch."""
    _curve(axes, rows, "loss", 1, "loss (cross-entropy)")


def draw_accuracy(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the accuracies of the rows of `metrics.jsonl` against the epoch."""
    _curve(axes, rows, "accuracy", 100, "all labels of an image right (%)" if "val_map" in rows[0] else "accuracy (%)")
    best = best_row(rows)
    axes.axvline(best["epoch"], color=VAL, linewidth=1, linestyle=":")
    axes.set_title(f"best {score_name(best)}: {100 * score(best):.2f} % after epoch {best['epoch']}", fontsize=10)


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


def bars_bytes(values: Mapping[str, float], title: str) -> bytes:
    """A bar for the share (0 to 1) of each name, the lowest first and at most 60 of them, as PNG."""
    from matplotlib.figure import Figure

    rows = sorted(values.items(), key=lambda item: item[1])[:60]
    figure = Figure(figsize=(6.5, 1.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [plain(name if len(name) <= 24 else name[:23] + "…") for name, _ in rows], [v for _, v in rows], color=VAL
    )
    axes.invert_yaxis()
    axes.set(xlabel="average precision", xlim=(0, 1))
    axes.set_title(plain(title), fontsize=11)
    axes.grid(axis="x", alpha=0.3)
    return figure_bytes(figure)


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
