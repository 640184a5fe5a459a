"""How routers and gates fared over a run: charts of the `health` that each row of metrics.jsonl carries."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Sequence

from .figures import plain

__all__ = ["health_panels", "health_rows"]

NAMED = 10  # blocks, up to which each has its name in the legend


def health_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those rows of metrics.jsonl that tell of CBAM2 blocks."""
    return [row for row in rows if (row.get("health") or {}).get("blocks")]


def health_panels(rows: Sequence[dict[str, Any]]) -> list[tuple[str, Callable[[Any], None]]]:
    """A title, and a function that draws on axes, for each chart that the rows have something for."""
    rows = health_rows(rows)
    if not rows:
        return []
    last = rows[-1]["health"]["blocks"].values()
    panels = []
    if any(len(block["branches"]) > 1 for block in last):
        title = "router's choice of scale: 0 one takes all, 1 all equal"
        panels.append((title, partial(_lines, rows, [("branches_entropy", None, "-", "")], (0, 1))))
    if any(block["fusion"] is not None for block in last):
        title = "share of the maximum in the squeeze"
        panels.append((title, partial(_lines, rows, [("fusion", 1, "-", "")], (0, 1))))
    saturated = [("channel_saturated", None, "-", "channel"), ("spatial_saturated", None, "--", "spatial")]
    panels.append(("share of the masks at an end of their gate", partial(_lines, rows, saturated, (0, 1))))
    temperatures = [("temperatures", 0, "-", "channel"), ("temperatures", 1, "--", "spatial")]
    panels.append(("temperature", partial(_lines, rows, temperatures, None)))
    return panels


def _lines(
    rows: Sequence[dict[str, Any]],
    fields: Sequence[tuple[str, int | None, str, str]],
    limits: tuple[float, float] | None,
    axes: Any,
) -> None:
    """One line per block and field against the epoch, dark for the first block and light for the last."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    blocks = list(rows[-1]["health"]["blocks"])
    colours = colormaps["viridis"]
    keys = []
    for number, name in enumerate(blocks):
        colour = colours(0.9 * number / max(len(blocks) - 1, 1))
        keys.append(Line2D([], [], color=colour, label=plain(name.rsplit(".", 1)[0])))
        for field, index, style, _ in fields:
            points = []
            for row in rows:
                value = row["health"]["blocks"].get(name, {}).get(field)
                if value is not None:
                    points.append((row["epoch"], value if index is None else value[index]))
            marker = "." if len(points) < 30 else ""
            axes.plot(*zip(*points), color=colour, linestyle=style, marker=marker, linewidth=1.2) if points else None
    if len(keys) > NAMED:
        keys = [keys[0], keys[len(keys) // 2], keys[-1]]
    keys += [Line2D([], [], color="grey", linestyle=style, label=label) for _, _, style, label in fields if label]
    if limits:
        axes.set_ylim(limits[0] - 0.03, limits[1] + 0.03)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(handles=keys, fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
