"""The picture of an explanation: masks over the image, and charts of what the routers and gates did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

from .figures import plain, save_figure
from .views import BlockView, Explanation

__all__ = [
    "BRANCH_COLOURS",
    "FUSION_COLOURS",
    "LOWERS",
    "NEUTRAL",
    "RAISES",
    "draw",
    "overlay",
    "reach_of",
    "scale_overlay",
    "shown_blocks",
]

CHART = "#a8c8e8"  # light enough to write on
FUSION_COLOURS = ("#4477aa", "#ee8866")
BRANCH_COLOURS = ("#4477aa", "#88ccee", "#ddcc77", "#cc6677", "#aa4499", "#117733", "#882255", "#999933")
LOWERS, NEUTRAL, RAISES = "#2166ac", "#f7f7f7", "#b2182b"  # one diverging scale, light where nothing changes
PANEL = 2.3  # inches
CHART_HEIGHT = 3.2


def shown_blocks(explanation: Explanation, every_block: bool = False) -> list[BlockView]:
    """The last block of each stage, or all of them."""
    if every_block:
        return explanation.blocks
    return list({block.stage: block for block in explanation.blocks}.values())


def reach_of(blocks: Sequence[BlockView]) -> float:
    """How far any spatial mask is from neutral, rounded up so that the scale reads well; at least 0.05."""
    largest = max(float((b.attention.spatial_mask[0] - b.neutral).abs().max()) for b in blocks)
    step = 10 ** math.floor(math.log10(max(largest, 0.05)))
    return max(math.ceil(round(largest / step, 6)) * step, 0.05)


def overlay(pixels: np.ndarray, block: BlockView, reach: float, side: int = 0) -> np.ndarray:
    """The image in grey, tinted by a block's spatial mask: blue lowers, red raises, light grey changes nothing.

    The tint multiplies the image's brightness, which is stretched first: a dark picture leaves hue and strength as
    the colour bar shows them.

    Args:
        pixels: (H, W, 3) in [0, 1].
        block: whose mask is upsampled to the image, bilinearly.
        reach: distance from neutral at which the colour is full, see `reach_of`.
        side: enlarge the result, so that its shorter side has at least as many pixels.

    Returns:
        (H', W', 3) uint8.
    """
    import torch
    import torch.nn.functional as F

    grey = _grey(pixels, side)
    mask = block.attention.spatial_mask[:1].float().cpu()  # (1, 1, h, w)
    mask = F.interpolate(mask, grey.shape, mode="bilinear", align_corners=False)[0, 0]
    away = ((mask - block.neutral) / reach).clamp(-1, 1)[..., None]
    lowers, neutral, raises = (torch.tensor(_rgb(c)) for c in (LOWERS, NEUTRAL, RAISES))
    colour = neutral + away.clamp(min=0) * (raises - neutral) - away.clamp(max=0) * (lowers - neutral)
    return (colour * (0.6 + 0.4 * grey[..., None])).round().to(torch.uint8).numpy()


def scale_overlay(pixels: np.ndarray, block: BlockView, side: int = 0) -> np.ndarray:
    """The image in grey, tinted by which branches the router of a block with routing by position chose where.

    Args:
        pixels: (H, W, 3) in [0, 1].
        block: whose router weights mix `BRANCH_COLOURS` at every position.
        side: see `overlay`.

    Returns:
        (H', W', 3) uint8.
    """
    import torch
    import torch.nn.functional as F

    grey = _grey(pixels, side)
    weights = block.attention.router_weights[:1].float().cpu()  # (1, K, h, w)
    weights = F.interpolate(weights, grey.shape, mode="bilinear", align_corners=False)[0]
    colours = [_rgb(BRANCH_COLOURS[i % len(BRANCH_COLOURS)]) for i in range(len(weights))]
    colour = torch.einsum("khw,kc->hwc", weights, torch.tensor(colours, dtype=torch.float32))
    return (colour * (0.6 + 0.4 * grey[..., None])).round().clamp(0, 255).to(torch.uint8).numpy()


def _grey(pixels: np.ndarray, side: int) -> Any:
    """Brightness (H', W') of an image, stretched to [0, 1], the shorter side at least `side`."""
    import torch
    import torch.nn.functional as F

    grey = torch.from_numpy(pixels).float().mean(2)
    low, high = np.percentile(grey.numpy(), (1, 99))
    grey = ((grey - low) / (high - low)).clamp(0, 1) if high - low > 1e-3 else torch.ones_like(grey)
    factor = max(1, math.ceil(side / min(grey.shape)))
    return F.interpolate(grey[None, None], tuple(factor * n for n in grey.shape), mode="nearest")[0, 0]


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def mask_range(block: BlockView) -> str:
    """Size and values of a block's spatial mask, in words."""
    mask = block.attention.spatial_mask[0, 0].float()
    low, high = mask.min().item(), mask.max().item()
    values = f"{low:.2f} to {high:.2f}" if high - low > 5e-3 else f"{(low + high) / 2:.2f} everywhere"
    return f"{mask.shape[0]}x{mask.shape[1]}, {values}"


