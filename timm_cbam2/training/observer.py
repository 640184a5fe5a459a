"""What looks on while a run trains: nothing here, until `seeing/` registers what measures attention and draws it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from torch import Tensor, nn

__all__ = ["Observer", "observe_with", "observer"]


class Observer:
    """Sees nothing and draws nothing: a run then leaves its models and numbers only."""

    def measure(self, network: nn.Module, images: Tensor) -> dict[str, Any] | None:
        """What to write as "health" into the row of an evaluation, of a few images (B, C, H, W)."""

    def draw_curves(self, rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
        """Draw the rows of metrics.jsonl; called now and then, and at the end."""

    def draw_confusion(self, matrix: Tensor, classes: Sequence[str], path: Path, title: str) -> None:
        """Draw a confusion matrix (K, K) of counts, rows the truth."""

    def report(self, folder: Path, confusion: Tensor | None) -> Path | None:
        """Write the report of a run that is complete, and say where it is."""


_observer = Observer()


def observe_with(new: Observer) -> None:
    """Let `new` look on at the runs of this process."""
    global _observer
    _observer = new


def observer() -> Observer:
    """What looks on."""
    return _observer
