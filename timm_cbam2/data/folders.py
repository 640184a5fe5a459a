"""Image folders: one folder per class, directly or below train/, val/ and test/."""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path
from typing import Any, Iterator, Sequence

import numpy as np

from ..errors import UserError
from .formats import EXAMPLES, image_extensions, is_image
from .images import SPLITS, Images, Samples

__all__ = ["FileSamples", "Paths", "from_folder", "image_files", "subfolders"]


class Paths(Sequence[str]):
    """File names as bytes one after the other: a million need 60 MB, and worker processes share them.

    (As Python's own strings they need more, and each worker that looks at them gets a copy, since looking at an object
    writes to its reference count.)
    """

    def __init__(self, text: bytes, starts: np.ndarray, ends: np.ndarray):
        self.text, self.starts, self.ends = text, starts, ends

    @classmethod
    def of(cls, names: Iterator[str]) -> Paths:
        """Those of `names`, each looked at once."""
        text, ends = bytearray(), [0]
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        places = np.array(ends, dtype=np.int64)
        return cls(bytes(text), places[:-1], places[1:])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return os.fsdecode(self.text[self.starts[index] : self.ends[index]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def select(self, indices: Sequence[int] | np.ndarray) -> Paths:
        """Those at `indices`, over the same bytes."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Paths(self.text, self.starts[chosen], self.ends[chosen])

    def relative(self) -> Iterator[str]:
        """Each below the folder that all of them share."""
        # The first and the last in order share what all share.
        base = os.path.commonpath([min(self), max(self)]) if len(self) else ""
        for name in self:
            yield name[len(base) :].lstrip(os.sep) or os.curdir


class FileSamples(Samples):
    """Images in files of their own."""

    items: Paths

    def joined(self, other: Samples) -> FileSamples:
        return FileSamples(Paths.of(chain(self.items, other.items)), [*self.labels, *other.labels])

    def select(self, indices: Sequence[int]) -> FileSamples:
        return FileSamples(self.items.select(indices), [self.labels[i] for i in indices])


def subfolders(folder: Path) -> list[Path]:
    """Those that can be a class or a split, in order of their names."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def image_files(folder: str | Path) -> list[str]:
    """The images in a folder and the folders inside it, in order.

    Raises:
        UserError: there are none.
    """
    files = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        files += [os.path.join(root, name) for name in sorted(names) if is_image(name)]
    if not files:
        raise UserError(f"{folder} has no images ({EXAMPLES}): give another folder, or files")
    return files


def from_folder(folder: Path) -> Images:
    """Read an image folder.

    Raises:
        UserError: no class folders, one without images to train on, or a split with classes that are not trained on.
    """
    children = {child.name.lower(): child for child in subfolders(folder)}
    found = {split: children[n] for split, names in SPLITS.items() for n in names if n in children}
    notes: list[str] = []
    if "train" not in found and "val" not in found:
        found = {"all": folder}
    classes: list[str] = []
    splits = {}
    for split, where in found.items():
        names = [child.name for child in subfolders(where)]
        if not names:
            loose = "images but " if any(p.suffix.lower() in image_extensions() for p in where.iterdir()) else ""
            raise UserError(
                f"{where} has {loose}no class folders: put the images of each class in a folder of its own, or give a "
                "table that says what is in them with --labels FILE"
            )
        extra = sorted(set(names) - set(classes)) if classes else []
        if extra:
            first = next(iter(found.values()))
            raise UserError(
                f"{where} has class folders that {first} lacks: {', '.join(extra)}; each needs images to train on"
            )
        classes = classes or names  # other splits may lack some
        splits[split] = _class_folders(where, classes, notes, complete=split in ("train", "all"))
    return Images(folder.resolve().name, classes, splits, notes)


def _class_folders(folder: Path, classes: list[str], notes: list[str], complete: bool) -> FileSamples:
    """The images of a split; only where it is `complete` must every class have some."""
    endings = image_extensions()
    labels: list[int] = []
    skipped: list[str] = []

    def files() -> Iterator[str]:
        for label, name in enumerate(classes):
            before = len(labels)
            for root, folders, names in os.walk(folder / name, followlinks=True):
                folders.sort()
                for file in sorted(names):
                    if file.startswith("."):
                        continue
                    path = os.path.join(root, file)
                    if os.path.splitext(file)[1].lower() in endings:
                        labels.append(label)
                        yield path
                    else:
                        skipped.append(path)
            if len(labels) == before and complete:
                raise UserError(
                    f"class folder {folder / name} has no images ({EXAMPLES}): add some, or remove the folder"
                )

    items = Paths.of(files())
    if not labels:
        raise UserError(f"{folder} has no images ({EXAMPLES}): add some, or remove the folder")
    if skipped:
        notes.append(f"{len(skipped)} files that are not images were left out, such as {skipped[0]}")
    return FileSamples(items, labels)
