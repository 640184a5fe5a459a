"""What keeps a run from being lost: a lock on its folder, signals that stop it gently, a watch for a loss of NaN."""

from __future__ import annotations

import json
import math
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["BadLoss", "LossWatch", "StopSignal", "bad_loss", "check_validation", "lock"]


def lock(folder: Path) -> IO[str] | None:
    """Hold `folder` for this process; the system lets go of it when the process ends, however it does.

    Returns:
        The open file to keep (None where the system has no such locks).

    Raises:
        UserError: another live process holds it, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}): give another folder") from error
    try:
        # A record lock, which the processes that read images do not inherit and so cannot hold on to.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(
            f"--output {folder} is in use by a run that is alive: wait for it, or give another folder"
        ) from error
    return file


class StopSignal:
    """Within the context, SIGINT and SIGTERM set `name`; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    @contextmanager
    def __call__(self) -> Iterator[StopSignal]:
        def handle(number: int, frame: Any) -> None:
            self.name = signal.Signals(number).name
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, before[signal.SIGINT])

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class BadLoss(UserError):
    """The training or validation loss is no number any more."""


class LossWatch:
    """Finds the first step whose loss is not finite, without waiting for a GPU at each step.

    Args:
        name: gives the name of an image by its index.
    """

    def __init__(self, name: Any):
        self.name = name
        self.seen: list[tuple[int, int, float, Tensor, Tensor]] = []

    def add(self, epoch: int, step: int, lr: float, loss: Tensor, indices: Tensor) -> None:
        """Remember a step."""
        self.seen.append((epoch, step, lr, loss.detach(), indices))

    def look(self) -> dict[str, Any] | None:
        """What is known of the first bad step among those that wait, None if all are fine."""
        if not self.seen:
            return None
        losses = torch.stack([loss.float() for *_, loss, _ in self.seen]).tolist()
        seen, self.seen = self.seen, []
        for (epoch, step, lr, _, indices), loss in zip(seen, losses):
            if not math.isfinite(loss):
                files = [self.name(index) for index in indices.tolist()]
                return {"epoch": epoch, "step": step, "lr": lr, "loss": str(loss), "files": files}
        return None


def bad_loss(found: dict[str, Any], folder: Path, checkpoint: str, write: bool) -> BadLoss:
    """The error for a step that `LossWatch` found; the names of the whole batch go to bad_batch.json."""
    file = folder / "bad_batch.json"
    if write:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    files = found["files"]
    more = f" and {len(files) - 2} more, listed in {file}" if len(files) > 2 else ""
    return BadLoss(
        f"the training loss became {found['loss']} in epoch {found['epoch']}, step {found['step']}, at lr "
        f"{found['lr']:g}, on {', '.join(files[:2])}{more}; last good checkpoint: {checkpoint}; try again with a lower "
        f"--lr, such as {found['lr'] / 5:.2g}, or with --clip-grad 1"
    )


def check_validation(losses: Sequence[Tensor], epoch: int, lr: float, checkpoint: str) -> None:
    """Refuse a model that diverged in the epoch's last step, whose training loss could not show it any more.

    Args:
        losses: of the validation images, by each of the models that were measured.
        epoch: that ended.
        lr: at its end.
        checkpoint: the newest one.

    Raises:
        BadLoss: one is not finite.
    """
    for loss in losses:
        mean = loss.double().mean().item()
        if not math.isfinite(mean):
            raise BadLoss(
                f"the validation loss became {mean} after epoch {epoch}: the training has diverged and this model is "
                f"not kept; newest checkpoint: {checkpoint}; try again with a lower --lr, such as {lr / 5:.2g}, or "
                "with --clip-grad 1"
            )
