"""An image input that hands over the uploaded file unopened.

gradio writes a .pyi beside the file of each component's class; it is kept in the repository, so that nothing is written
where the package is installed.
"""

import gradio as gr

__all__ = ["Picture"]

from gradio.events import Dependency

class Picture(gr.Image):
    """Gives the file's path: what is no image, or too large, is then refused in our words, before it is decoded."""

    is_template = True  # shown by the browser as gradio's own Image

    def preprocess(self, payload):
        """The path of the file, None without one."""
        return payload.path if payload is not None else None
    from typing import Callable, Literal, Sequence, Any, TYPE_CHECKING
    from gradio.blocks import Block
    if TYPE_CHECKING:
        from gradio.components import Timer
        from gradio.components.base import Component