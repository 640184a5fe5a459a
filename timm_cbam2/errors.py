"""A person's mistake becomes one clear line and exit code 2, the same way in every command."""

from __future__ import annotations

import ast
import errno
import functools
import gc
import importlib.util
import os
import re
import sys
import traceback
from typing import Any, Callable, Mapping, NoReturn, Sequence

import typer
from typer.core import TyperCommand

from .terminal import visible

__all__ = ["Stopped", "UserError", "command_line", "one_line", "parse_pairs", "require", "run_commands"]

PROGRAM = "timm-cbam2"
STOPPED = 75  # exit code of a run that was told to stop and can be resumed; BSD's EX_TEMPFAIL
QUIET = "TIMM_CBAM2_LAUNCHED"  # set for the processes of --num-processes: the launcher says what went wrong, once
OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # not mistakes of ours
# typer ships its own copy of click since 0.20 and depended on click before: this finds the class in either.
_ClickException = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class UserError(ValueError):
    """What was given, what is allowed, what to do next: a message for a person, on one line."""


class Stopped(KeyboardInterrupt):
    """A run was told to stop (Ctrl-C, SIGTERM), has saved what it had and can be resumed; the message says how."""


def one_line(error: object, limit: int = 600) -> str:
    """The message of `error` on a single line of at most `limit` characters."""
    text = str(error).strip()
    if text.startswith("Caught "):  # raised in a DataLoader worker: torch puts the worker's traceback in the message
        text = text.splitlines()[-1].partition(": ")[2]
    text = visible(" ".join(text.split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def require(*modules: str, extra: str = "train") -> None:
    """Check that optional packages are installed before any work is done.

    Raises:
        UserError: one is missing; the message says which extra to install.
    """
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(f'this needs {", ".join(missing)}: run  pip install "timm_cbam2[{extra}]"  and try again')


WORDS = {"true": "True", "false": "False"}


def parse_pairs(flag: str, given: Sequence[str] | Mapping[str, Any] | None, example: str) -> dict[str, Any]:
    """["a=1", "b=x"] as {"a": 1, "b": "x"}: values are Python literals, or else text, as in timm's train.py; true
    and false in any case are Python's.

    Raises:
        UserError: one has no "="; the message shows an `example` of what `flag` takes.
    """
    if isinstance(given, Mapping):
        return dict(given)
    pairs: dict[str, Any] = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{flag} {text}: write KEY=VALUE, such as {example}")
        try:
            pairs[key.strip()] = ast.literal_eval(WORDS.get(value.strip().lower(), value))
        except (ValueError, SyntaxError):
            pairs[key.strip()] = value
    return pairs


def _guarded(function: Callable[..., Any]) -> Callable[..., None]:
    """`function` as a command: its result is dropped, its mistakes are one line on stderr."""

    @functools.wraps(function)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            _say(error)
            _release(error)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in OF_THE_MACHINE:
                raise
            where = error.filename or "what was to be written"
            _say(UserError(f"{where}: {error.strerror}; make room or give another place, then try again"))
            raise typer.Exit(2) from None
        except KeyboardInterrupt as stop:
            if QUIET not in os.environ or os.environ.get("RANK") == "0":
                print(f"{PROGRAM}: {one_line(stop) if stop.args else 'interrupted'}", file=sys.stderr, flush=True)
            _release(stop)
            raise typer.Exit(STOPPED if isinstance(stop, Stopped) else 130) from None

    # What it returns and raises is for those who call it.
    command.__doc__ = re.split(r"\n\s*(?:Returns|Raises):", function.__doc__ or "")[0]
    return command


def _release(error: BaseException) -> None:
    """Let go of what the failed call held: data loaders then end their workers, which exit would kill noisily."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()


def _say(error: UserError) -> None:
    """One line on stderr; from one of several processes to torch's launcher instead, which is asked for it."""
    if QUIET in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    else:
        print(f"{PROGRAM}: {one_line(error, 2000)}", file=sys.stderr, flush=True)


_arguments: list[str] | None = None


def command_line() -> list[str] | None:
    """What was typed after the verb, when a command line is what runs; otherwise None."""
    return _arguments


class _Command(TyperCommand):
    """A command whose help is grouped by `rich_help_panel`, whose repeatable options take several values, and whose
    `--output` is `-o` for short as in every other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if "--output" in parameter.opts and "-o" not in parameter.opts:
                parameter.opts.append("-o")

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or kind, []).append(record)
        for title, records in sorted(panels.items(), key=lambda item: item[0] == "Options"):
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--cbam2 a=1 b=2` becomes `--cbam2 a=1 --cbam2 b=2`."""
        repeatable = {flag for p in self.params if getattr(p, "multiple", False) for flag in p.opts}
        spread: list[str] = []
        flag, first = "", False
        for word in args:
            if flag and not first and not word.startswith("-") and "=" in word:
                spread += [flag, word]
                continue
            first = word in repeatable
            flag = word if first else flag if spread and spread[-1] == flag else ""
            spread.append(word)
        return super().parse_args(ctx, spread)


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

    Exit codes: 0 done, 2 a mistake in what was asked, 75 told to stop, saved and resumable, 130 interrupted, 1 a bug of
    ours (with its traceback).
    """
    global _arguments
    # What was imported stays: garbage collection, also the one at exit, need not look through all of it again.
    gc.freeze()
    _arguments = sys.argv[1:] if len(functions) == 1 else sys.argv[2:]
    options = {"context_settings": {"help_option_names": ["-h", "--help"]}}
    app = typer.Typer(help=help, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, **options)
    for function in functions:
        app.command(cls=_Command, **options)(_guarded(function))
    if len(functions) > 1:

        @app.callback(invoke_without_command=True, help=help)
        def _verbs(context: typer.Context) -> None:
            if context.invoked_subcommand is None:
                print(context.get_help())

    try:
        code = app(standalone_mode=False)
    except UserError as error:  # while the command line was read
        _say(error)
        code = 2
    except _ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else PROGRAM
        text = f"{PROGRAM}: {one_line(error.format_message())}{visible(_given(error))} (see: {where} --help)"
        print(text, file=sys.stderr)
        code = error.exit_code
    sys.exit(code or 0)
