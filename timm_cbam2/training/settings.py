"""The options of a run: KEY=VALUE pairs, recipes, and the mistakes that need neither data nor model to be seen."""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Any, Mapping

from timm.optim import list_optimizers

from ..data.balance import BALANCE
from ..data.images import parse_fold, parse_val_split
from ..data.loading import AUGMENT
from ..errors import UserError, one_line, parse_pairs
from ..models.options_cbam2 import complete_options
from .automatic import AUTO
from .options import Options

__all__ = ["check_options", "resolved_text", "save_interval"]

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
TRAIN = ("all", "attention", "attention+head", "head")
PRECISIONS = ("no", "fp16", "bf16")
DROPS = {"drop": "drop_rate", "drop_path": "drop_path_rate"}  # options that are arguments of timm.create_model
PAIRS = ("model_kwargs", "cbam2", "opt_kwargs")  # options written KEY=VALUE, as often as need be
EXAMPLES = {"model_kwargs": "output_stride=16", "cbam2": "gate=sigmoid", "opt_kwargs": "eps=1e-6"}
# What finetune decides for a model, or what would make it another kind of thing.
NOT_OF_THE_MODEL = (
    "num_classes", "pretrained", "features_only", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay",
)  # fmt: skip
DEFAULT_LR = {"scratch": 2e-3, "pretrained": 5e-4}  # for AdamW, the default optimizer
RANGES = {  # what typer's own limits cannot say, or, in a call from Python, are not asked about
    "epochs": ("at least 1", lambda value: value >= 1),
    "batch_size": ("at least 2", lambda value: value >= 2),
    "accumulate": ("at least 1", lambda value: value >= 1),
    "aug_repeats": ("at least 1", lambda value: value >= 1),
    "folds": ("at least 2", lambda value: value >= 2),
    "patience": ("at least 1", lambda value: value >= 1),
    "keep": ("at least 1", lambda value: value >= 1),
    "label_smoothing": ("0 to 0.9, such as 0.1", lambda value: 0 <= value <= 0.9),
    "random_erasing": ("0 to 1, such as 0.25", lambda value: 0 <= value <= 1),
    "ema": ("at least 0 and less than 1, such as 0.999", lambda value: 0 <= value < 1),
    "layer_decay": ("above 0 and up to 1, such as 0.75", lambda value: 0 < value <= 1),
    "clip_grad": ("a number above 0, such as 1", lambda value: 0 < value < math.inf),
    "weight_decay": ("a number from 0 on, such as 0.05", lambda value: 0 <= value < math.inf),
    "momentum": ("at least 0 and less than 1, such as 0.9", lambda value: 0 <= value < 1),
    "attention_lr_scale": ("a number from 0 on, such as 2", lambda value: 0 <= value < math.inf),
    "attention_weight_decay": ("a number from 0 on, such as 0", lambda value: 0 <= value < math.inf),
    "attention_delay_epochs": ("a number from 0 on, such as 5", lambda value: 0 <= value < math.inf),
    "warmup_epochs": ("a number from 0 on, such as 1", lambda value: 0 <= value < math.inf),
    "mixup": ("a number from 0 on, such as 0.2", lambda value: 0 <= value < math.inf),
    "cutmix": ("a number from 0 on, such as 1", lambda value: 0 <= value < math.inf),
    "distill_alpha": ("0 to 1, such as 0.5", lambda value: 0 <= value <= 1),
    "distill_temperature": ("a number above 0, such as 2", lambda value: 0 < value < math.inf),
    "drop": ("at least 0 and less than 1, such as 0.2", lambda value: 0 <= value < 1),
    "drop_path": ("at least 0 and less than 1, such as 0.1", lambda value: 0 <= value < 1),
    "bce_target_threshold": ("at least 0 and less than 1, such as 0.2", lambda value: 0 <= value < 1),
}
SETTLED = {"attention_lr_scale": 1.0}  # what is usual where nobody said
# Of one call, not of the training: a resumed run may have others.
OF_THE_CALL = (
    "output", "resume", "recipe", "num_processes", "workers", "save_every", "keep", "track", "push_to", "folds",
)  # fmt: skip


