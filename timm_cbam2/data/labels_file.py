"""A folder of images and a table that says what is in them: `--data FOLDER --labels FILE.csv`."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from .folders import FileSamples, Paths, image_files
from .images import SPLITS, Images
from .labels import choose_label_column, encode, indicator_names

__all__ = ["from_labels_file"]

FILE_NAMES = ("file_name", "filename", "file", "image", "path", "image_id", "image_name", "id", "img", "name")


def from_labels_file(
    folder: Path, labels: str, image_column: str | None, label_column: str | None, several: bool
) -> Images:
    """Read a folder of images, and their labels from a .csv, .tsv or .jsonl file.

    A column names the files, below the folder and with or without the end of their names; another holds the labels. A
    column `split` of train, val and test divides them.

    Args:
        folder: with the images, also in folders inside it.
        labels: the file.
        image_column: which names the files, where that is not clear.
        label_column: which holds the labels, likewise.
        several: whether an image can have several: in one text, or in a column of 0 and 1 for each class.

    Raises:
        UserError: the file cannot be read, names images that are not there, or it is not clear which column is which.
    """
    table = _read(labels)
    columns = list(table)
    if image_column is None:
        named = [n for n in columns if n.lower() in FILE_NAMES]
        if len(named) != 1:
            raise UserError(
                f"--labels {labels}: say which column names the images with --image-column, one of {', '.join(columns)}"
            )
        image_column = named[0]
    elif image_column not in columns:
        raise UserError(f"--image-column {image_column}: {labels} has the columns {', '.join(columns)}")
    split_column = next((n for n in columns if n.lower() == "split" and n != label_column), None)
    others = [n for n in columns if n not in (image_column, split_column)]
    try:
        label_column = choose_label_column(labels, others, label_column)
        values = table[label_column]
    except UserError:
        if not several or label_column is not None:
            raise
        values = indicator_names(labels, {name: table[name] for name in others})
        label_column = ", ".join(others[:3])
    files, notes = _files(folder, labels, table[image_column])
    rows = _rows_of_splits(labels, table[split_column] if split_column else None, len(files))
    found = encode(labels, label_column, None, {s: [values[i] for i in chosen] for s, chosen in rows.items()}, several)
    splits = {s: FileSamples(Paths.of(iter([files[i] for i in chosen])), found.splits[s]) for s, chosen in rows.items()}
    return Images(folder.resolve().name, found.classes, splits, notes, multi_label=found.several)


def _read(labels: str) -> dict[str, list[Any]]:
    """The columns of a table, as text unless it is JSON: numbers may begin with zeros."""
    path = Path(labels).expanduser()
    ending = path.suffix.lower()
    if ending not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"--labels {labels}: give a .csv, .tsv or .jsonl file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if ending == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            else:
                rows = list(csv.DictReader(file, delimiter="\t" if ending == ".tsv" else ",", strict=True))
        columns = list(dict.fromkeys(name for row in rows for name in row))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"--labels {labels} cannot be read: {one_line(error, 200)}") from error
    if not rows:
        raise UserError(f"--labels {labels} has no rows: write one for each image")
    if None in columns:  # where csv puts what has no column
        number = next(i for i, row in enumerate(rows) if None in row)
        raise UserError(f"--labels {labels}: row {number + 1} has more values than columns: put texts in quotes")
    return {name: [row.get(name) for row in rows] for name in columns}


def _files(folder: Path, labels: str, names: list[Any]) -> tuple[list[str], list[str]]:
    """The path of each named image, and notes about those that are not named."""
    there = image_files(folder)
    below = {os.path.relpath(path, folder): path for path in there}
    bare = {os.path.splitext(name)[0]: path for name, path in below.items()}
    found = [below.get(os.path.normpath(str(n))) or bare.get(os.path.normpath(str(n))) for n in names]
    missing = [str(n) for n, path in zip(names, found) if path is None]
    if missing:
        raise UserError(
            f"--labels {labels}: {len(missing)} of {len(names)} images are not in {folder}, such as {missing[0]}: "
            "bring them there, or remove those rows"
        )
    double = [name for name, times in Counter(found).items() if times > 1]
    if double:
        raise UserError(
            f"--labels {labels} names {double[0]} more than once: give each image one row; several labels of it go "
            "into one text, with --multi-label"
        )
    left = len(there) - len(set(found))
    return found, [f"{left} images that {labels} does not name were left out"] if left else []


def _rows_of_splits(labels: str, column: list[Any] | None, count: int) -> dict[str, list[int]]:
    """The rows of each split, that to train on first; "all" where no column says."""
    if column is None:
        return {"all": list(range(count))}
    meant = {name: split for split, names in SPLITS.items() for name in names}
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for number, value in enumerate(column):
        split = meant.get(str(value).strip().lower())
        if split is None:
            raise UserError(f"--labels {labels}: column 'split' holds {value!r}: write train, val or test")
        rows[split].append(number)
    rows = {split: chosen for split, chosen in rows.items() if chosen}
    if "train" not in rows:
        raise UserError(f"--labels {labels}: column 'split' gives no image to train on")
    return rows
