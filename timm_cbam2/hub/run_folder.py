"""What a run folder says of itself: run.json, the settings, and metrics.jsonl, a line for each epoch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping, Sequence

from ..errors import UserError

__all__ = ["best_row", "rank", "read_metrics", "read_settings", "score", "score_name", "with_attention_decay"]

NEEDED = ("model", "data")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The resolved settings of the run in `folder`; None where there is no run.json.

    Raises:
        UserError: it is damaged, or not of a run.
    """
    file = folder / "run.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: bring back a copy, or give the model's own folder") from error
    missing = [key for key in NEEDED if not isinstance(settings, dict) or key not in settings]
    if missing:
        raise UserError(
            f"{file} holds no settings of a run (no {', '.join(missing)}): bring back a copy, or give the model's own "
            "folder"
        )
    return settings


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of the run in `folder`, none where there is no metrics.jsonl; damaged lines are passed over."""
    file = folder / "metrics.jsonl"
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # half a line, of a run that was killed
            continue
    return [row for row in rows if isinstance(row, dict) and "val_accuracy" in row]


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation that the model in `best/` is of."""
    return max(rows, key=rank)


def score(row: dict[str, Any]) -> float:
    """What models are chosen by: accuracy or, with several labels an image, mean average precision."""
    return row.get("val_map", row["val_accuracy"])


def score_name(row: dict[str, Any]) -> str:
    """What `score` is, for a person."""
    return "mean average precision" if "val_map" in row else "accuracy"


def rank(row: dict[str, Any]) -> tuple[float, float]:
    """By which one evaluation is better than another: its score, then its loss."""
    return score(row), -row["val_loss"]


def with_attention_decay(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run that may have begun before attention had a weight decay of its own: it had that of all, and
    learned from the first update on."""
    return {"attention_weight_decay": saved.get("weight_decay"), "attention_delay_epochs": 0.0, **saved}
