"""What predictions come to: an evaluation in numbers, words and pictures, of one label an image or of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import torch
from torch import Tensor

from ..files import write_whole
from ..terminal import visible
from ..training.multi_label import MultiPredictions
from ..training.predictions import Predictions
from .calibration import accuracy_interval, calibration, macro_f1, reliability_bytes, said
from .figures import bars_bytes, confusion_picture

__all__ = ["draw", "lines", "numbers"]

SHOWN = 20  # classes that are printed, the worst first


def numbers(found: Predictions | MultiPredictions, names: Sequence[str]) -> dict[str, Any]:
    """All that is measured of the predictions of N images.

    Of one label an image: "top1" and its 95 % interval, "top5" (or fewer), "macro_f1", and the "confusion" matrix. Of
    several: "map", the mean average precision over the classes that occur, "macro_f1" at a probability of 1/2, and
    "exact", the share of images of which every label is right, with its interval. Of both: "loss", "calibration" and
    "per_class", of the classes that occur.
    """
    measured = _of_labels(found, names) if isinstance(found, MultiPredictions) else _of_classes(found, names)
    return {"images": len(found.labels), "loss": found.loss.double().mean().item(), "classes": list(names)} | measured


def _of_classes(found: Predictions, names: Sequence[str]) -> dict[str, Any]:
    matrix = found.confusion(len(names))
    return {
        "top1": found.accuracy(),
        "top1_interval": accuracy_interval(found.correct),
        "top_k": found.top.shape[1],
        f"top{found.top.shape[1]}": found.accuracy(found.top.shape[1]),
        "macro_f1": macro_f1(found),
        "calibration": calibration(found.confidence, found.correct),
        "per_class": {
            name: {"images": n, "accuracy": int(matrix[i, i]) / n}
            for i, (name, n) in enumerate(zip(names, matrix.sum(1).tolist()))
            if n
        },
        "confusion": matrix.tolist(),
    }


def _of_labels(found: MultiPredictions, names: Sequence[str]) -> dict[str, Any]:
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    truth, scores = (found.labels > 0).numpy(), found.scores.numpy()
    of_each = zip(*precision_recall_fscore_support(truth, scores > 0.5, average=None, zero_division=0.0))
    per_class = {
        names[i]: {
            "images": int(n),
            "average_precision": float(average_precision_score(truth[:, i], scores[:, i])),
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
        }
        for i, (precision, recall, f1, n) in enumerate(of_each)
        if n
    }
    summary = found.measures()
    return {
        "map": summary["val_map"],
        "macro_f1": summary["val_f1"],
        "exact": found.accuracy(),
        "exact_interval": accuracy_interval(found.correct),
        # Of every label of every image: how often one with a probability of p is there.
        "calibration": calibration(found.scores.flatten(), (found.labels > 0).flatten()),
        "per_class": per_class,
    }


def lines(result: dict[str, Any]) -> list[str]:
    """`numbers` for a person."""
    percent = {name: f"{100 * v:.2f} %" for name, v in result.items() if isinstance(v, float)}
    several = "map" in result
    low, high = (100 * end for end in result["exact_interval" if several else "top1_interval"])
    interval = f"95 % interval of {'that share' if several else 'top-1'}: {low:.2f} to {high:.2f} %"
    if several:
        told = [
            f"mean average precision {percent['map']}   macro F1 {percent['macro_f1']}   loss {result['loss']:.4f}",
            f"every label right in {percent['exact']} of the images   {interval}",
        ]
    else:
        k = result["top_k"]
        told = [
            f"top-1 {percent['top1']}   top-{k} {percent[f'top{k}']}   loss {result['loss']:.4f}",
            f"{interval}   macro F1 {percent['macro_f1']}",
        ]
    return [*told, said(result["calibration"], several), *_class_lines(result["per_class"])]


def _class_lines(per_class: dict[str, dict[str, Any]]) -> list[str]:
    key = "average_precision" if any("average_precision" in row for row in per_class.values()) else "accuracy"
    rows = sorted(per_class.items(), key=lambda item: item[1][key])
    shown = rows[:SHOWN]
    what = "average precision " if key != "accuracy" else ""
    told = [f"{what}per class{', the worst 20' if len(rows) > SHOWN else ''}:"]
    width = max(len(visible(name)) for name, _ in shown)
    for name, row in shown:
        more = f"   precision {100 * row['precision']:6.2f} %   recall {100 * row['recall']:6.2f} %" if what else ""
        told.append(f"  {visible(name):<{width}}  {100 * row[key]:6.2f} %  of {row['images']}{more}")
    return told


def draw(result: dict[str, Any], folder: Path, title: str) -> list[Path]:
    """Write the pictures of `numbers`, whole or not at all, and say where they are."""
    reliability = folder / "reliability.png"
    if "confusion" not in result:
        path = folder / "classes.png"
        write_whole(path, bars_bytes({n: r["average_precision"] for n, r in result["per_class"].items()}, title))
    else:
        path, names = folder / "confusion.png", result["classes"]
        matrix: Tensor = torch.tensor(result["confusion"])
        present = (matrix.sum(0) + matrix.sum(1)) > 0 if len(names) > 60 else torch.ones(len(names), dtype=torch.bool)
        kept = present.nonzero().flatten().tolist()
        confusion_picture(matrix[kept][:, kept], [names[i] for i in kept], path, title)
    write_whole(reliability, reliability_bytes(result["calibration"]))
    return [path, reliability]
