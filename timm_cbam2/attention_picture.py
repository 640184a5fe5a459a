"""The picture of an explanation: masks over the image, and charts of what the routers and gates did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Sequence

import numpy as np

from .report import save_figure

if TYPE_CHECKING:
    from .explain import BlockView, Explanation

__all__ = ["draw"]

CHART = "#a8c8e8"  # light enough to write on
FUSION_COLOURS = ("#4477aa", "#ee8866")
BRANCH_COLOURS = ("#4477aa", "#88ccee", "#ddcc77", "#cc6677", "#aa4499", "#117733", "#882255", "#999933")
PANEL = 2.3  # inches


def _shown(explanation: Explanation, every_block: bool) -> list[BlockView]:
    if every_block:
        return explanation.blocks
    return list({block.stage: block for block in explanation.blocks}.values())  # the last one of each stage


def _short(name: str) -> str:
    return name.replace("stages.", "stage ").replace(".blocks.", ".").rsplit(".", 1)[0]


def _reach(blocks: Sequence[BlockView]) -> float:
    """How far any mask is from neutral, rounded up so that the scale reads well; at least 0.05."""
    largest = max(float((b.attention.spatial_mask[0] - b.neutral).abs().max()) for b in blocks)
    step = 10 ** math.floor(math.log10(max(largest, 0.05)))
    return max(math.ceil(largest / step) * step, 0.05)


def _mask_panels(axes: Sequence[Any], explanation: Explanation, blocks: Sequence[BlockView], reach: float) -> Any:
    """Draw each block's mask over the image in grey; blue lowers, red raises; returns the last image for the bar."""
    import torch.nn.functional as F

    grey = explanation.pixels.mean(2)
    height, width = grey.shape
    drawn = None
    for axis, block in zip(axes, blocks):
        mask = block.attention.spatial_mask.float().cpu()
        small = tuple(mask.shape[2:])
        mask = F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)[0, 0].numpy()
        axis.imshow(grey, cmap="gray", vmin=0, vmax=1.4)
        drawn = axis.imshow(mask, cmap="RdBu_r", vmin=block.neutral - reach, vmax=block.neutral + reach, alpha=0.6)
        axis.set_title(f"{_short(block.name)}\n{small[0]}x{small[1]}", fontsize=8)
    return drawn


def _stacked(axis: Any, rows: Sequence[np.ndarray], labels: Sequence[str], colours: Sequence[str], title: str) -> None:
    positions = np.arange(len(rows))
    left = np.zeros(len(rows))
    for i, label in enumerate(labels):
        share = np.array([row[i] for row in rows])
        axis.barh(positions, share, left=left, color=colours[i % len(colours)], label=label, height=0.8)
        left += share
    axis.set_xlim(0, 1)
    axis.set_title(title, fontsize=9)
    axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def _charts(axes: Sequence[Any], explanation: Explanation) -> None:
    answers, router, fusion, channel, temperature = axes
    blocks = explanation.blocks
    names = [_short(block.name) for block in blocks]

    labels = [name if len(name) <= 22 else name[:21] + "…" for name, _ in explanation.answers]
    values = [100 * probability for _, probability in explanation.answers]
    positions = np.arange(len(values))
    answers.barh(positions, values, color=CHART, height=0.8)
    for position, label, value in zip(positions, labels, values):
        answers.text(2, position, f"{label}  {value:.1f} %", va="center", fontsize=8, color="black")
    answers.set_xlim(0, 100)
    answers.set_yticks([])
    answers.set_title("answer (%)", fontsize=9)

    _stacked(
        router,
        [block.attention.router_weights[0].float().cpu().numpy() for block in blocks],
        blocks[0].branches,
        BRANCH_COLOURS,
        "scale chosen by the router",
    )
    if all(block.fusion is not None for block in blocks):
        _stacked(fusion, [b.fusion for b in blocks], ("average", "maximum"), FUSION_COLOURS, "squeeze fused from")
    else:
        fusion.text(0.5, 0.5, "fusion='sum': average and\nmaximum are added", ha="center", va="center", fontsize=8)
        fusion.set_title("squeeze fused from", fontsize=9)

    masks = [block.attention.channel_mask[0].flatten().float().cpu().numpy() for block in blocks]
    channel.boxplot(masks, positions=np.arange(len(blocks)), vert=False, widths=0.7, showfliers=True,
                    flierprops=dict(markersize=2, alpha=0.5))  # fmt: skip
    channel.axvline(blocks[0].neutral, color="grey", linewidth=1, linestyle=":")
    channel.set_title("channel mask values", fontsize=9)

    for number, (label, marker) in enumerate((("channel", "o"), ("spatial", "s"))):
        values = [block.temperatures[number] for block in blocks]
        temperature.plot(values, np.arange(len(blocks)), marker=marker, linestyle="", markersize=4, label=label)
    temperature.set_title("temperature", fontsize=9)
    temperature.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)

    for axis in (router, fusion, channel, temperature):
        axis.set_ylim(len(blocks) - 0.5, -0.5)
        every = max(1, math.ceil(len(blocks) / 18))
        axis.set_yticks(range(0, len(blocks), every), names[::every] if axis is router else [], fontsize=7)
    answers.set_ylim(len(explanation.answers) - 0.5, -0.5)
    for axis in axes:
        axis.tick_params(axis="x", labelsize=7)


def draw(explanations: Sequence[Explanation], path: Path, title: str, every_block: bool = False) -> None:
    """Write the picture of one image as one model, or several one below the other, saw it.

    Args:
        explanations: of the same image by different models; their masks share one colour scale.
        path: PNG file, written whole or not at all.
        title: shown on top, such as the image's file name.
        every_block: show the mask of every block, not of each stage's last.
    """
    from matplotlib.figure import Figure

    shown = [_shown(explanation, every_block) for explanation in explanations]
    columns = min(max(max(map(len, shown)) + 1, 4), 8)
    rows = [math.ceil((len(blocks) + 1) / columns) for blocks in shown]
    heights = [PANEL * 1.15 * count + 3.2 for count in rows]
    figure = Figure(figsize=(PANEL * columns + 0.8, sum(heights) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    reach = max(_reach(blocks) for blocks in shown)
    parts = figure.subfigures(len(explanations), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, explanation, blocks, count in zip(parts, explanations, shown, rows):
        upper, lower = part.subfigures(2, 1, height_ratios=[PANEL * 1.15 * count, 3.2])
        panels = upper.subplots(count, columns, squeeze=False).flatten()
        for axis in panels:
            axis.axis("off")
        panels[0].imshow(explanation.pixels)
        panels[0].set_title(f"{explanation.model[-34:]}\nas the model sees it", fontsize=8)
        drawn = _mask_panels(panels[1:], explanation, blocks, reach)
        bar = upper.colorbar(drawn, ax=list(panels), shrink=0.8, pad=0.01, aspect=25)
        bar.set_label("spatial mask", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        _charts(lower.subplots(1, 5), explanation)
    save_figure(figure, path)
