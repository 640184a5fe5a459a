"""What looks on while a run trains: health in numbers, curves, the confusion matrix, the report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from torch import Tensor, nn

from ..training.observer import Observer, observe_with

__all__ = ["Seeing", "look_on"]

REPORT_SECONDS = 5  # to look at the worst mistakes: a run that is over should not keep a person waiting


class Seeing(Observer):
    """The observer of every run that a command starts; drawing is imported when there is something to draw."""

    def measure(self, network: nn.Module, images: Tensor) -> dict[str, Any] | None:
        """See `health.measure`."""
        from .health import measure

        return measure(network, images)

    def draw_curves(self, rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
        """See `figures.curves_picture`."""
        from .figures import curves_picture

        curves_picture(rows, path, title)

    def draw_confusion(self, matrix: Tensor, classes: Sequence[str], path: Path, title: str) -> None:
        """See `figures.confusion_picture`."""
        from .figures import confusion_picture

        confusion_picture(matrix, classes, path, title)

    def report(self, folder: Path, confusion: Tensor | None) -> Path:
        """See `report.write_report`."""
        from .report import write_report

        return write_report(folder, seconds=REPORT_SECONDS, confusion=confusion)


def look_on() -> None:
    """Look on at the runs of this process."""
    observe_with(Seeing())
