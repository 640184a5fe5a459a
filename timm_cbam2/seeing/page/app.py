"""A web page to drop pictures in: what a model answers, what it attends to, two models compared, and the zoo.

The same file is the app.py of a Hugging Face Space, where it lies beside the package and, in model/, a model to show.
"""

from __future__ import annotations

import os
import tempfile
from html import escape
from pathlib import Path
from typing import Annotated, Any, Iterator, Sequence

import typer

from timm_cbam2.errors import UserError, one_line, require, run_commands
from timm_cbam2.hub.zoo import meaning, names, pretrained_tags, resolve, row
from timm_cbam2.seeing.attention_picture import (
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
    short_name,
    shown_blocks,
)
from timm_cbam2.seeing.explain import write_arrays
from timm_cbam2.seeing.html_parts import BARS_STYLE, colour_scale, pixels_image, stacked_bars
from timm_cbam2.seeing.page.served import MAX_BYTES, Models, check_image  # absolute: on a Space this file is no module
from timm_cbam2.seeing.views import Explanation

__all__ = ["app", "build"]

EMBEDDED = "resnet20_cbam2"
NO_MODEL = "(none)"
HINT = "What the model answers, and what it attends to, is shown here as soon as there is a picture."
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
    image = pixels_image(overlay(explanation.pixels, block, reach, side=416), f"mask of {block.name}", 416)
    low, high = f"{block.neutral - reach:.2f}", f"{block.neutral + reach:.2f} ({scale_label(block)})"
    return (
        f'<div class="seen">{image}<b>{escape(short_name(block))}</b>: {mask_range(block)}'
        f"{colour_scale(low, high, (LOWERS, NEUTRAL, RAISES))}</div>"
    )


def _bars(explanation: Explanation) -> str:
    blocks = explanation.blocks
    router = [(short_name(b), b.attention.router_weights[0].tolist()) for b in blocks]
    text = f"<b>Scale chosen by the router (%)</b>{stacked_bars(router, blocks[0].branches, BRANCH_COLOURS)}"
    fusion = [(short_name(b), b.fusion.tolist()) for b in blocks if b.fusion is not None]
    if fusion:
        text += f"<b>Squeeze fused from (%)</b>{stacked_bars(fusion, ('average', 'maximum'), FUSION_COLOURS)}"
    return f"<div>{text}</div>"


def _panels(explanations: Sequence[Explanation], stage: int, every_block: bool) -> list[str]:
    """What is shown of each of two models, on one colour scale; nothing of a second that is not there."""
    reach = max(reach_of(shown_blocks(e, every_block)) for e in explanations)
    panels = [
        f'{_answers(e)}<div class="panel">{_mask(e, stage, every_block, reach)}{_bars(e)}</div>' for e in explanations
    ]
    return [*panels, ""][:2]


def _message(text: str) -> str:
    return f'<div class="message" role="alert">{escape(text)}</div>'


