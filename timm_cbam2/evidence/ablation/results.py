"""One JSON line for each finished training, and what a set of them says: means, paired differences, intervals."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from ...errors import UserError, one_line
from .grid import Grid, Job, Question

__all__ = ["RESULTS", "Estimate", "Results", "Row", "compare", "estimate"]

RESULTS = Path(__file__).with_name("results.jsonl")


class Results:
    """The file of finished trainings, to which lines are only ever added.

    Args:
        path: of the file, which need not exist.

    Raises:
        UserError: it holds what is no result.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--results {self.path} is no file of results ({one_line(error, 100)})") from error
        # A writer that was killed leaves a line without its end: that training is harvested again.
        self.whole = (
            len(text.encode()) if text.endswith("\n") or not text else len(text[: text.rfind("\n") + 1].encode())
        )
        for number, line in enumerate(text.encode()[: self.whole].decode().splitlines(), 1):
            try:
                row = json.loads(line)
                row["variant"], row["seed"], row["accuracy"], row["options"]  # noqa: B018
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}, line {number}, is not a result: remove the line, or give another file"
                ) from error
            self.rows.append(row)

    def find(self, job: Job) -> dict[str, Any] | None:
        """The result of `job`, None if it has none yet.

        Raises:
            UserError: there is one of its name, but trained with other options, which must not be mixed.
        """
        for row in self.rows:
            if row["variant"] == job.variant and row["seed"] == job.seed:
                wanted = json.loads(json.dumps(job.settings()))
                found = row["options"]
                if wanted["data"] is None:  # any will do
                    found = {**found, "data": None}
                differ = [k for k in sorted(wanted.keys() | found.keys()) if wanted.get(k) != found.get(k)]
                if differ:
                    key = differ[0]
                    raise UserError(
                        f"{self.path} has {job.name} with {key}={found.get(key)!r}, the grid says {wanted.get(key)!r}: "
                        "give another --results file, so that they are not mixed"
                    )
                return row
        return None

    def append(self, row: dict[str, Any]) -> None:
        """Add a line, on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self.whole)
            file.write((json.dumps(row, separators=(",", ":")) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            self.whole = file.tell()
        self.rows.append(row)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds with the half-width of its 95 % interval, None for a single seed."""

    mean: float
    half: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and 95 % interval of independent values by Student's t distribution; None without any value."""
    if not values:
        return None
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    from scipy.stats import t

    error = statistics.stdev(values) / count**0.5
    return Estimate(mean, float(t.ppf(0.975, count - 1)) * error, count)


@dataclass(frozen=True)
class Row:
    """What is known of one variant of a question; accuracies and differences are in percent and points."""

    variant: str
    parameters: int | None
    accuracies: dict[int, float]  # by seed, after the last epoch
    accuracy: Estimate | None
    difference: Estimate | None  # to the control, over the seeds that both have
    cpu_seconds: float | None  # per epoch, mean over seeds


def compare(grid: Grid, question: Question, rows: Sequence[dict[str, Any]]) -> list[Row]:
    """One `Row` for each variant of a question, whether it has results or not.

    The last epoch counts, not the best one, so that no variant gains from many looks at the validation images.
    """
    found = {
        v: {r["seed"]: r for r in rows if r["variant"] == v and r["seed"] in question.seeds} for v in question.variants
    }
    control = {seed: _accuracy(row) for seed, row in found[question.control].items()}
    table = []
    for variant in question.variants:
        results = found[variant]
        accuracies = {seed: _accuracy(results[seed]) for seed in sorted(results)}
        paired = [accuracies[s] - control[s] for s in accuracies if s in control] if variant != question.control else []
        per_epoch = [r["cpu_seconds"] / r["epochs"] for r in results.values() if r.get("cpu_seconds")]
        table.append(
            Row(
                variant,
                next((r["parameters"] for r in results.values()), None),
                accuracies,
                estimate(list(accuracies.values())),
                estimate(paired),
                statistics.fmean(per_epoch) if per_epoch else None,
            )
        )
    return table


def _accuracy(row: dict[str, Any]) -> float:
    return 100 * row["accuracy"]
