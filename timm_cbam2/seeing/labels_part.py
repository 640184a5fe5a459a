"""How a run's best model tells several labels of an image, class by class, for its report."""

from __future__ import annotations

import torch
from torch import nn

from ..data.images import Samples
from ..errors import UserError
from ..training.multi_label import MultiPredictions, said_of_labels
from .calibration import reliability_bytes, said
from .figures import bars_bytes
from .html_parts import bytes_image, table
from .measured import numbers
from .mistakes import said_in_time

__all__ = ["labels_part"]


def labels_part(model: nn.Module, samples: Samples, names: list[str], seconds: float | None) -> str:
    """Average precision, precision and recall of every class, and calibration, as HTML.

    Args:
        model: the best one of the run.
        samples: its validation images, labels as the model's.
        names: of the classes.
        seconds: after which the images seen so far must do; None means no limit.

    Raises:
        UserError: none of the images can be read.
    """
    parts = [said_of_labels(logits, labels) for logits, labels, _ in said_in_time(model, samples, seconds)]
    scores, loss, labels = (torch.cat(column) for column in zip(*parts))
    readable = labels[:, 0] >= 0
    if not readable.any():
        raise UserError("none of the validation images can be read")
    result = numbers(MultiPredictions(scores[readable], loss[readable], labels[readable]), names)
    rows = [
        (name, row["images"], *(f"{100 * row[key]:.1f} %" for key in ("average_precision", "precision", "recall")))
        for name, row in sorted(result["per_class"].items(), key=lambda item: item[1]["average_precision"])
    ]
    precisions = {name: row["average_precision"] for name, row in result["per_class"].items()}
    bars = bytes_image(bars_bytes(precisions, "the lowest first"), "average precision of each class")
    reliability = bytes_image(reliability_bytes(result["calibration"]), "how often a label of a probability is there")
    some = "" if len(loss) == len(samples) else f'<p class="note">From {len(loss):,} of {len(samples):,} images.</p>'
    return (
        f'<h2>Classes</h2><div class="plots">{bars}</div>{some}'
        f"{table(rows, ('class', 'images', 'average precision', 'precision', 'recall'))}"
        f'<h2>Calibration</h2><p>{said(result["calibration"], True)}</p><div class="plots">{reliability}</div>'
    )
