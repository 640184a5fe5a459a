"""The classes of a stream and how many images it has, learned without reading the images where that is possible."""

from __future__ import annotations

from typing import Any, Mapping

from ..errors import UserError
from .shards import labels_in, shards_of

__all__ = ["describe"]


def describe(data: str, tables: Mapping[str, Any], column: str) -> tuple[list[str], dict[Any, int], dict[str, int]]:
    """Class names in label order, the class of each value of the label column, and the rows of each split.

    They come from the set's own description, or the labels in its tar files, or else a pass over its label column.

    Args:
        data: what the person called it.
        tables: streams of `datasets` by split, "train" among them.
        column: with the labels.

    Raises:
        UserError: the labels name no classes, or a shard cannot be read.
    """
    known = {split: labels_in(shards_of(table), column) for split, table in tables.items()}
    names, index = _classes(data, tables["train"], column, known["train"])
    return names, index, {split: _count(table, column, known[split]) for split, table in tables.items()}


def _classes(data: str, table: Any, column: str, known: dict[str, int] | None) -> tuple[list[str], dict[Any, int]]:
    from datasets import ClassLabel

    kind = (table.features or {}).get(column)
    if isinstance(kind, ClassLabel):
        return list(kind.names), {i: i for i in range(len(kind.names))}
    if hasattr(kind, "feature"):
        raise UserError(f"{data}: column '{column}' holds several labels, and --streaming takes one: leave it out")
    if known is not None:
        values = {int(label) if "int" in str(kind.dtype) else label for label in known}
    else:
        values = {row[column] for row in table.select_columns(column)}
    seen = sorted(values, key=lambda v: (str(type(v)), v))
    if any(not isinstance(value, (int, str)) for value in seen):
        raise UserError(f"{data}: column '{column}' holds {seen[0]!r}, which names no class")
    return [str(value) for value in seen], {value: i for i, value in enumerate(seen)}


def _count(table: Any, column: str, known: dict[str, int] | None) -> int:
    if known is not None:
        return sum(known.values())
    splits = table.info.splits or {}
    if str(table.split) in splits and splits[str(table.split)].num_examples:
        return splits[str(table.split)].num_examples
    return sum(1 for _ in table.select_columns(column))
