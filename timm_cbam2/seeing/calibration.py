"""How far an accuracy can be trusted: its interval, and whether a model is right as often as it is sure to be."""

from __future__ import annotations

from typing import Any, Mapping

import numpy as np
from torch import Tensor

from ..training.predictions import Predictions

__all__ = ["accuracy_interval", "calibration", "macro_f1", "reliability_bytes", "said"]

BINS = 15  # as in Guo et al.


def accuracy_interval(correct: Tensor) -> tuple[float, float]:
    """The 95 % interval of an accuracy: Wilson's ("Probable inference…", 1927), which holds near 0 and 100 % too.

    Args:
        correct: (N,) whether each image is named rightly.
    """
    from scipy.stats import binomtest

    found = binomtest(int(correct.sum()), len(correct)).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def macro_f1(found: Predictions) -> float:
    """The mean over the classes of F1, the harmonic mean of precision and recall: every class counts equally."""
    from sklearn.metrics import f1_score

    return float(f1_score(found.labels.numpy(), found.top[:, 0].numpy(), average="macro", zero_division=0.0))


def calibration(confidence: Tensor, correct: Tensor) -> dict[str, Any]:
    """Confidence and accuracy in 15 bins of equal width, and their mean distance, the expected calibration error.

    "On Calibration of Modern Neural Networks" (Guo et al., 2017, https://arxiv.org/abs/1706.04599).

    Args:
        confidence: (N,) probability of the best class.
        correct: (N,) whether it is the true one.

    Returns:
        "ece", "mean_confidence", "accuracy", and of the bins that hold images "bins": "confidence", "accuracy" and
        "images" of each.
    """
    from sklearn.calibration import calibration_curve

    sure, right = confidence.double().numpy().clip(0, 1), correct.numpy()
    accuracies, confidences = calibration_curve(right, sure, n_bins=BINS)
    # The bins of calibration_curve, which does not say how many each holds.
    counts = np.bincount(np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], sure), minlength=BINS)
    counts = counts[counts > 0]
    return {
        "ece": float(np.abs(accuracies - confidences) @ counts / len(sure)),
        "mean_confidence": float(sure.mean()),
        "accuracy": float(right.mean()),
        "bins": [
            {"confidence": float(c), "accuracy": float(a), "images": int(n)}
            for c, a, n in zip(confidences, accuracies, counts)
        ],
    }


def said(found: Mapping[str, Any], several: bool = False) -> str:
    """What `calibration` found, for a person; with `several`, of labels that are there or not."""
    sure, right = ("mean probability of a label", "share that is there") if several else ("mean confidence", "accuracy")
    off = found["mean_confidence"] - found["accuracy"]
    way = "as sure as it is right" if abs(off) < 0.01 else "too sure of itself" if off > 0 else "not sure enough"
    return (
        f"calibration error (ECE) {100 * found['ece']:.2f} %: {sure} {100 * found['mean_confidence']:.2f} %, "
        f"{right} {100 * found['accuracy']:.2f} %, so it is {way} on the whole"
    )


def reliability_bytes(found: Mapping[str, Any]) -> bytes:
    """A reliability diagram as PNG: accuracy against confidence, and how many images each bin holds."""
    from matplotlib.figure import Figure

    from .figures import TRAIN, VAL, figure_bytes

    figure = Figure(figsize=(4.8, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    sure, right, counts = ([b[key] for b in found["bins"]] for key in ("confidence", "accuracy", "images"))
    upper.plot((0, 1), (0, 1), color="#999999", linestyle=":", label="as sure as right")
    upper.plot(sure, right, color=VAL, marker="o", markersize=4, label="this model")
    upper.set(ylabel="accuracy", ylim=(0, 1.02), title=f"calibration error (ECE) {100 * found['ece']:.2f} %")
    upper.legend(frameon=False, loc="upper left")
    lower.bar(sure, counts, width=0.8 / BINS, color=TRAIN)
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1.02))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure_bytes(figure)
