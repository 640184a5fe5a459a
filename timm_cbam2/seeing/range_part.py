"""The range test of `--lr auto`, drawn for the report."""

from __future__ import annotations

import json
from pathlib import Path

from ..training.automatic import FILE
from .figures import VAL, figure_bytes
from .html_parts import bytes_image

__all__ = ["range_part"]


def range_part(folder: Path) -> str:
    """The loss against the rising learning rate as HTML; empty for a run that was given one."""
    path = folder / FILE
    found = json.loads(path.read_text(encoding="utf-8")).get("lr") if path.is_file() else None
    if found is None:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(found["lrs"], found["losses"], color=VAL)
    axes.axvline(found["chosen"], color="#999999", linestyle=":", label=f"chosen: {found['chosen']:g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, smoothed")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    image = bytes_image(figure_bytes(figure), "loss against the learning rate")
    return f'<h2>Learning rate</h2><p>--lr auto chose {found["chosen"]:g}.</p><div class="plots">{image}</div>'
