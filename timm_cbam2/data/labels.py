"""Labels as they stand in tables, one for each image or several, as numbers of classes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

import numpy as np

from ..errors import UserError

__all__ = ["Labels", "choose_label_column", "encode", "indicator_names"]

SEPARATORS = "|;,"  # between the labels of a text; where none of them occurs, spaces are


@dataclass
class Labels:
    """Class names, and by split a class index for each image or, with `several`, K zeros and ones (int8)."""

    classes: list[str]
    splits: dict[str, list[Any]]
    several: bool = False


def encode(data: str, column: str, kind: Any, values: Mapping[str, Sequence[Any]], several: bool) -> Labels:
    """Labels of the values of a column.

    Args:
        data: what the table is called.
        column: the same of the column.
        kind: its type in `datasets`, whose ClassLabel names the classes; None for a column of text.
        values: by split, the one to train on first; a list for each image means several labels.
        several: whether a text holds several labels, separated by | ; , or else spaces.

    Raises:
        UserError: a value names no class, or a class has no images to train on.
    """
    given = [value for of_split in values.values() for value in of_split]
    if several or any(isinstance(value, (list, tuple)) for value in given):
        return _several(data, column, getattr(kind, "feature", None), values)
    classes, index = _class_names(data, kind, column, values)
    return Labels(classes, {split: [index[v] for v in of_split] for split, of_split in values.items()})


def indicator_names(data: str, columns: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    """For each row, the names of the columns that hold a 1; all must hold 0 and 1 alone.

    Raises:
        UserError: one holds something else, or there is none.
    """
    for name, values in columns.items():
        other = next((v for v in values if str(v) not in ("0", "1", "0.0", "1.0", "True", "False")), None)
        if other is not None:
            raise UserError(
                f"{data}: column '{name}' holds {other!r}: several labels are a text with | ; , or spaces between them "
                "(say in which column with --label-column), or a column of 0 and 1 for each class"
            )
    if not columns:
        raise UserError(f"{data} has no column with labels")
    rows = zip(*columns.values())
    return [[name for name, v in zip(columns, row) if str(v) in ("1", "1.0", "True")] for row in rows]


def choose_label_column(data: str, columns: Sequence[str], asked: str | None, typed: Sequence[str] = ()) -> str:
    """The column of `columns` with the labels: that asked for, one that looks like it, or the only one there is.

    Raises:
        UserError: there is no such column, or it takes a person to choose.
    """
    if asked is not None:
        if asked not in columns:
            raise UserError(f"--label-column {asked}: {data} has the columns {', '.join(columns)}")
        return asked
    named = [
        n for n in columns if n.lower() in ("label", "labels", "class", "cls", "target", "category", "tags", "classes")
    ]
    found = list(typed) or named or (list(columns) if len(columns) == 1 else [])
    if len(found) != 1:
        raise UserError(
            f"{data}: say which column holds the labels with --label-column, one of {', '.join(found or columns)}"
        )
    return found[0]


def _several(data: str, column: str, kind: Any, values: Mapping[str, Sequence[Any]]) -> Labels:
    from datasets import ClassLabel

    texts = [v for of_split in values.values() for v in of_split if isinstance(v, str)]
    separator = next((s for s in SEPARATORS if any(s in text for text in texts)), None)

    def parts(value: Any) -> list[Any]:
        if value is None or value != value:  # NaN
            return []
        if isinstance(value, str):
            return [part.strip() for part in value.split(separator) if part.strip()]
        return list(value) if isinstance(value, (list, tuple)) else [value]

    rows = {split: [parts(value) for value in of_split] for split, of_split in values.items()}
    bad = [v for of_split in rows.values() for row in of_split for v in row if not isinstance(v, (int, str))]
    if bad:
        raise UserError(f"{data}: column '{column}' holds {bad[0]!r}, which names no class; remove it")
    seen = {split: Counter(v for row in of_split for v in row) for split, of_split in rows.items()}
    if isinstance(kind, ClassLabel):
        index = {i: i for i in range(len(kind.names))}
        classes = list(kind.names)
        beyond = sorted({v for counts in seen.values() for v in counts} - index.keys())
        if beyond:
            raise UserError(f"{data}: label {beyond[0]} in column '{column}', which names {len(classes)} classes")
    else:
        classes, index = _ordered(data, seen)

    def hot(row: Sequence[Any]) -> np.ndarray:
        target = np.zeros(len(classes), dtype=np.int8)
        target[[index[v] for v in row]] = 1
        return target

    return Labels(classes, {split: [hot(row) for row in of_split] for split, of_split in rows.items()}, True)


def _class_names(
    data: str, kind: Any, column: str, values: Mapping[str, Sequence[Any]]
) -> tuple[list[str], dict[Any, int]]:
    """Class names in label order, and the class index of each value of the label column."""
    from datasets import ClassLabel

    labels = [v for of_split in values.values() for v in of_split]
    whole = [v for v in labels if isinstance(v, float) and v.is_integer()]
    if whole and len(whole) + labels.count(None) == len(labels):
        raise UserError(f"{data}: column '{column}' holds numbers such as {whole[0]}: make it a column of integers")
    bad = [v for v in labels if not isinstance(v, (int, str)) or v == -1 or v == ""]
    if bad:
        raise UserError(f"{data}: column '{column}' holds {bad[0]!r}, which names no class; remove those rows")
    seen = {split: Counter(of_split) for split, of_split in values.items()}
    if isinstance(kind, ClassLabel):
        beyond = [v for counts in seen.values() for v in counts if not 0 <= v < len(kind.names)]
        if beyond:
            raise UserError(f"{data}: label {beyond[0]} in column '{column}', which names {len(kind.names)} classes")
        return list(kind.names), {i: i for i in range(len(kind.names))}
    return _ordered(data, seen)


def _ordered(data: str, seen: Mapping[str, Counter[Any]]) -> tuple[list[str], dict[Any, int]]:
    """The values as class names in order, and the index of each; all must occur in the first split."""
    everything = set().union(*seen.values())
    first = next(iter(seen))  # the others may lack some
    missing = sorted(everything - seen[first].keys(), key=str)
    if missing:
        raise UserError(
            f"{data}: the {first} split lacks the classes {', '.join(map(str, missing[:10]))} of the others; each "
            "needs images to train on"
        )
    ordered = sorted(everything, key=lambda v: (isinstance(v, str), v))
    return [str(v) for v in ordered], {v: i for i, v in enumerate(ordered)}
