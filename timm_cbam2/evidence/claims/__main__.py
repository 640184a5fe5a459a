"""`python -m timm_cbam2.evidence.claims run | table | look`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer

from ...data.tasks import SIDE, TASKS, make
from ...errors import UserError, one_line, run_commands
from .look import lines
from .look import look as look_at
from .networks import FAMILIES
from .results import RESULTS, append, key_of, read
from .run import train_and_measure
from .table import markdown
from .training import RECIPES
from .variants import VARIANTS

DEFAULT = "plain,se,eca,cbam,cbam2"


def _names(option: str, text: str, allowed: Any) -> list[str]:
    names = [part for part in text.split(",") if part]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise UserError(f"--{option} {text}: no {unknown[0] if unknown else option}; give some of {', '.join(allowed)}")
    return names


def _task(option: str, given: str) -> tuple[str, str | None]:
    """Its name, and its file where it is not made here: the folder's name says what it is, not where it lies."""
    if Path(given).is_file():
        return Path(given).resolve().parent.name, given
    if given not in TASKS:
        raise UserError(f"--{option} {given}: no such task; give a parquet file, or one of {', '.join(TASKS)}")
    return given, None


def _numbers(option: str, text: str) -> list[int]:
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError as error:
        raise UserError(f"--{option} {text}: give whole numbers, such as 0,1,2 or 0-7") from error
    return found


def run(
    task: Annotated[str, typer.Option(help=f"{', '.join(TASKS)}, or a parquet file of images.")] = "clutter",
    variants: Annotated[str, typer.Option(help="Names, comma-separated; see variants.py.")] = DEFAULT,
    seeds: Annotated[str, typer.Option(help="Such as 0-7 or 0,1.")] = "0,1",
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(RECIPES)}.")] = "adamw",
    family: Annotated[str, typer.Option(help=f"One of {', '.join(FAMILIES)}.")] = "resnet",
    depth: Annotated[int, typer.Option(help="Residual blocks a stage: 1 is a ResNet-8, 3 a ResNet-20.", min=1)] = 1,
    stages: Annotated[str, typer.Option(help="Stages whose blocks carry attention.")] = "23",
    start: Annotated[int, typer.Option(help="Epochs of a plain network to start from; 0 for none.", min=0)] = 0,
    start_on: Annotated[str | None, typer.Option(help="What those are on, where it is another task.")] = None,
    count: Annotated[int, typer.Option(help="Images to train on.", min=1)] = 6000,
    val_count: Annotated[int, typer.Option(help="Images to validate on.", min=1)] = 3000,
    epochs: Annotated[int, typer.Option(help="Passes over them.", min=1)] = 6,
    batch_size: Annotated[int, typer.Option(help="Images a step.", min=2)] = 32,
    side: Annotated[int, typer.Option(help="Pixels.", min=16)] = SIDE,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16, which a CPU without AVX-512 lacks.")] = "bf16",
    results: Annotated[Path, typer.Option(help="File that lines are added to.")] = RESULTS,
) -> int:
    """Train and measure every variant by every seed, one seed after the other; what the file has is left out.

    Raises:
        UserError: no such task, variant, recipe, stage or precision.
    """
    task, data = _task("task", task)
    start_on, start_data = (task, data) if start_on is None else _task("start-on", start_on)
    if start_on != task and not start:
        raise UserError(f"--start-on {start_on}: for how many epochs? Give --start too, such as --start 8")
    _names("recipe", recipe, RECIPES)
    _names("family", family, FAMILIES)
    _names("mixed-precision", mixed_precision, ("no", "bf16"))
    if not stages or set(stages) - set(FAMILIES[family]):
        raise UserError(f"--stages {stages}: give some of {FAMILIES[family]}, such as 23")
    setting = dict(
        family=family, task=task, side=side, count=count, depth=depth, stages=stages, start=start,
        start_on=start_on, epochs=epochs, batch_size=batch_size,
        recipe=recipe, mixed_precision=mixed_precision,
    )  # fmt: skip
    torch.set_num_threads(1)  # so that a number does not depend on who else computes
    trained = 0
    names = _names("variants", variants, VARIANTS)
    for seed in _numbers("seeds", seeds):
        for variant in names:
            job = {**setting, "variant": variant, "seed": seed}
            if key_of(job) in {key_of(row) for row in read(results)}:
                continue
            row = train_and_measure(job, val_count, data, start_data)
            append(results, row)
            trained += 1
            print(f"{variant}, seed {seed}: {100 * row['accuracy']:.2f} %, {row['seconds']:.0f} s", flush=True)
    print(f"{trained} trained, results in {results}")
    return trained


def table(
    results: Annotated[Path, typer.Option(help="File of results.")] = RESULTS,
    control: Annotated[str, typer.Option(help="What the others are compared with.")] = "plain",
) -> None:
    """Print what the results say, one table for each setting.

    Raises:
        UserError: there are no results.
    """
    rows = read(results)
    if not rows:
        raise UserError(
            f"--results {results} holds no result: `run` makes some, and those of the project are in its repository"
        )
    print("\n".join(markdown(rows, control)))


def look(
    model: Annotated[str, typer.Argument(help="Registered name with weights, run, model folder or hf-hub: id.")],
    task: Annotated[str, typer.Option(help=f"One of {', '.join(TASKS)}.")] = "clutter",
    count: Annotated[int, typer.Option(help="Pictures, of drawings that are not trained on.", min=1)] = 2000,
    side: Annotated[int, typer.Option(help="Their side in pixels.", min=16)] = SIDE,
) -> None:
    """Measure a trained model: does its mask find the object, and what is each decision worth?

    Raises:
        UserError: no such task, or no such model of ten classes.
    """
    _names("task", task, TASKS)
    try:
        found = look_at(model, make(task, "val", count, side=side))
    except ValueError as error:
        raise UserError(one_line(error)) from error
    print("\n".join(lines(found)))


def main() -> NoReturn:
    """Entry point of `python -m timm_cbam2.evidence.claims`."""
    run_commands(run, table, look, help="Do decisions live, are they worth something, do masks look at the object?")


if __name__ == "__main__":
    main()
