"""The picture of a benchmark: how long each variant takes as a multiple of the plain network, as bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from ...seeing.figures import plain, save_figure

__all__ = ["draw"]

COLOURS = {"plain": "#bbbbbb", "se": "#88ccee", "eca": "#44aa99", "cbam": "#ddcc77", "cbam2": "#cc6677"}
KINDS = {"inference": "inference", "training": "training step"}


def draw(cases: Sequence[dict[str, Any]], path: Path, title: str, note: str) -> None:
    """Write the chart: a row for each case, a column for each kind; bars are medians, whiskers quartiles.

    Args:
        cases: as in `benchmark.json`.
        path: PNG file, written whole or not at all.
        title: shown on top.
        note: shown below, such as the machine.
    """
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if any(kind in variant for case in cases for variant in case["variants"])]
    heights = [0.9 + 0.32 * len(case["variants"]) for case in cases]
    figure = Figure(figsize=(1.8 + 4.6 * len(kinds), sum(heights) + 1.0), layout="constrained")
    axes = figure.subplots(len(cases), len(kinds), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, case in zip(axes, cases):
        for place, (axis, kind) in enumerate(zip(row, kinds)):
            _bars(axis, case, kind)
            side = " x ".join(map(str, case["input"]))
            axis.set_title(f"{plain(case['model'])}, {side}: {KINDS[kind]}", fontsize=9)
            if place:
                axis.set_yticklabels([])
    for axis in axes[-1]:
        axis.set_xlabel("time, as a multiple of the plain network", fontsize=8)
    figure.suptitle(plain(title), fontsize=12)
    figure.supxlabel(plain(note), fontsize=7, color="#555555")
    save_figure(figure, path)


def _bars(axis: Any, case: dict[str, Any], kind: str) -> None:
    variants = case["variants"]
    axis.set_yticks(range(len(variants)), [plain(variant["label"]) for variant in variants], fontsize=8)
    axis.set_ylim(len(variants) - 0.5, -0.5)
    axis.axvline(1, color="#555555", linewidth=0.8, linestyle=":", zorder=3)
    high = 1.0
    for place, variant in enumerate(variants):
        found = variant.get(kind)
        if found is None:
            axis.text(0.02, place, "inference only", va="center", fontsize=7, color="#777777")
            continue
        low, middle, top = found["ratio_quartiles"][0], found["ratio"], found["ratio_quartiles"][1]
        high = max(high, top)
        colour = COLOURS[variant["key"].partition("_")[0]]
        hatch = "///" if variant["compiled"] else None
        axis.barh(place, middle, color=colour, height=0.75, hatch=hatch, edgecolor="white", linewidth=0)
        axis.errorbar(
            middle, place, xerr=[[middle - low], [top - middle]], color="#333333", linewidth=1, capsize=2, zorder=4
        )
        milliseconds = 1e3 * found["seconds"]
        text = f"{middle:.2f}   {milliseconds:.{0 if milliseconds >= 100 else 1}f} ms"
        axis.text(0.02, place, text, va="center", fontsize=7, color="black", zorder=5)
    axis.set_xlim(0, 1.05 * high)
    axis.tick_params(axis="x", labelsize=7)
