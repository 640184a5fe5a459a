"""What a run shows while it trains, and metrics.jsonl, a line for each evaluation."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Sequence

from torch import Tensor

from ..files import duration
from ..terminal import say, visible

__all__ = ["MetricsFile", "Progress", "tracked"]


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
                say(f"{self.title}: {text}  {self.speed():.0f} images/s  {duration(left)} left")

    def speed(self) -> float:
        """Images per second since the epoch began, over all processes."""
        return self.here / max(time.monotonic() - self.began, 1e-9)

    def say(self, line: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.write(visible(line), file=sys.stdout)
        else:
            say(line)

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


def tracked(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl, those of its "health" as `health/BLOCK/NAME`, as trackers take them."""
    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    for block, found in (row["health"] or {"blocks": {}})["blocks"].items():
        numbers |= {f"health/{block}/{name}": v for name, v in found.items() if isinstance(v, (int, float))}
        numbers |= {f"health/{block}/temperature_{k}": t for k, t in zip(("channel", "spatial"), found["temperatures"])}
    return numbers