def scale_label(block: BlockView) -> str:
    """What the middle of the colour scale means."""
    return "1 = unchanged" if block.neutral == 1 else f"{block.neutral:g} = middle of the gate"


def short_name(block: BlockView) -> str:
    """A block's module name without what is the same for every block."""
    return block.name.replace("stages.", "stage ").replace(".blocks.", ".").rsplit(".", 1)[0]


def clipped(text: str, length: int, end: bool = False) -> str:
    """`text` in at most `length` characters; with `end`, its end is kept."""
    if len(text) <= length:
        return text
    return "…" + text[1 - length :] if end else text[: length - 1] + "…"


def _answers(axis: Any, explanation: Explanation) -> None:
    if not explanation.answers:  # detection, segmentation
        axis.axis("off")
        return
    values = [100 * probability for _, probability in explanation.answers]
    axis.barh(range(len(values)), values, color=CHART, height=0.8)
    for position, (name, _) in enumerate(explanation.answers):
        text = f"{plain(clipped(name, 25))}  {values[position]:.1f} %"
        axis.text(2, position, text, va="center", fontsize=8, color="black")
    axis.set_xlim(0, 100)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_yticks([])
    axis.set_title("answer (%)", fontsize=9)


def _stacked(axis: Any, rows: Sequence[np.ndarray], labels: Sequence[str], colours: Sequence[str]) -> None:
    positions = np.arange(len(rows))
    left = np.zeros(len(rows))
    for i, label in enumerate(labels):
        share = np.array([row[i] for row in rows])
        axis.barh(positions, share, left=left, color=colours[i % len(colours)], label=label, height=0.8)
        left += share
    axis.set_xlim(0, 1)
    axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def _router(axis: Any, blocks: Sequence[BlockView]) -> None:
    _stacked(axis, [block.shares for block in blocks], blocks[0].branches, BRANCH_COLOURS)
    where = ", mean over positions" if any(block.by_position for block in blocks) else ""
    axis.set_title(f"scale chosen by the router{where}", fontsize=9)


def _fusion(axis: Any, blocks: Sequence[BlockView]) -> None:
    _stacked(axis, [block.fusion for block in blocks], ("average", "maximum"), FUSION_COLOURS)
    learned = all(block.attention.fusion_weights is None for block in blocks)
    axis.set_title("squeeze: fixed mix" if learned else "squeeze: mix for this image", fontsize=9)


