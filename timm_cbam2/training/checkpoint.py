"""Checkpoints that are whole or absent: all a run needs, with checksums, renamed into place when all is on disk."""

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
from .snapshot import FORMAT, load_all, save_all

__all__ = ["Checkpoints", "Position", "damage", "read_info", "writing"]

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
INFO = "checkpoint.json"
PREFIX = "step-"
OF_THE_RUN = (
    "best", "last", "run.json", "metrics.jsonl", "report.html", "curves.png", "confusion.png", "health.png",
    "bad_batch.json", "auto.json",
)  # fmt: skip
# Of each row of metrics.jsonl, as far as the rest of a run counts on it.
MEASURED = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_second")
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


def read_info(path: Path) -> dict[str, Any]:
    """What checkpoint.json tells.

    Raises:
        UserError: the checkpoint is of a version that pickled it, or tells nothing.
    """
    file = path / INFO
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        kinds = {"settings": dict, "data": dict, "versions": dict, "processes": int, "batch": int}
        whole = all(type(info[name]) is kind for name, kind in kinds.items())
    except (OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{file} tells nothing of a run: bring back a copy, or start anew in another folder")
    if info.get("format") != FORMAT:
        raise UserError(
            f"{path} was written by {info['versions'].get('timm_cbam2', 'another version')} in pickles, which can run "
            "code when read, so it is not: go on with the version that wrote it, or start anew in another folder"
        )
    return info


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
        """Take over a position.

        Raises:
            ValueError: something is missing in it, or is of another kind.
        """
        if state.keys() != self.__dict__.keys():
            raise ValueError(f"it tells {', '.join(state)} instead of {', '.join(self.__dict__)}")
        for name, value in state.items():
            if not _is_position(name, value):
                raise ValueError(f"{name} is {one_line(repr(value), 60)}")
        if (state["best"] is None) != (not state["rows"]):
            raise ValueError("best is of no row")
        self.__dict__.update(state)


def _is_position(name: str, value: Any) -> bool:
    if name in ("epoch", "batch", "updates", "waited"):
        return type(value) is int and value >= (name == "epoch")
    if name in ("sums", "confusion"):
        return value is None or isinstance(value, Tensor) and value.ndim == 2 and (name != "sums" or len(value.T) == 3)
    if name in ("rows", "best"):
        rows = value if name == "rows" else [value] if value is not None else []
        return isinstance(rows, list) and all(
            isinstance(row, dict) and all(type(row.get(key)) in (int, float) for key in MEASURED) for row in rows
        )
    if name == "bad":
        lists = list(value.values()) if isinstance(value, dict) else [None]
        return all(isinstance(part, list) and all(type(index) is int for index in part) for part in lists)
    return isinstance(value, list)


class Checkpoints:
    """The folder `checkpoints/` of a run, written by all processes together.

    Args:
        accelerator: its prepared model and optimizer are saved, see `save_all`.
        parts: what else is saved.
        folder: of the run.
        keep: how many of the newest to keep; the one before the last is what a damaged one falls back to.
    """

    def __init__(self, accelerator: Any, parts: dict[str, Any], folder: Path, keep: int):
        self.accelerator, self.parts = accelerator, parts
        self.folder, self.keep = folder / "checkpoints", keep

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
                save_all(accelerator, temporary, self.parts)
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

    def load(self, path: Path) -> None:
        """Read a checkpoint; all processes call this.

        Raises:
            UserError: it does not fit this run, or holds something else than the state of one.
        """
        load_all(self.accelerator, path, self.parts, read_info(path)["processes"])

    def _publish(self, temporary: Path, final: Path, info: dict[str, Any]) -> None:
        info = {"format": FORMAT, **info}
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
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
