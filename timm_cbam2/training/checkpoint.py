"""Checkpoints that are whole or absent: Accelerate's state with checksums, renamed into place when all is on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from safetensors import SafetensorError
from torch import Tensor

from ..errors import UserError, one_line

__all__ = ["Checkpoints", "Position", "damage", "writing"]

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
INFO = "checkpoint.json"
PREFIX = "step-"
OF_THE_RUN = (
    "best", "last", "run.json", "metrics.jsonl", "report.html", "curves.png", "confusion.png", "health.png",
    "bad_batch.json",
)  # fmt: skip
# What torch, safetensors and the operating system raise when a disk is full.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the context, a disk that is full or cannot be written becomes one line.

    Raises:
        UserError: `path` could not be written.
    """
    try:
        yield
    except WRITE_ERRORS as error:
        raise UserError(f"cannot write {path} ({_reason(error)}): make room and go on with --resume auto") from error


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if every file has the bytes that were written."""
    try:
        lines = (folder / SUMS).read_text(encoding="ascii").splitlines()
        sums = dict(reversed(line.split("  ", 1)) for line in lines)
    except (OSError, ValueError):
        return f"{SUMS} is missing or damaged"
    if INFO not in sums:
        return f"{SUMS} is cut off"
    for name, expected in sums.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != expected:
            return f"{name} is damaged or cut off (its checksum differs)"
    return None


@dataclass
class Position:
    """Where a run is: what a checkpoint holds besides weights, optimizer and random generators."""

    epoch: int = 1  # the one in hand
    batch: int = 0  # batches of it that are done
    updates: int = 0  # optimizer steps of the whole run
    sums: Tensor | None = None  # loss, hits, images of the epoch so far, (processes, 3)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    best: dict[str, Any] | None = None
    waited: int = 0  # epochs since the best one
    confusion: Tensor | None = None  # of the best model
    bad: dict[str, list[int]] = field(default_factory=dict)  # unreadable images by split
    streams: list[Any] = field(default_factory=list)  # where each process is in its stream

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class Checkpoints:
    """The folder `checkpoints/` of a run, written by all processes together.

    Args:
        accelerator: its prepared and registered objects are what is saved.
        folder: of the run.
        keep: how many of the newest to keep; the one before the last is what a damaged one falls back to.
    """

    def __init__(self, accelerator: Any, folder: Path, keep: int):
        self.accelerator, self.folder, self.keep = accelerator, folder / "checkpoints", keep

    def save(self, step: int, info: dict[str, Any]) -> Path:
        """Write a checkpoint after `step` optimizer steps; all processes call this.

        Raises:
            UserError: it cannot be written; those before are as they were.
        """
        accelerator = self.accelerator
        final = self.folder / f"{PREFIX}{step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        problem = None
        try:
            if accelerator.is_main_process:
                self.folder.mkdir(exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
        except OSError as error:
            problem = one_line(error, 200)
        problem = problem or self._first(problem)
        if problem is None:
            try:
                accelerator.save_state(str(temporary))
            except WRITE_ERRORS as error:
                problem = _reason(error)
            problem = self._first(problem)
        if problem is None:
            try:
                if accelerator.is_main_process:
                    self._publish(temporary, final, info)
            except WRITE_ERRORS as error:
                problem = _reason(error)
            problem = self._first(problem)
        if problem is not None:
            good = ""
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                good = next((str(p) for p in self.all() if damage(p) is None), "none yet")
            raise UserError(
                f"cannot write the checkpoint {final} ({problem}): make room and go on with --resume auto; "
                f"last good checkpoint: {self._broadcast(good)}"
            )
        return final

    def _publish(self, temporary: Path, final: Path, info: dict[str, Any]) -> None:
        (temporary / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        sums = "".join(f"{_sha256(file)}  {file.relative_to(temporary).as_posix()}\n" for file in files)
        (temporary / SUMS).write_text(sums, encoding="ascii")
        for file in (*files, temporary / SUMS, temporary):
            _to_disk(file)
        if final.exists():  # of before this run was resumed from an older one
            final.rename(self.folder / f".{final.name}.again.tmp")
        temporary.rename(final)
        _to_disk(self.folder)
        self.prune(self.keep)

    def all(self) -> list[Path]:
        """Those that are there, the newest first."""
        return sorted(self.folder.glob(f"{PREFIX}*"), reverse=True)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest one that is whole, and a line about each that is not, which is set aside. Main process only.

        Raises:
            UserError: there are some, but none is whole.
        """
        self.sweep()
        problems, damaged = [], []
        for path in self.all():
            problem = damage(path)
            if problem is None:
                for bad in damaged:
                    aside = self.folder / f"damaged-{bad.name}"
                    if aside.exists():  # of the same step, before
                        shutil.rmtree(aside)
                    bad.rename(aside)
                return path, [f"{line}; the previous one, {path.name}, is used" for line in problems]
            problems.append(f"checkpoint {path}: {problem}")
            damaged.append(path)
        if problems:
            raise UserError(f"{'; '.join(problems)}; no other is left: start anew in another folder")
        return None, []

    def prune(self, keep: int) -> None:
        """Leave the newest `keep`; killed meanwhile, none is left in part. Main process only."""
        for old in self.all()[keep:]:
            old.rename(self.folder / f".{old.name}.old.tmp")
        self.sweep()

    def sweep(self) -> None:
        """Remove what a killed run left half-written. Main process only."""
        beside = (f".{name}.*tmp" for name in OF_THE_RUN)
        for rest in (*self.folder.glob(".*.tmp"), *(path for name in beside for path in self.folder.parent.glob(name))):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()

    def _first(self, problem: str | None) -> str | None:
        """What went wrong on any process, known to all."""
        if self.accelerator.num_processes == 1:
            return problem
        from accelerate.utils import gather_object

        return next((p for p in gather_object([problem]) if p is not None), None)

    def _broadcast(self, value: Any) -> Any:
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def _reason(error: BaseException) -> str:
    """Why a file could not be written: the system's own words where there are some."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return one_line(error, 160)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
