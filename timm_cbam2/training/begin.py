"""Begin a run or go on with one: its lock, its checkpoint, run.json, and what a person is told before it trains."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed

from ..errors import UserError, command_line
from ..terminal import say
from .automatic import remember
from .checkpoint import read_info
from .finish import share_trained
from .guards import lock
from .launch import not_divided, slow_precision
from .loop import Run
from .prepare import check_resumable
from .settings import OF_THE_CALL, resolved_text
from .snapshot import fitting

__all__ = ["begin"]


def begin(run: Run) -> dict[str, Any]:
    """Train `run` from its newest checkpoint, if it has one, to its end.

    Returns:
        The last line of metrics.jsonl, with "output" and "best_accuracy".

    Raises:
        UserError: the folder is in use or holds another run, or the checkpoint does not fit; and see `Run.train`.
        Stopped: a signal came; everything is saved.
    """
    accelerator, settings = run.accelerator, run.settings
    held = _on_main(accelerator, lambda: lock(run.folder))
    path, batch, notes = _where_to_begin(run)
    if accelerator.is_main_process:
        _write_settings(run)
    _announce(run, path, notes)
    if settings["track"]:
        training = {k: str(v) for k, v in settings.items() if k not in OF_THE_CALL}
        accelerator.init_trackers("timm_cbam2", config=training)
    set_seed(settings["seed"], device_specific=True)  # dropout differs between processes
    if path is not None:
        run.resume(path, batch)
        _say_once(run, f"going on from {path}: epoch {run.at.epoch}, step {run.at.updates}")
    try:
        return run.train()
    finally:
        if held is not None:
            held.close()


def _say_once(run: Run, line: str) -> None:
    if run.accelerator.is_local_main_process:
        say(line)


def _announce(run: Run, path: Path | None, notes: list[str]) -> None:
    """Say what will be trained on what, and every note about it."""
    accelerator, settings, images = run.accelerator, run.settings, run.images
    trainable, parameters = run.trained
    processes = run.info["processes"]
    for note in (
        *images.notes,
        *not_divided(accelerator),
        *slow_precision(accelerator),
        *([] if path else run.notes),
        *notes,
    ):
        _say_once(run, f"note: {note}")
    if settings["recipe"] is not None:
        _say_once(run, f"recipe {settings['recipe']}: {resolved_text(settings)}")
    start = "its checkpoint's" if path else "trained" if settings["pretrained"] else "random"
    part = f" ({share_trained(settings['train'], trainable, parameters)})" if trainable < parameters else ""
    _say_once(
        run,
        f"{settings['model']}: {parameters / 1e6:.2f} M parameters{part}, {start} weights; "
        f"{images.name}: {len(run.parts['train'])} images to train on, {len(run.parts['val'])} to validate, "
        f"{len(images.classes)} classes, {'x'.join(map(str, run.side))} pixels; on {accelerator.device}"
        + (f" in {processes} processes" if processes > 1 else ""),
    )


def _write_settings(run: Run) -> None:
    """Write run.json."""
    folder, settings, images = run.folder, run.settings, run.images
    trainable, parameters = run.trained
    content = {
        **settings,
        "data": _whole_path(settings["data"]),
        "output": str(folder),
        "command": _command(),
        "parameters": parameters,
        "trainable_parameters": trainable,
        "classes": images.classes,
        "images": {split: len(samples) for split, samples in images.splits.items()},
        "data_config": run.config,
        "processes": run.info["processes"],
        "device": str(run.accelerator.device),
        "distributed_type": run.accelerator.distributed_type.value,
        "versions": run.info["versions"],
        "steps_per_epoch": run.updates_per_epoch,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".run.json.tmp"
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        temporary.replace(folder / "run.json")
        remember(folder, run.found)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}): give another folder") from error


def _on_main(accelerator: Any, act: Any) -> Any:
    """`act()` on the main process; what it raises is raised on all."""
    result, problem = None, None
    if accelerator.is_main_process:
        try:
            result = act()
        except UserError as error:
            problem = str(error)
    problem = broadcast_object_list([problem])[0]
    if problem is not None:
        raise UserError(problem)
    return result


def _where_to_begin(run: Run) -> tuple[Path | None, int | None, list[str]]:
    """The checkpoint to go on from (None: begin anew), its batch, and what a person should know about it."""
    folder, resume, info = run.folder, run.settings["resume"], run.info

    def decide() -> tuple[str | None, int | None, list[str]]:
        used = [n for n in ("metrics.jsonl", "best", "last", "checkpoints") if (folder / n).exists()]
        if resume is None:
            # A run never writes over another one; settings without any result are those of a run that never began.
            if used:
                raise UserError(
                    f"--output {folder} already holds a run ({', '.join(used)}): go on with it with --resume auto, "
                    "give another folder, or remove it"
                )
            return None, None, []
        path, notes = run.checkpoints.newest()
        if path is None:
            # Killed before its first checkpoint, a run begins anew; another one's results are not written over.
            if "metrics.jsonl" in used and not _is_same_run(folder, info):
                raise UserError(
                    f"--resume {resume}: {folder} has other settings' results and no checkpoint: give another folder"
                )
            if used or resume != "auto":
                notes.append(f"{folder} has no checkpoint yet, so the run begins anew")
            if "metrics.jsonl" in used:
                run.metrics.resume([])
            return None, None, notes
        saved = read_info(path)
        with fitting(path / "checkpoint.json"):
            changed, batch = check_resumable(saved, info, saved["batch"])
        return str(path), batch, notes + changed

    found = _on_main(run.accelerator, decide)
    path, batch, notes = broadcast_object_list([found])[0]
    return Path(path) if path else None, batch, notes


def _is_same_run(folder: Path, info: dict[str, Any]) -> bool:
    """Whether run.json of `folder` tells of the training that `info` tells of."""
    try:
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    now = {**info["settings"], "data": _whole_path(info["settings"]["data"]), "processes": info["processes"]}
    return all(saved.get(name) == value for name, value in now.items())


def _whole_path(data: str) -> str:
    return data if not Path(data).expanduser().exists() else str(Path(data).expanduser().resolve())


def _command() -> str | None:
    """What was typed, None from Python."""
    arguments = command_line()
    return None if arguments is None else shlex.join(["timm-cbam2", "finetune", *arguments])
