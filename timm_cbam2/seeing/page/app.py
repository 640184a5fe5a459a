"""A web page to drop pictures in: what a model answers, what it attends to, two models compared, and the zoo.

The same file is the app.py of a Hugging Face Space, where it lies beside the package and, in model/, a model to show:
its imports are absolute.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from timm_cbam2.errors import UserError, one_line, require, run_commands
from timm_cbam2.hub.zoo import resolve
from timm_cbam2.seeing.page.layout import EMBEDDED, build
from timm_cbam2.seeing.page.served import MAX_BYTES
from timm_cbam2.terminal import say

__all__ = ["app"]


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
    host = host or os.environ.get("GRADIO_SERVER_NAME") or default_host
    _check_host(host)
    page, looks = build(name)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=browser,
            share=False,
            ssr_mode=False,
            max_file_size=MAX_BYTES,
            state_session_capacity=100,
            quiet=True,
            prevent_thread_lock=True,
            **looks,
        )
    except OSError as error:
        raise UserError(f"{one_line(error, 200)}: give another --port or --host") from error
    say(f"{name}: {page.local_url} (Ctrl-C ends it)")
    page.block_thread()


def _check_host(host: str) -> None:
    """Refuse an address that is none of this machine's, before the server says so in lines of its own."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"--host {host}: {reason}; give an address of this machine, such as 127.0.0.1") from error


if __name__ == "__main__":
    run_commands(app)
