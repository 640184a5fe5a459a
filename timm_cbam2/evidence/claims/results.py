"""One JSON line for each training of the bench, and tables of means and paired differences with their intervals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Iterable

from ..ablation.results import Estimate, estimate

__all__ = ["KEYS", "RESULTS", "append", "key_of", "paired", "read"]

RESULTS = Path(__file__).with_name("results.jsonl")
# What tells one training from another.
KEYS = (
    "family task side count depth stages start start_on epochs batch_size recipe mixed_precision variant seed".split()
)


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a results file, none where there is no file; a line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]
    # The first lines are from when there were ResNets only, all in bf16, and none had begun on another task.
    return [{"family": "resnet", "start_on": line["task"], "mixed_precision": "bf16", **line} for line in lines]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line, on disk when this returns; what a killed writer left of one is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write((json.dumps(row, separators=(",", ":")) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def key_of(row: dict[str, Any]) -> tuple:
    return tuple(row[key] for key in KEYS)


def paired(rows: Iterable[dict[str, Any]], variant: str, control: str) -> Estimate | None:
    """By how many points `variant` is above `control`, over the seeds that both have, the rest being equal."""
    found: dict[str, dict[tuple, float]] = {variant: {}, control: {}}
    for row in rows:
        if row["variant"] in found:
            rest = tuple(row[key] for key in KEYS if key != "variant")
            found[row["variant"]][rest] = 100 * row["accuracy"]
    return estimate([value - found[control][k] for k, value in found[variant].items() if k in found[control]])
