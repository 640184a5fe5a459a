"""What a run settles by itself once, such as `--lr auto`: said, and remembered by its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Mapping

import typer

from ..errors import UserError
from ..files import write_whole
from ..hub.run_folder import read_settings

__all__ = ["AUTO", "FILE", "number_or_auto", "recall", "remember", "said"]

AUTO = "auto"
FILE = "auto.json"


def number_or_auto(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A parser for the command line: a number of that kind, or "auto"."""

    def parse(value: Any) -> Any:
        if value == AUTO:
            return AUTO
        try:
            return kind(value)
        except ValueError as error:
            raise typer.BadParameter(f"'{value}' is neither a number nor auto") from error

    return parse


def recall(settings: dict[str, Any], folder: Path) -> None:
    """Fill in, in place, what an earlier part of the run in `folder` had found or settled.

    Raises:
        UserError: its file is damaged.
    """
    path = folder / FILE
    if settings["resume"] is None:
        return
    if settings["attention_lr_scale"] is None:
        recorded = _recorded(folder)
        if recorded.get("model") == settings["model"]:  # otherwise the run is refused, and should say why
            settings["attention_lr_scale"] = recorded.get("attention_lr_scale")  # whatever is the default now
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        chosen = {name: found[name]["chosen"] for name in found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: remove it, and give --lr and --batch-size as they stand in {folder / 'run.json'}"
        ) from error
    for name, value in chosen.items():
        if settings.get(name) == AUTO:
            settings[name] = value


def _recorded(folder: Path) -> dict[str, Any]:
    """What run.json says, nothing where there is none that can be read."""
    try:
        return read_settings(folder) or {}
    except UserError:
        return {}


def remember(folder: Path, found: Mapping[str, Any]) -> None:
    """Write what was found, if anything was."""
    if found:
        write_whole(folder / FILE, (json.dumps(found, indent=1) + "\n").encode())


def said(found: Mapping[str, Any]) -> list[str]:
    """A line for each thing found."""
    notes = []
    if "batch_size" in found:
        size = found["batch_size"]
        notes.append(f"--batch-size auto: {size['chosen']} ({size['why']})")
    if "lr" in found:
        lr = found["lr"]
        best = lr["lrs"][lr["losses"].index(min(lr["losses"]))]
        notes.append(
            f"--lr auto: {lr['chosen']:g}, a tenth of the rate with the lowest loss ({best:.2g}) among "
            f"{len(lr['lrs'])} from {lr['lrs'][0]:.0e} to {lr['lrs'][-1]:.2g}; the curve is in {FILE} and the report"
        )
    return notes
