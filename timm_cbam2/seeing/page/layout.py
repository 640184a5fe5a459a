"""What lies where on the page, and what each button calls."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...errors import UserError, one_line
from ..attention_picture import shown_blocks
from ..views import Explanation
from .panels import STYLE, message, panels, write_files
from .search import ZooSearch
from .served import Models, check_image

__all__ = ["EMBEDDED", "build"]

EMBEDDED = "resnet20_cbam2"
NO_MODEL = "(none)"
HINT = "What the model answers, and what it attends to, is shown here as soon as there is a picture."
EXAMPLES = Path(__file__).parents[2] / "examples"


def _since_6() -> bool:
    """Whether gradio is one that takes the looks of a page where it is launched, and calls what is private so."""
    return int(version("gradio").partition(".")[0]) >= 6


def _calm() -> dict[str, Any]:
    """Whoever presses twice gets one answer at a time, and in the end that to what was asked last."""
    private: dict[str, Any] = dict(api_visibility="private") if _since_6() else dict(api_name=False)
    return dict(trigger_mode="always_last", **private)


def build(model: str) -> tuple[Any, dict[str, Any]]:
    """The page as a `gradio.Blocks`, and the arguments of its `launch` that make it look as it should.

    Args:
        model: shown at first; beside it visitors may choose the embedded one, registered names, and hf-hub: ids.

    Raises:
        UserError: no such model, or one without CBAM2 blocks.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("GRADIO_TEMP_DIR", tempfile.mkdtemp(prefix="timm_cbam2-"))
    import gradio as gr

    models = Models([model, EMBEDDED])
    examples = sorted(EXAMPLES.glob("*.jpg"))
    models.explain(model, str(examples[0]))  # a model that cannot be shown is said before the page is there
    # gradio's own fonts would be fetched from elsewhere
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    looks: dict[str, Any] = dict(theme=theme, css=STYLE)
    made, launched = ({}, {**looks, "footer_links": []}) if _since_6() else (looks, {"show_api": False})
    with gr.Blocks(title="timm_cbam2", analytics_enabled=False, delete_cache=(3600, 3600), **made) as page:
        gr.Markdown("# What does it attend to?\nCBAM2 models: drop a picture in, or take an example.")
        with gr.Tab("Look"), gr.Row():
            asked = _question(gr, models, model, examples)
            shown = _answer(gr)
        with gr.Tab("Zoo") as zoo_tab:
            _zoo(gr, zoo_tab)
        _wire(gr, models, asked, shown)
    return page, launched


def _question(gr: Any, models: Models, model: str, examples: list[Path]) -> SimpleNamespace:
    """The column where a picture and the models are chosen."""
    from .upload import Picture

    with gr.Column(scale=2, min_width=280):
        image = Picture(type="filepath", label="Picture", sources=["upload", "clipboard"], height=260)
        gr.Examples([[str(path)] for path in examples], image, label="Examples", preload=False)
        kinds = dict(allow_custom_value=True, filterable=True)
        hint = "or type a name of the zoo, or hf-hub:user/name"
        first = gr.Dropdown(models.given, value=model, label="Model", info=hint, **kinds)
        other = gr.Dropdown([NO_MODEL, *models.given], value=NO_MODEL, label="Compare with", **kinds)
        button = gr.Button("Look", variant="primary")
    return SimpleNamespace(image=image, first=first, other=other, button=button)


def _answer(gr: Any) -> SimpleNamespace:
    """The column where the answer appears."""
    state = gr.State(None, time_to_live=3600)
    with gr.Column(scale=5, min_width=320):
        words = gr.HTML(message(HINT), elem_id="message")
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
    outputs = [state, words, results, beside, stage, one, two, picture, arrays]
    return SimpleNamespace(state=state, stage=stage, every=every, panels=[one, two], outputs=outputs)


def _zoo(gr: Any, tab: Any) -> None:
    """The table of models, and its search."""
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
    zoo = ZooSearch()

    def find(words: str) -> Any:  # gradio asks whether it is a generator, which an object's method does not tell
        yield from zoo(words)

    # A search ends the listing of all models, which takes long, and waits for no one else's.
    at_once: dict[str, Any] = dict(show_progress="minimal", concurrency_limit=None, **_calm())
    listing = tab.select(find, search, grid, **at_once)
    search.change(find, search, grid, cancels=[listing], **at_once)


def _wire(gr: Any, models: Models, asked: SimpleNamespace, shown: SimpleNamespace) -> None:
    def look(image: str | None, name: str | None, other: str | None, stage: int, every_block: bool) -> list[Any]:
        nothing = [gr.skip(), None, gr.skip(), gr.update(visible=False), *[gr.skip()] * 6]
        if image is None:
            return nothing
        is_image = False
        try:
            check_image(image)
            is_image = True
            wanted = [n.strip() for n in (name, other) if n and n.strip() not in ("", NO_MODEL)]
            if not wanted:
                raise UserError("choose a model")
            explanations = [models.explain(n, image) for n in wanted]
        except UserError as error:
            nothing[2] = message(one_line(error, 300).replace(image, "this file"))
            if not is_image:
                nothing[0] = None  # or the page would show a broken picture
            return nothing
        stages = _stages(explanations, every_block)
        stage = min(stage, stages)
        beside = gr.update(visible=len(explanations) > 1)
        slider = gr.update(maximum=stages, value=stage)
        seen = [*panels(explanations, stage, every_block), *write_files(explanations)]
        return [gr.skip(), explanations, "", gr.update(visible=True), beside, slider, *seen]

    def move(explanations: list[Explanation] | None, stage: int, every_block: bool) -> list[Any]:
        if not explanations:
            return [gr.skip()] * 3
        stages = _stages(explanations, every_block)
        label = "Block" if every_block else "Stage"
        slider = gr.update(maximum=stages, label=f"{label} (0: the picture)")
        return [slider, *panels(explanations, min(stage, stages), every_block)]

    inputs = [asked.image, asked.first, asked.other, shown.stage, shown.every]
    triggers = [asked.button.click, asked.image.change, asked.first.change, asked.other.change]
    gr.on(triggers, look, inputs, [asked.image, *shown.outputs], **_calm())
    triggers = [shown.stage.input, shown.every.input]
    gr.on(
        triggers,
        move,
        inputs=[shown.state, shown.stage, shown.every],
        outputs=[shown.stage, *shown.panels],
        show_progress="hidden",
        **_calm(),
    )


def _stages(explanations: list[Explanation], every_block: bool) -> int:
    return max(len(shown_blocks(e, every_block)) for e in explanations)
