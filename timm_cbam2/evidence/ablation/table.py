"""The results of a question as a Markdown table, and of several as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from ...seeing.figures import TRAIN, VAL, save_figure
from .grid import Grid, Question
from .results import Estimate, Row, compare

__all__ = ["markdown", "picture"]


def _signed(found: Estimate | None) -> str:
    if found is None:
        return "–"
    if found.half is None:
        return f"{found.mean:+.2f} (one pair)"
    return f"{found.mean:+.2f} ± {found.half:.2f}"


def _plain(found: Estimate | None) -> str:
    if found is None:
        return "not run yet"
    return f"{found.mean:.2f}" + (f" ± {found.half:.2f}" if found.half is not None else "")


def markdown(grid: Grid, question: Question, rows: Sequence[dict[str, Any]]) -> str:
    """The table of a question: percent and points after the last epoch, ± half of the 95 % interval."""
    lines = [
        f"| variant | parameters | seeds | validation accuracy, % | minus {question.control} | CPU s per epoch |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in compare(grid, question, rows):
        about = grid.about.get(row.variant)
        cells = [
            f"{row.variant}" + (f": {about}" if about else ""),
            f"{row.parameters:,}" if row.parameters else "",
            f"{len(row.accuracies)} of {len(question.seeds)}",
            _plain(row.accuracy),
            "control" if row.variant == question.control else _signed(row.difference),
            f"{row.cpu_seconds:.0f}" if row.cpu_seconds else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(grid: Grid, questions: Sequence[Question], rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each question: accuracies by seed with their mean and interval, and the differences from the control."""
    from matplotlib.figure import Figure

    tables = [(q, compare(grid, q, rows)) for q in questions]
    heights = [1.2 + 0.32 * len(table) for _, table in tables]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    axes = figure.subplots(len(tables), 2, squeeze=False, height_ratios=heights)
    for (question, table), (left, right) in zip(tables, axes):
        _panel(left, table, [list(r.accuracies.values()) for r in table], [r.accuracy for r in table], VAL)
        left.set_title(f"{question.name}: {question.asks}", fontsize=10, loc="left")
        left.set_xlabel("validation accuracy after the last epoch, %: each seed, mean and 95 % interval", fontsize=8)
        control = next(r for r in table if r.variant == question.control).accuracies
        pairs = [
            [a - control[s] for s, a in r.accuracies.items() if s in control] if r.variant != question.control else []
            for r in table
        ]
        _panel(right, table, pairs, [r.difference for r in table], TRAIN)
        right.axvline(0, color="black", linewidth=0.8)
        right.set_yticklabels([])
        right.set_xlabel(f"minus {question.control} of the same seed, points", fontsize=8)
    save_figure(figure, path)


def _panel(
    axes: Any, table: Sequence[Row], points: Sequence[Sequence[float]], means: Sequence[Any], colour: str
) -> None:
    for y, (values, mean) in enumerate(zip(points, means)):
        axes.plot(values, [y] * len(values), "o", color=colour, alpha=0.45, markersize=5, linestyle="none")
        if mean is not None and mean.half is not None:
            axes.errorbar(mean.mean, y, xerr=mean.half, fmt="|", color=colour, capsize=4, markersize=12)
    axes.set_yticks(range(len(table)), [f"{r.variant} ({len(r.accuracies)})" for r in table], fontsize=8)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
