"""A person's mistake becomes one clear line and exit code 2, the same way in every command."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any, Callable, NoReturn

import typer

__all__ = ["UserError", "one_line", "require", "run_commands"]

PROGRAM = "timm-cbam2"
# typer ships its own copy of click since 0.20 and depended on click before: this finds the class in either.
_ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class UserError(ValueError):
    """What was given, what is allowed, what to do next: a message for a person, on one line."""


def one_line(error: object, limit: int = 600) -> str:
    """The message of `error` on a single line of at most `limit` characters."""
    text = str(error).strip()
    if text.startswith("Caught "):  # raised in a DataLoader worker: torch puts the worker's traceback in the message
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def require(*modules: str, extra: str = "train") -> None:
    """Check that optional packages are installed before any work is done.

    Raises:
        UserError: one is missing; the message says which extra to install.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(f'this needs {", ".join(missing)}: run  pip install "timm_cbam2[{extra}]"  and try again')


def _guarded(function: Callable[..., Any]) -> Callable[..., None]:
    """`function` as a command: its result is dropped, its mistakes are one line on stderr."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            print(f"{PROGRAM}: {one_line(error)}", file=sys.stderr, flush=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            print(f"{PROGRAM}: {one_line(stop) if stop.args else 'interrupted'}", file=sys.stderr, flush=True)
            raise typer.Exit(130) from None

    return command


def _given(error: Any) -> str:
    """What stood on the command line for the option that `error` is about, which typer leaves out."""
    for option in getattr(getattr(error, "param", None), "opts", ()):
        for word, after in zip(sys.argv[1:], [*sys.argv[2:], ""]):
            value = after if word == option else word.partition("=")[2] if word.startswith(f"{option}=") else ""
            if value:
                return f"; given: {value}"
    return ""


def run_commands(*functions: Callable[..., Any], help: str | None = None) -> NoReturn:
    """Parse `sys.argv`, call one of `functions` (typer-annotated; a single one needs no verb) and exit.

    Exit codes: 0 done, 2 a mistake in what was asked, 130 interrupted, 1 a bug of ours (with its traceback).
    """
    options = {"context_settings": {"help_option_names": ["-h", "--help"]}}
    app = typer.Typer(help=help, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **options)
    for function in functions:
        app.command(**options)(_guarded(function))
    if len(functions) > 1:

        @app.callback(invoke_without_command=True, help=help)
        def _verbs(context: typer.Context) -> None:
            if context.invoked_subcommand is None:
                print(context.get_help())

    try:
        code = app(standalone_mode=False)
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else PROGRAM
        print(f"{PROGRAM}: {one_line(error.format_message())}{_given(error)} (see: {where} --help)", file=sys.stderr)
        code = error.exit_code
    sys.exit(code or 0)
