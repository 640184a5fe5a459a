"""What a run leaves: pictures, model cards, a summary for a person, and the best model on the Hub if asked for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Sequence

from torch import Tensor

from ..errors import UserError, one_line
from ..files import duration
from ..hub.card import write_card
from ..hub.run_folder import score, score_name
from ..terminal import say
from .observer import observer

__all__ = ["draw_curves", "finish", "push_best", "summary"]

SHOWN = 12  # rows of the summary table


def draw_curves(folder: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]], name: str, count: int) -> None:
    """Draw curves.png."""
    title = f"{Path(settings['model']).name} on {name}, {count} training images"
    observer().draw_curves(rows, folder / "curves.png", title)


def finish(
    folder: Path,
    settings: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    best: dict[str, Any],
    confusion: Tensor | None,
    classes: Sequence[str],
    data: tuple[str, int],
    seconds: float,
    trained: tuple[int, int],
) -> None:
    """Write all that comes at the end, and say where it is. Main process only; may be repeated.

    Args:
        folder: of the run.
        settings: as in run.json.
        rows: of metrics.jsonl.
        best: the row of the best model.
        confusion: of the best model on the validation images, (K, K) counts.
        classes: their names.
        data: name of the data, and number of training images.
        seconds: that this call took.
        trained: numbers of parameters, those that were trained and all.
    """
    draw_curves(folder, settings, rows, *data)
    if confusion is not None:
        present = (confusion.sum(0) + confusion.sum(1) > 0).nonzero().flatten().tolist()
        kept = present if len(classes) > 60 else list(range(len(classes)))
        title = f"{data[0]}, val: {100 * best['val_accuracy']:.2f} % of {best['val_images']} images"
        observer().draw_confusion(confusion[kept][:, kept], [classes[i] for i in kept], folder / "confusion.png", title)
    for name in ("best", "last"):
        try:
            write_card(folder / name)
        except ValueError as error:
            raise UserError(f"{one_line(error, 300)}: bring back a copy of its files") from error
    print(summary(rows, best))
    if settings["train"] != "all":
        say("", f"{share_trained(settings['train'], *trained)}; {rows[-1]['images_per_second']:.0f} images/s")
    say(
        "",
        f"done in {duration(seconds)}: best validation {score_name(best)} {100 * score(best):.2f} % "
        f"after epoch {best['epoch']} of {rows[-1]['epoch']}",
        f"  best model  {folder / 'best'}",
        f"  last model  {folder / 'last'}",
        f"  curves      {folder / 'curves.png'}",
    )
    if confusion is not None:
        say(f"  confusion   {folder / 'confusion.png'}")
    _report(folder, confusion)
    say(f"  numbers     {folder / 'metrics.jsonl'}", f"  settings    {folder / 'run.json'}")
    run = shlex.quote(str(folder))
    say("next:", f"  timm-cbam2 evaluate {run}", f"  timm-cbam2 predict {run} IMAGE…")
    say(f'  timm.create_model("local-dir:{folder / "best"}", pretrained=True)')


def _report(folder: Path, confusion: Tensor | None) -> None:
    try:
        path = observer().report(folder, confusion)
    except UserError as error:  # the run itself is complete
        say(f"  no report: {one_line(error)}")
        return
    if path is not None:
        say(f"  report      {path}")


def push_best(folder: Path, repo_id: str) -> None:
    """Upload the best model of a run that is complete.

    Raises:
        UserError: it cannot be uploaded; says how to try again.
    """
    from ..hub.push import push

    try:
        push(folder / "best", repo_id, private=False, revision=None, create_pr=False, with_code=True, dry_run=False)
    except UserError as error:
        again = f"timm-cbam2 push {shlex.quote(str(folder))} {repo_id}"
        raise UserError(f"the run is complete, but --push-to failed: {error}; try again with: {again}") from error


def share_trained(train: str, trainable: int, parameters: int) -> str:
    """What of a model is trained, for a person."""
    return f"{train}: {trainable:,} of {parameters:,} parameters trained, {100 * trainable / parameters:.1f} %"


def summary(rows: Sequence[dict[str, Any]], best: dict[str, Any]) -> str:
    """A table of the last and the best epochs."""
    shown = [row for row in rows if row["epoch"] == best["epoch"]] + list(rows[-SHOWN:])
    shown = sorted({row["epoch"]: row for row in shown}.values(), key=lambda row: row["epoch"])
    lines = ["", "epoch        lr  train loss  train acc   val loss    val acc   images/s"]
    for row in shown:
        mark = " *" if row["epoch"] == best["epoch"] else ""
        lines.append(
            f"{row['epoch']:>5}  {row['lr']:8.2g}  {row['train_loss']:10.4f}  {100 * row['train_accuracy']:7.2f} %"
            f"  {row['val_loss']:9.4f}  {100 * row['val_accuracy']:7.2f} %  {row['images_per_second']:9.0f}{mark}"
        )
    return "\n".join(lines)
