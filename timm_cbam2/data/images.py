"""Labelled images, wherever they come from: samples that can be opened, data sets with splits, what is held out."""

from __future__ import annotations

import math
import os
import random
import re
import warnings
import zlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Iterator, Sequence

from ..errors import UserError

__all__ = ["SPLITS", "ArraySamples", "Images", "Samples", "is_held_out", "parse_fold", "parse_val_split"]

SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "dev"), "test": ("test", "testing")}
SPLIT_SEED = 0  # the held-out images depend on the data only, so that runs with different seeds can be compared


class Samples:
    """Labelled images: `labels[i]` is a class index, `source(i)` what PIL can open, `name(i)` what to call it."""

    def __init__(self, items: Sequence[Any], labels: Sequence[int]):
        self.items, self.labels = items, list(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> Any:
        """A path, bytes, or an image."""
        return self.items[index]

    def sources(self) -> Iterator[Any]:
        """All of them, in order; faster than one after the other where that matters."""
        return (self.source(i) for i in range(len(self)))

    def name(self, index: int) -> str:
        return str(self.items[index])

    def joined(self, other: Samples) -> Samples:
        """These images and then those of another split."""
        return type(self)([*self.items, *other.items], [*self.labels, *other.labels])

    def select(self, indices: Sequence[int]) -> Samples:
        return type(self)([self.items[i] for i in indices], [self.labels[i] for i in indices])


class ArraySamples(Samples):
    """Images held in memory as uint8 arrays (H, W) or (H, W, 3)."""

    def source(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.items[index])

    def name(self, index: int) -> str:
        return f"image {index}"


@dataclass
class Images:
    """A data set: class names in label order, its splits ("train", "val", "test", or "all" before splitting)."""

    name: str
    classes: list[str]
    splits: dict[str, Samples]
    notes: list[str] = field(default_factory=list)  # things a person should know about how the data was read
    data_config: dict[str, Any] = field(default_factory=dict)  # overrides the model's own preprocessing
    augment: str = "standard"
    multi_label: bool = False  # an image has any number of classes: labels are rows of 0 and 1

    def with_val(self, split: float | str, by_content: bool = False) -> Images:
        """The same data with a "train" and a "val" split: its own, or some held out of the rest.

        Args:
            split: a share, held out evenly over the classes, "last:N" for the last N images, or "fold:2/5" for the
                second of five parts, see `with_fold`.
            by_content: hold out those that a stream of the same data holds out, see `is_held_out`.

        Raises:
            UserError: `split` is none of these, or too few images to split.
        """
        fold = parse_fold(split)
        if fold is not None:
            return self.with_fold(*fold)
        share, last = parse_val_split(split)
        if "train" in self.splits and "val" in self.splits:
            if last:
                raise UserError(
                    f"--val-split {split}: {self.name} has a val split of its own, which is used; leave it out"
                )
            return self
        pool = "train" if "train" in self.splits else "all"
        if pool not in self.splits:
            raise UserError(f"{self.name} has {', '.join(self.splits)} but no train/ split: add a train/ folder")
        labels = self.splits[pool].labels
        if last:
            if last >= len(labels):
                raise UserError(
                    f"--val-split {split}: {self.name} has {len(labels)} images, none would be left to train on"
                )
            cut = len(labels) - last
            train, val = list(range(cut)), list(range(cut, len(labels)))
        elif by_content:
            held = [is_held_out(source, share) for source in self.splits[pool].sources()]
            train, val = ([i for i, is_val in enumerate(held) if is_val is wanted] for wanted in (False, True))
        else:
            # With several labels an image there are as many strata as combinations: alike, without regard to them.
            train, val = _stratified([0] * len(labels) if self.multi_label else labels, share)
        if not val:
            raise UserError(f"{self.name}: every class has a single image, none can be held out; add images or a val/")
        splits = {**self.splits, "train": self.splits[pool].select(train), "val": self.splits[pool].select(val)}
        splits.pop("all", None)
        note = (
            f"no val split: {len(val)} of {len(val) + len(train)} images held out for validation, the same every time"
        )
        if "test" in splits:
            note += "; test is left for `timm-cbam2 evaluate RUN --split test`"
        return replace(self, splits=splits, notes=[*self.notes, note])

    def with_fold(self, number: int, count: int) -> Images:
        """The same data with one of `count` equal parts as "val", alike over the classes, and the others as "train".

        A val split of the data's own is among what is divided; a test split is left alone.

        Raises:
            UserError: fewer images than folds.
        """
        from sklearn.model_selection import KFold, StratifiedKFold

        parts = [self.splits[split] for split in ("all", "train", "val") if split in self.splits]
        pool = parts[0] if len(parts) == 1 else parts[0].joined(parts[1])
        if len(pool) < count:
            raise UserError(f"--folds {count}: {self.name} has {len(pool)} images, fewer than folds")
        kind = KFold if self.multi_label else StratifiedKFold
        folds = kind(count, shuffle=True, random_state=SPLIT_SEED)
        with warnings.catch_warnings():  # of classes with fewer images than folds, which a run tells of
            warnings.filterwarnings("ignore", message="The least populated class")
            try:
                train, val = list(folds.split(pool.labels, None if self.multi_label else pool.labels))[number - 1]
            except ValueError as error:
                raise UserError(f"--folds {count}: every class of {self.name} has fewer images; give less") from error
        splits = {"train": pool.select(train.tolist()), "val": pool.select(val.tolist())}
        if "test" in self.splits:
            splits["test"] = self.splits["test"]
        note = f"fold {number} of {count}: {len(val)} of {len(pool)} images to validate on"
        return replace(self, splits=splits, notes=[*self.notes, note])


def parse_fold(split: float | str) -> tuple[int, int] | None:
    """ "fold:2/5" as (2, 5), None for anything else.

    Raises:
        UserError: there is no such fold.
    """
    found = re.fullmatch(r"fold:(\d+)/(\d+)", str(split))
    if found is None:
        return None
    number, count = int(found[1]), int(found[2])
    if not 1 <= number <= count or count < 2:
        raise UserError(f"--val-split {split}: there is no such fold; write one such as fold:1/5, up to fold:5/5")
    return number, count


def parse_val_split(split: float | str) -> tuple[float, int]:
    """0.2 or "0.2" as (0.2, 0), "last:500" as (0.0, 500).

    Raises:
        UserError: it is neither a share in (0, 1) nor "last:N".
    """
    last = re.fullmatch(r"last:(\d+)", str(split))
    if last and int(last[1]):
        return 0.0, int(last[1])
    try:
        share = float(split)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UserError(
            f"--val-split {split} is not a share of the images: give a number between 0 and 1, or last:N for the last N"
        )
    return share, 0


def is_held_out(source: str | bytes, share: float) -> bool:
    """Whether a stream holds an image out for validation, by its bytes or else by its folder and name.

    A row of a stream has no number that holds: files come in any order, and are divided among processes and workers.

    Args:
        source: what PIL can open.
        share: of the images that are held out, on average.
    """
    content = source if isinstance(source, bytes) else os.fsencode("/".join(Path(source).parts[-2:]))
    return zlib.crc32(content) < share * 2**32


def _stratified(labels: Sequence[int], fraction: float) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out: `fraction` of each class, at least one where there are two."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_class[label].append(index)
    generator = random.Random(SPLIT_SEED)
    held: set[int] = set()
    for label in sorted(by_class):
        members = by_class[label]
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held.update(generator.sample(members, count))
    return [i for i in range(len(labels)) if i not in held], sorted(held)
