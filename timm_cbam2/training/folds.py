"""Cross-validation: `--folds K` trains K runs, each validated on another K-th of the images, and sums them up."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np

from ..errors import Stopped, UserError, require
from ..files import write_whole
from ..hub.run_folder import best_row, read_metrics, score, score_name
from ..terminal import say

__all__ = ["cross_validate", "read_folds"]

FILE = "folds.json"


def read_folds(folder: Path) -> dict[str, Any] | None:
    """The settings of the cross-validation in `folder`, with "results" of the folds that are done; None without one.

    Raises:
        UserError: its file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["folds"], int) and isinstance(found["results"], list):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged: go on with each of its runs by itself, such as --resume {folder / 'fold-1'}")


def cross_validate(settings: dict[str, Any], train: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Train and validate on each fold in turn; folds that are done stay as they are.

    Args:
        settings: of the runs, with "folds".
        train: sees a run with given settings through.

    Returns:
        "scores" of the folds (the best accuracy of each or, with several labels an image, mean average precision),
        their "mean", the "interval" of 95 % and "output".

    Raises:
        UserError: the folder holds something else, and see `finetune`.
        Stopped: a signal came; everything is saved.
    """
    require("sklearn")
    count, main = settings["folds"], os.environ.get("RANK", "0") == "0"
    folder = _folder(settings)
    before = read_folds(folder)
    if before is None:
        before = {**settings, "output": str(folder), "results": []}
        if main:
            _begin(folder, before)
    elif before["folds"] != count:
        raise UserError(
            f"cannot resume: --folds was {before['folds']} and is now {count}: start anew in another folder"
        )
    elif settings["resume"] is None and main:
        raise UserError(f"--output {folder} already holds a cross-validation: go on with it with --resume auto")
    results = before["results"]
    for number in range(len(results) + 1, count + 1):
        if main:
            say("", f"fold {number} of {count}")
        place = folder / f"fold-{number}"
        run = {**settings, "folds": None, "val_split": f"fold:{number}/{count}", "output": place, "resume": "auto"}
        try:
            train(run)
        except Stopped as stop:
            raise Stopped(
                f"fold {number} of {count}: {stop}; for this and the folds after it go on with  timm-cbam2 finetune "
                f"--resume {shlex.quote(str(folder))}"
            ) from stop
        results.append(best_row(read_metrics(place)))
        if main:
            write_whole(folder / FILE, (json.dumps(before, indent=2, default=str) + "\n").encode())
    summary = _summary(results) | {"output": str(folder)}
    if main:
        write_whole(folder / FILE, (json.dumps({**before, **summary}, indent=2, default=str) + "\n").encode())
        _show(summary, score_name(results[0]), folder)
    return summary


def _folder(settings: Mapping[str, Any]) -> Path:
    resume, output = settings["resume"], settings["output"]
    where = resume if output is None and resume not in (None, "auto") else output
    if where is not None:
        return Path(where).expanduser()
    if "WORLD_SIZE" in os.environ:  # each process would name it by its own clock
        raise UserError("--folds in several processes needs a place that all agree on: give --output FOLDER")
    model, data = (Path(str(settings[name])).name.rpartition(":")[2] for name in ("model", "data"))
    return Path("runs") / f"{model}-{data}-folds-{time.strftime('%Y%m%d-%H%M%S')}"


def _begin(folder: Path, content: Mapping[str, Any]) -> None:
    """Write the settings into a folder that holds nothing else.

    Raises:
        UserError: it does, or it cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()) or folder.is_file():
        raise UserError(f"--output {folder} holds something already: --folds makes its runs in a folder of its own")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, (json.dumps(content, indent=2, default=str) + "\n").encode())
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}): give another folder") from error


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over folds and its 95 % interval by Student's t."""
    from scipy.stats import sem, t

    scores = [score(row) for row in results]
    mean, error = float(np.mean(scores)), float(sem(scores))
    half = float(t.ppf(0.975, len(scores) - 1)) * error
    return {"scores": scores, "mean": mean, "interval": [mean - half, mean + half]}


def _show(summary: Mapping[str, Any], what: str, folder: Path) -> None:
    half = summary["interval"][1] - summary["mean"]
    each = ", ".join(f"{100 * s:.2f}" for s in summary["scores"])
    say(
        "",
        f"cross-validation: {what} {100 * summary['mean']:.2f} ± {100 * half:.2f} % (mean and 95 % interval over "
        f"{len(summary['scores'])} folds: {each}; they share images to train on, so the interval is a rough one)",
        f"  numbers  {folder / FILE}",
        f"  runs     {folder / 'fold-1'} and so on",
    )