def save_interval(text: str) -> tuple[int, str]:
    """ "500" or "500 steps" as (500, "steps"), "2 epochs" as (2, "epochs"), "never" as (0, "epochs").

    Raises:
        UserError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+)\s*(steps?|epochs?)?\s*", text)
    if text == "never" or found and int(found[1]) == 0:
        return 0, "epochs"
    if not found:
        raise UserError(f"--save-every {text}: give optimizer steps such as 500, or '2 epochs', or never")
    return int(found[1]), "epochs" if (found[2] or "").startswith("epoch") else "steps"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_options(settings: dict[str, Any]) -> None:
    """Check and complete `settings` in place: mistakes that need neither data nor model to be seen.

    Raises:
        UserError: says what was given and what is allowed.
    """
    _check_choices(settings)
    for option in ("data", "model"):
        if not str(settings[option]).strip():
            raise UserError(f"{_flag(option)} is empty: give one, or leave it out")
    _check_pairs(settings)
    _check_numbers(settings)
    if settings["labels"] is not None:
        settings["labels"] = str(_place(settings["labels"]))  # the same one when a run goes on elsewhere
    save_interval(settings["save_every"])
    if parse_fold(settings["val_split"]) is None:
        parse_val_split(settings["val_split"])
    _check_together(settings)
    resume, output = settings["resume"], settings["output"]
    if resume == "auto" and output is None:
        raise UserError("--resume auto needs to know the run: give its folder with --output, or as --resume FOLDER")
    if resume not in (None, "auto") and output is not None and _place(resume) != _place(output):
        raise UserError(f"--resume {resume} goes on in that folder: leave --output {output} out")


def _check_choices(settings: Mapping[str, Any]) -> None:
    choices = {"opt": list_optimizers(), "sched": SCHEDULES, "augment": ("auto", *AUGMENT), "train": TRAIN}
    choices["balance"] = BALANCE
    if settings["mixed_precision"] is not None:
        choices["mixed_precision"] = PRECISIONS
    for option, allowed in choices.items():
        value = settings[option]
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, 3, 0.4) if len(allowed) > 10 else allowed
            raise UserError(
                f"{_flag(option)} {value} is unknown; " + (f"try {', '.join(near)}" if near else "see timm.optim")
            )


def _check_pairs(settings: dict[str, Any]) -> None:
    """Parse the options written KEY=VALUE, in place."""
    for option in PAIRS:
        settings[option] = parse_pairs(_flag(option), settings[option], EXAMPLES[option])
    for key in settings["model_kwargs"]:
        if key in NOT_OF_THE_MODEL:
            raise UserError(f"--model-kwargs {key}=… is decided by the data, --model and --pretrained: leave it out")
    for option, key in DROPS.items():
        if settings[option] is not None and key in settings["model_kwargs"]:
            raise UserError(f"{_flag(option)} and --model-kwargs {key}=… are the same thing: give one of them")
    if not isinstance(settings["model_kwargs"].get("cbam2", {}), Mapping):
        raise UserError("--model-kwargs cbam2=… is no dict: give options of the attention with --cbam2 KEY=VALUE")
    if settings["cbam2"]:
        try:
            complete_options(settings["cbam2"], _cbam2_defaults())
        except ValueError as error:
            raise UserError(f"--cbam2: {one_line(error)}") from error


def _check_numbers(settings: Mapping[str, Any]) -> None:
    if settings["lr"] not in (None, AUTO) and not 0 < settings["lr"] < math.inf:
        raise UserError(f"--lr {settings['lr']:g} is not a learning rate: give a number above 0, such as 1e-3")
    if settings["lr"] is None and settings["opt"] != "adamw":
        raise UserError(f"--opt {settings['opt']} has no default learning rate here: give one with --lr, or --lr auto")
    for option, (allowed, fits) in RANGES.items():
        value = settings[option]
        if value is not None and value != AUTO and not fits(value):
            raise UserError(f"{_flag(option)} {value:g} makes no sense: give {allowed}")


def _check_together(settings: Mapping[str, Any]) -> None:
    """Options that do not go with each other."""
    if settings["bce_target_threshold"] is not None and not settings["bce"]:
        raise UserError("--bce-target-threshold is a threshold of --bce: give that too, or leave it out")
    mixing = settings["mixup"] > 0 or settings["cutmix"] > 0
    if mixing and settings["batch_size"] != AUTO and settings["batch_size"] % 2:
        raise UserError(
            f"--batch-size {settings['batch_size']} is odd: --mixup and --cutmix pair images, give an even one"
        )
    if settings["cache_images"]:
        for option in ("auto_augment", "random_erasing", "streaming"):
            if settings[option]:
                raise UserError(f"--cache-images crops and mirrors only: it does not go with {_flag(option)}")
    if settings["streaming"] and settings["aug_repeats"] > 1:
        raise UserError("--aug-repeats needs to know the images by number: it does not go with --streaming")
    if settings["balance"] != "none" and settings["streaming"]:
        raise UserError("--balance needs to know every label in advance: it does not go with --streaming")
    for option in ("distill_alpha", "distill_temperature"):
        if settings["distill_from"] is None and settings[option] != getattr(Options, option):
            raise UserError(f"{_flag(option)} is about a teacher: give one with --distill-from, or leave it out")
    for option in ("lr", "batch_size"):
        if settings[option] == AUTO and settings["streaming"]:
            raise UserError(f"{_flag(option)} auto tries images in advance: it does not go with --streaming")
    if settings["folds"] is not None:
        for option, usual in (("streaming", False), ("push_to", None), ("val_split", Options.val_split)):
            if settings[option] != usual:
                raise UserError(f"--folds divides the images and makes a run of each part: leave {_flag(option)} out")
    for option in ("labels", "multi_label"):
        if settings[option] and settings["streaming"]:
            raise UserError(f"{_flag(option)} needs every label in advance: it does not go with --streaming")
    if settings["balance"] == "sampler" and settings["aug_repeats"] > 1:
        raise UserError("--balance sampler and --aug-repeats both decide which images repeat: give one of them")


def _place(folder: str | Path) -> Path:
    return Path(folder).expanduser().resolve()


def _cbam2_defaults() -> dict[str, Any]:
    from ..models.cbam2 import resolve_options

    return resolve_options()


def resolved_text(settings: Mapping[str, Any]) -> str:
    """The settings that differ from the defaults, on one line."""
    defaults = vars(Options())
    parts = []
    for name, value in settings.items():
        if name in ("recipe", "resume", "output") or name not in defaults:
            continue
        default = {} if name in PAIRS else SETTLED.get(name, defaults[name])
        if value not in (default, None) or (name == "lr" and value):
            parts.append(f"{name}={value}")
    return " ".join(parts)
