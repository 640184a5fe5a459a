"""What results say, in markdown: means and paired differences with 95 % intervals, what decisions are worth."""

from __future__ import annotations

from typing import Any, Iterator, Sequence

from ..ablation.results import Estimate, estimate
from .results import KEYS, paired

__all__ = ["markdown"]

KINDS = ("channel", "spatial", "fusion", "branches")
# Both of a pair are of one precision, so that pairs of either count together; of a seed that has both, the first.
SETTING = tuple(key for key in KEYS if key not in ("variant", "seed", "mixed_precision"))
HEAD = [
    "variant", "seeds", "accuracy", "above", *(f"worth of {kind}" for kind in KINDS), "channel spread, dead",
    "spatial spread, dead", "inside less outside", "of the mean mask", "pointing", "fusion spread", "branch spread",
]  # fmt: skip


def _interval(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:+.2f}" + ("" if found.half is None else f" ± {found.half:.2f}")


def _last(rows: Sequence[dict[str, Any]], kind: str, what: str) -> str:
    """A number of the network's last block that decides `kind`, its mean over seeds."""
    found = []
    for row in rows:
        blocks = [block[kind] for block in row.get("blocks", {}).values() if kind in block]
        if blocks and what in blocks[-1]:
            found.append(blocks[-1][what])
    return f"{sum(found) / len(found):.2f}" if found else "-"


def _row(rows: Sequence[dict[str, Any]], variant: str, control: str) -> list[str]:
    own = [row for row in rows if row["variant"] == variant]
    worth = [_interval(estimate([row["worth"][k] for row in own if k in row.get("worth", {})])) for k in KINDS]
    masks = [f"{_last(own, kind, 'spread')}, {_last(own, kind, 'dead')}" for kind in KINDS[:2]]
    looks = [_last(own, "spatial", what) for what in ("inside", "inside_of_mean", "pointing")]
    spreads = [_last(own, kind, "spread") for kind in KINDS[2:]]
    mean = estimate([100 * row["accuracy"] for row in own])
    accuracy = f"{mean.mean:.2f}" + ("" if mean.half is None else f" ± {mean.half:.2f}")
    above = _interval(paired(rows, variant, control)) if variant != control else "-"
    return [variant, str(len(own)), accuracy, above, *worth, *masks, *looks, *spreads]


def markdown(rows: Sequence[dict[str, Any]], control: str = "plain") -> Iterator[str]:
    """Lines of one table for each setting that was trained; masks and routers are those of the last block."""
    for setting in dict.fromkeys(tuple(row[key] for key in SETTING) for row in rows):
        found = [row for row in rows if tuple(row[key] for key in SETTING) == setting]
        found = list({(row["variant"], row["seed"]): row for row in reversed(found)}.values())[::-1]
        yield ""
        yield ", ".join(f"{key} {value}" for key, value in zip(SETTING, setting))
        anchor = [r["grad_cam"]["pointing"] for r in found if r["variant"] == control and "grad_cam" in r]
        if anchor:
            share, box = sum(anchor) / len(anchor), found[0]["box"]
            yield f"Boxes fill {box:.2f} of a picture, Grad-CAM on {control} points into {share:.2f} of them."
        yield ""
        yield f"| {' | '.join(HEAD)} |".replace("above", f"above {control}")
        yield "| --- |" + " ---: |" * (len(HEAD) - 1)
        for variant in dict.fromkeys(row["variant"] for row in found):
            yield f"| {' | '.join(_row(found, variant, control))} |"
