"""What the page shows of one picture: answers, masks with their colour scale, bars of the routers, files to take."""

from __future__ import annotations

import os
import tempfile
from html import escape
from pathlib import Path
from typing import Sequence

from ..attention_picture import (
    BRANCH_COLOURS,
    CHART,
    FUSION_COLOURS,
    LOWERS,
    NEUTRAL,
    RAISES,
    draw,
    mask_range,
    overlay,
    reach_of,
    scale_label,
    scale_overlay,
    short_name,
    shown_blocks,
)
from ..explain import write_arrays
from ..html_parts import BARS_STYLE, colour_scale, pixels_image, stacked_bars
from ..views import BlockView, Explanation

__all__ = ["STYLE", "message", "panels", "write_files"]

STYLE = (
    BARS_STYLE
    + """
.answers{max-width:40rem;margin-bottom:.6rem}.answer{margin:.2rem 0}
.answer div{background:CHART;height:1.3rem;border-radius:2px}
.answer span{position:absolute;padding:0 .3rem;line-height:1.3rem;white-space:nowrap}
.dark .answer div{background:#33597d}
.panel{display:flex;flex-wrap:wrap;gap:1rem 1.5rem}.panel>div{flex:1 1 18rem;min-width:0}
.seen img{width:100%;max-width:26rem;display:block}
.message{padding:.5rem .8rem;border-left:4px solid #d9a21b;background:#fdf3dc;color:#222}
""".replace("CHART", CHART)
)


def _answers(explanation: Explanation) -> str:
    rows = [
        f'<div class="answer"><span>{escape(name)} {100 * p:.1f} %</span><div style="width:{100 * p:.1f}%"></div></div>'
        for name, p in explanation.answers
    ]
    return f'<div class="answers"><b>{escape(explanation.model)}</b>{"".join(rows)}</div>'


def _mask(explanation: Explanation, stage: int, every_block: bool, reach: float) -> str:
    """The overlay of one stage or block, counted from 1; 0 is the picture itself."""
    if stage == 0:
        image = pixels_image(explanation.pixels, "as the model sees it", 416)
        return f'<div class="seen">{image}as the model sees it</div>'
    blocks = shown_blocks(explanation, every_block)
    block = blocks[min(stage, len(blocks)) - 1]
    image = pixels_image(overlay(explanation.shown, block, reach, side=416), f"mask of {block.name}", 416)
    low, high = f"{block.neutral - reach:.2f}", f"{block.neutral + reach:.2f} ({scale_label(block)})"
    return (
        f'<div class="seen">{image}<b>{escape(short_name(block))}</b>: {mask_range(block)}'
        f"{colour_scale(low, high, (LOWERS, NEUTRAL, RAISES))}{_scales(explanation, block)}</div>"
    )


def _scales(explanation: Explanation, block: BlockView) -> str:
    """Which branches were chosen where, in the colours of the bars; nothing where one choice holds for the picture."""
    if not block.by_position:
        return ""
    image = pixels_image(scale_overlay(explanation.shown, block, side=416), f"scales of {block.name}", 416)
    return f"{image}scale chosen at each position, in the colours of the bars"


def _bars(explanation: Explanation) -> str:
    blocks = explanation.blocks
    router = [(short_name(b), b.shares.tolist()) for b in blocks]
    text = f"<b>Scale chosen by the router (%)</b>{stacked_bars(router, blocks[0].branches, BRANCH_COLOURS)}"
    fusion = [(short_name(b), b.fusion.tolist()) for b in blocks if b.fusion is not None]
    if fusion:
        text += f"<b>Squeeze fused from (%)</b>{stacked_bars(fusion, ('average', 'maximum'), FUSION_COLOURS)}"
    return f"<div>{text}</div>"


def panels(explanations: Sequence[Explanation], stage: int, every_block: bool) -> list[str]:
    """What is shown of each of two models, on one colour scale; nothing of a second that is not there."""
    reach = max(reach_of(shown_blocks(e, every_block)) for e in explanations)
    shown = [
        f'{_answers(e)}<div class="panel">{_mask(e, stage, every_block, reach)}{_bars(e)}</div>' for e in explanations
    ]
    return [*shown, ""][:2]


def message(text: str) -> str:
    return f'<div class="message" role="alert">{escape(text)}</div>'


def write_files(explanations: list[Explanation]) -> tuple[str, str]:
    """The picture that `explain` draws, and the arrays, in a folder that Gradio clears."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    picture, arrays = folder / "attention.png", folder / "attention.npz"
    draw(explanations, picture, "attention")
    write_arrays(explanations, arrays)
    return str(picture), str(arrays)
