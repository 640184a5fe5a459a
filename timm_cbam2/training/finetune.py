"""Fine-tune any model of the zoo, or any timm model, on labelled images: an Accelerate loop over timm's parts."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import typer

from ..data.images import Images
from ..data.sources import check_apart
from ..errors import UserError, require
from ..hub.zoo import resolve, whole_name
from .automatic import recall
from .folds import cross_validate
from .launch import is_launched, launch, lost_peers, make_accelerator, tracker_names
from .options import DEFAULT_MODEL, Options, takes_options
from .recipe import Applied
from .settings import check_options

__all__ = ["finetune"]


@takes_options
def finetune(**options: Any) -> dict[str, Any]:
    """Fine-tune a model on labelled images; with no options, resnet20_cbam2 on scikit-learn's handwritten digits.

    The run folder gets run.json (the resolved settings), metrics.jsonl, report.html with its pictures, checkpoints/,
    and the models best/ and last/. A run that was stopped (Ctrl-C, SIGTERM: exit code 75) or killed goes on with
    --resume.

    Returns:
        The last line of metrics.jsonl, with "output" and "best_accuracy"; with `folds`, see `cross_validate`.

    Raises:
        UserError: something asked for is not possible; the message says what is.
        Stopped: stopped with Ctrl-C or SIGTERM, after saving; the message says where.
    """
    settings = vars(Options(**options))
    if settings["recipe"] is not None and not isinstance(settings["recipe"], Applied):
        raise UserError(
            "recipe= is for the command line; in Python: finetune(**read_recipe(name)), with read_recipe from "
            "timm_cbam2.training.recipe"
        )
    check_options(settings)
    require("matplotlib")
    _check_trackers(tracker_names(settings["track"]))
    if settings["start_from"] is not None:
        from .start_from import settle_model

        settle_model(settings)
    settings["model"] = settings["model"] or DEFAULT_MODEL
    name, push_to = settings["model"], settings["push_to"]
    resolve(name)
    settings["model"] = whole_name(name)
    if settings["distill_from"] is not None:
        resolve(settings["distill_from"])
        settings["distill_from"] = whole_name(settings["distill_from"])
    if push_to is not None and os.environ.get("RANK", "0") == "0":  # other machines push nothing and need no token
        from ..hub.push import check_push

        check_push(push_to)
    processes = settings["num_processes"]
    if processes is not None and processes > 1 and not is_launched():
        code = launch(processes, settings["cpu"])
        if code:
            raise typer.Exit(code)
        return {}
    if settings["folds"] is not None:
        return cross_validate(settings, lambda of_fold: _train(of_fold, name))
    return _train(settings, name)


def _train(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """Open the data, find the folder, and see the run through, in each of its processes."""
    from accelerate.utils import broadcast_object_list, set_seed

    from .assemble import assemble
    from .begin import begin
    from .prepare import open_images

    images = open_images(settings)
    resume, output = settings["resume"], settings["output"]
    where = resume if output is None and resume not in (None, "auto") else output
    folder = Path(where or _default_output(name, images)).expanduser()
    check_apart(folder, settings["data"])
    accelerator = make_accelerator(settings, str(folder) if settings["track"] else None)
    with lost_peers():
        folder = Path(broadcast_object_list([str(folder)])[0])  # its name has the time in it
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file: give a folder")
        recall(settings, folder)
        set_seed(settings["seed"])
        return begin(assemble(accelerator, settings, images, folder))


def _check_trackers(names: list[str]) -> None:
    """Trackers that Accelerate knows, with their packages installed."""
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind.value != "all"]
    for name in names:
        if name not in known:
            raise UserError(f"--track {name} is unknown; Accelerate has {', '.join(known)}")
        if name in ("tensorboard", "trackio"):
            require(name, extra="track")
        elif importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name} needs its package: run  pip install {name}  and try again")


def _default_output(model: str, images: Images) -> Path:
    name = f"{Path(model).name.rpartition(':')[2]}-{images.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / name
    return path if not path.exists() else path.with_name(f"{name}-{os.getpid()}")