def _channels(axis: Any, blocks: Sequence[BlockView]) -> None:
    """A histogram of each block's channel mask over the whole range of the gate, the tallest bar filling its row."""
    top = 2 * blocks[0].neutral
    edges = np.linspace(0, top, 34)  # an odd number of bins: neutral is the middle of one
    for position, block in enumerate(blocks):
        counts, _ = np.histogram(block.attention.channel_mask[0].flatten().float().cpu().numpy(), edges)
        heights = 0.85 * counts / max(counts.max(), 1)
        bottom = position + 0.45
        axis.stairs(bottom - heights, edges, baseline=bottom, fill=True, color="#4477aa")
        axis.axhline(bottom, color="#bbbbbb", linewidth=0.5)
    axis.axvline(blocks[0].neutral, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlim(0, top)
    axis.set_title("channel mask, histogram", fontsize=9)


def _temperatures(axis: Any, blocks: Sequence[BlockView]) -> None:
    for number, (label, marker) in enumerate((("channel", "o"), ("spatial", "s"))):
        values = [block.temperatures[number] for block in blocks]
        colour = FUSION_COLOURS[number]
        positions = np.arange(len(blocks)) + 0.3 * number - 0.15
        axis.plot(values, positions, marker=marker, linestyle="", markersize=4, label=label, color=colour)
    low, high = axis.get_xlim()
    margin = max(0.0, 0.05 * high - (high - low) / 2)  # equal temperatures are one line, not noise
    axis.set_xlim(low - margin, high + margin)
    axis.set_title("temperature", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)


def _charts(figure: Any, explanation: Explanation, columns: int) -> None:
    """The answer beside one row per block of whatever the blocks have; `columns` charts beside each other."""
    blocks = explanation.blocks
    charts: list[Callable[[Any, Sequence[BlockView]], None]] = [_router, _channels, _temperatures]
    if all(block.fusion is not None for block in blocks):  # fusion="sum" mixes nothing
        charts.insert(1, _fusion)
    rows = math.ceil((len(charts) + 1) / columns)
    columns = math.ceil((len(charts) + 1) / rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    _answers(axes[0], explanation)
    names = [short_name(block) for block in blocks]
    for place, (axis, chart) in enumerate(zip(axes[1:], charts), 1):
        chart(axis, blocks)
        axis.set_ylim(len(blocks) - 0.5, -0.5)
        is_named = place == 1 or place % columns == 0
        axis.set_yticks(
            range(len(blocks)), names if is_named else [""] * len(names), fontsize=7 if len(names) < 25 else 5
        )
    for axis in axes[: len(charts) + 1]:
        axis.tick_params(axis="x", labelsize=7)
    for axis in axes[len(charts) + 1 :]:
        axis.remove()


def _draw_part(
    figure: Any,
    explanation: Explanation,
    blocks: Sequence[BlockView],
    reach: float,
    rows: int,
    columns: int,
    charts: int,
) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    height = _chart_height(explanation, charts)
    upper, lower = figure.subfigures(2, 1, height_ratios=[PANEL * 1.2 * rows, height])
    panels = upper.subplots(rows, columns, squeeze=False).flatten()
    for axis in panels:
        axis.axis("off")
    panels[0].imshow(explanation.pixels)
    panels[0].set_title(f"{plain(clipped(explanation.model, 34, end=True))}\nas the model sees it", fontsize=8)
    for axis, block in zip(panels[1:], blocks):
        axis.imshow(overlay(explanation.shown, block, reach))
        axis.set_title(f"{short_name(block)}\n{mask_range(block)}", fontsize=8)
    for axis, block in zip(panels[1 + len(blocks) :], _routed(blocks)):
        axis.imshow(scale_overlay(explanation.shown, block))
        axis.set_title(f"{short_name(block)}\nscale by position", fontsize=8)
    middle = blocks[0].neutral
    scale = ScalarMappable(
        Normalize(middle - reach, middle + reach), LinearSegmentedColormap.from_list("mask", [LOWERS, NEUTRAL, RAISES])
    )
    bar = upper.colorbar(scale, ax=list(panels), shrink=0.8, pad=0.01, aspect=25)
    bar.set_label(f"spatial mask ({scale_label(blocks[0])})", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    _charts(lower, explanation, charts)


def _routed(blocks: Sequence[BlockView]) -> list[BlockView]:
    return [block for block in blocks if block.by_position]


def _chart_height(explanation: Explanation, charts: int) -> float:
    height = max(CHART_HEIGHT, 1.0 + 0.13 * len(explanation.blocks))
    return height if charts >= 5 else 2 * height


def draw(explanations: Sequence[Explanation], path: Path, title: str, every_block: bool = False) -> None:
    """Write the picture of one image as one model, or several side by side, saw it.

    Args:
        explanations: of the same image by different models; their masks share one colour scale.
        path: PNG file, written whole or not at all.
        title: shown on top, such as the image's file name.
        every_block: show the mask of every block, not of each stage's last.
    """
    from matplotlib.figure import Figure

    shown = [shown_blocks(explanation, every_block) for explanation in explanations]
    most = max(len(blocks) + len(_routed(blocks)) for blocks in shown) + 1
    alone = len(explanations) == 1
    widest = 8 if alone else 4
    columns = max(math.ceil(most / math.ceil(most / widest)), 4 if alone else 3)
    rows, charts = math.ceil(most / columns), 5 if alone else 3
    height = PANEL * 1.2 * rows + max(_chart_height(explanation, charts) for explanation in explanations)
    figure = Figure(figsize=((PANEL * columns + 0.8) * len(explanations), height + 0.4), layout="constrained")
    figure.suptitle(plain(clipped(title, 60 * len(explanations))), fontsize=12)
    reach = max(reach_of(blocks) for blocks in shown)
    parts = figure.subfigures(1, len(explanations), wspace=0.03, squeeze=False)[0]
    for part, explanation, blocks in zip(parts, explanations, shown):
        _draw_part(part, explanation, blocks, reach, rows, columns, charts)
    save_figure(figure, path)