def _files(explanations: list[Explanation]) -> tuple[str, str]:
    """The picture that `explain` draws, and the arrays, in a folder that Gradio clears."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]))
    picture, arrays = folder / "attention.png", folder / "attention.npz"
    draw(explanations, picture, "attention")
    write_arrays(explanations, arrays)
    return str(picture), str(arrays)


def build(model: str) -> Any:
    """The page as a `gradio.Blocks`, ready to launch.

    Args:
        model: shown at first; beside it visitors may choose the embedded one, registered names, and hf-hub: ids.

    Raises:
        UserError: no such model, or one without CBAM2 blocks.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="timm_cbam2-"))
    import gradio as gr

    from timm_cbam2.seeing.page.upload import Picture

    models = Models([model, EMBEDDED])
    examples = sorted(Path(__import__("timm_cbam2").__file__).parent.joinpath("examples").glob("*.jpg"))
    models.explain(model, str(examples[0]))  # a model that cannot be shown is said before the page is there

    def look(image: str | None, name: str | None, other: str | None, stage: int, every_block: bool) -> list[Any]:
        nothing = [gr.skip(), None, gr.skip(), gr.update(visible=False), *[gr.skip()] * 6]
        if image is None:
            return nothing
        is_image = False
        try:
            check_image(image)
            is_image = True
            asked = [n.strip() for n in (name, other) if n and n.strip() not in ("", NO_MODEL)]
            if not asked:
                raise UserError("choose a model")
            explanations = [models.explain(n, image) for n in asked]
        except UserError as error:
            nothing[2] = _message(one_line(error, 300).replace(image, "this file"))
            if not is_image:
                nothing[0] = None  # or the page would show a broken picture
            return nothing
        stages = max(len(shown_blocks(e, every_block)) for e in explanations)
        stage = min(stage, stages)
        return [
            gr.skip(),
            explanations,
            "",
            gr.update(visible=True),
            gr.update(visible=len(explanations) > 1),
            gr.update(maximum=stages, value=stage),
            *_panels(explanations, stage, every_block),
            *_files(explanations),
        ]

    def move(explanations: list[Explanation] | None, stage: int, every_block: bool) -> list[Any]:
        if not explanations:
            return [gr.skip()] * 3
        stages = max(len(shown_blocks(e, every_block)) for e in explanations)
        label = "Block" if every_block else "Stage"
        slider = gr.update(maximum=stages, label=f"{label} (0: the picture)")
        return [slider, *_panels(explanations, min(stage, stages), every_block)]

    rows: dict[str, list[Any]] = {}  # each model is built to be counted, so they come one by one

    def search_zoo(search: str) -> Iterator[list[list[Any]]]:
        words = search.lower().split()

        def fits(*cells: Any) -> bool:
            return all(word in " ".join(map(str, cells)).lower() for word in words)

        def found() -> list[list[Any]]:
            return [rows[name] for name in known if name in rows and fits(*rows[name])]

        known = names()
        tags = {name: tuple(pretrained_tags(name)) for name in known}
        asked = [name for name in known if fits(name, meaning(tags[name]), *tags[name])]
        if any(word.replace(".", "", 1).isdigit() for word in words):  # may be a number of parameters, not known yet
            asked += known
        yield found()
        for name in asked:
            if name not in rows:
                model = row(name)
                rows[name] = [name, round(model.parameters / 1e6, 2), model.pretrained, ", ".join(model.tags)]
                if len(rows) % 10 == 0:
                    yield found()
        yield found()

    with gr.Blocks(title="timm_cbam2", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# What does it attend to?\nCBAM2 models: drop a picture in, or take an example.")
        state = gr.State(None, time_to_live=3600)
        with gr.Tab("Look"):
            with gr.Row():
                with gr.Column(scale=2, min_width=280):
                    image = Picture(type="filepath", label="Picture", sources=["upload", "clipboard"], height=260)
                    gr.Examples([[str(path)] for path in examples], image, label="Examples", preload=False)
                    kinds = dict(allow_custom_value=True, filterable=True)
                    hint = "or type a name of the zoo, or hf-hub:user/name"
                    first = gr.Dropdown(models.given, value=model, label="Model", info=hint, **kinds)
                    other = gr.Dropdown([NO_MODEL, *models.given], value=NO_MODEL, label="Compare with", **kinds)
                    button = gr.Button("Look", variant="primary")
                with gr.Column(scale=5, min_width=320):
                    message = gr.HTML(_message(HINT), elem_id="message")
                    with gr.Column(visible=False) as results:
                        with gr.Row():
                            stage = gr.Slider(0, 3, value=2, step=1, label="Stage (0: the picture)", elem_id="stage")
                            every = gr.Checkbox(False, label="every block")
                        with gr.Row():
                            with gr.Column(min_width=280):
                                one = gr.HTML(elem_id="first")
                            with gr.Column(min_width=280, visible=False) as beside:
                                two = gr.HTML(elem_id="second")
                        with gr.Row():
                            arrays = gr.DownloadButton("Download the arrays (.npz)", elem_id="arrays")
                            picture = gr.DownloadButton("Download a picture (.png)", elem_id="picture")
        with gr.Tab("Zoo") as zoo_tab:
            search = gr.Textbox(label="Search", placeholder="resnet50 a1", elem_id="search")
            grid = gr.Dataframe(
                headers=["model", "parameters (M)", "pretrained=True", "tags, the first is the default"],
                datatype=["str", "number", "str", "str"],
                interactive=False,
                wrap=True,
                column_widths=["22%", "13%", "25%", "40%"],
                max_height=700,
                elem_id="zoo",
            )
        # Whoever presses twice gets one answer at a time, and in the end that to what was asked last.
        calm: dict[str, Any] = dict(trigger_mode="always_last", api_visibility="private")
        outputs = [image, state, message, results, beside, stage, one, two, picture, arrays]
        triggers = [button.click, image.change, first.change, other.change]
        gr.on(triggers, look, [image, first, other, stage, every], outputs, **calm)
        triggers = [stage.input, every.input]
        gr.on(triggers, move, [state, stage, every], [stage, one, two], show_progress="hidden", **calm)
        # A search ends the listing of all models, which takes long, and waits for no one else's.
        at_once: dict[str, Any] = dict(show_progress="minimal", concurrency_limit=None, **calm)
        listing = zoo_tab.select(search_zoo, search, grid, **at_once)
        search.change(search_zoo, search, grid, cancels=[listing], **at_once)
    return page


def app(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Run or model folder, hf-hub: id, or registered name.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; this machine only by default.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; the first free one from 7860 on.")] = None,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a page to look at what models attend to; with no arguments, the embedded resnet20_cbam2, without a network.

    Raises:
        UserError: no such model, or no such port to be had.
    """
    require("gradio", "matplotlib", extra="app")
    default_host = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"
    beside = sorted((Path(__file__).parent / "model").glob("*/config.json"))
    name = model or (os.path.relpath(beside[0].parent) if beside else EMBEDDED)
    resolve(name)
    page = build(name)
    import gradio as gr

    # gradio's own fonts would be fetched from elsewhere
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(
            server_name=host or os.environ.get("GRADIO_SERVER_NAME") or default_host,
            server_port=port,
            inbrowser=browser,
            share=False,
            ssr_mode=False,
            max_file_size=MAX_BYTES,
            state_session_capacity=100,
            theme=theme,
            css=STYLE,
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"{one_line(error, 200)}: give another --port or --host") from error
    print(f"{name}: {page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    run_commands(app)
