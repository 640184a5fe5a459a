"""Where labelled images come from: image folders, scikit-learn's digits, and tables (see tables.py)."""

from __future__ import annotations

import math
import os
import random
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from ..errors import UserError, require

__all__ = ["Images", "Samples", "check_apart", "find_images", "images_of_run", "is_held_out", "parse_val_split"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
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

    def with_val(self, split: float | str, by_content: bool = False) -> Images:
        """The same data with a "train" and a "val" split: its own, or some held out of the rest.

        Args:
            split: a share, held out evenly over the classes, or "last:N" for the last N images.
            by_content: hold out those that a stream of the same data holds out, see `is_held_out`.

        Raises:
            UserError: `split` is not in (0, 1) nor "last:N", or too few images to split.
        """
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
            train, val = _stratified(labels, share)
        if not val:
            raise UserError(f"{self.name}: every class has a single image, none can be held out; add images or a val/")
        splits = {**self.splits, "train": self.splits[pool].select(train), "val": self.splits[pool].select(val)}
        splits.pop("all", None)
        note = (
            f"no val split: {len(val)} of {len(val) + len(train)} images held out for validation, the same every time"
        )
        if "test" in splits:
            note += "; test is left for `timm-cbam2 evaluate RUN --split test`"
        return Images(self.name, self.classes, splits, [*self.notes, note], self.data_config, self.augment)


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
    content = source if isinstance(source, bytes) else "/".join(Path(source).parts[-2:]).encode()
    return zlib.crc32(content) < share * 2**32


def images_of_run(
    run: Mapping[str, Any],
    image_column: str | None = None,
    label_column: str | None = None,
    val_split: float | str | None = None,
) -> Images:
    """The images of a run with these settings (run.json), and the split that it made, unless another is asked for.

    Raises:
        UserError: see `find_images` and `Images.with_val`.
    """
    columns = image_column or run.get("image_column"), label_column or run.get("label_column")
    split = run.get("val_split", 0.2) if val_split is None else val_split
    return find_images(run["data"], *columns).with_val(split, val_split is None and bool(run.get("streaming")))


def find_images(data: str, image_column: str | None = None, label_column: str | None = None) -> Images:
    """Read `data`: "digits", an image folder, a parquet/arrow file or folder, or a Hub data set "owner/name".

    An image folder holds one folder per class, either directly or below train/, val/ and test/.

    Raises:
        UserError: nothing there, no images, an empty class, a single class, class sets that differ between splits.
    """
    from .tables import from_tables

    path = Path(data).expanduser()
    if os.path.exists(path):  # which, unlike Path's, takes a name of any length
        if path.is_file() or _holds_tables(path):
            images = from_tables(data, path, image_column, label_column)
        else:
            images = _from_folder(path)
    elif data == "digits":
        images = _digits()
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", data) and not os.path.exists(path.parent):
        images = from_tables(data, None, image_column, label_column)
    else:
        raise UserError(
            f"--data {data}: no such folder or file; give a folder with one folder of images per class, "
            "a parquet or arrow file or folder, a Hub data set written owner/name, or digits"
        )
    if len(images.classes) < 2:
        only = f"only one class, '{images.classes[0]}'" if images.classes else "no class"
        raise UserError(f"--data {data} has {only}: a classifier needs at least two, each in its own folder")
    return images


def _digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8x8 scans with 17 grey levels; a fifth of each class is held out."""
    require("sklearn")
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    samples = ArraySamples(list(pixels), digits.target.tolist())
    images = Images("digits", [str(n) for n in digits.target_names], {"all": samples}).with_val(0.2)
    # A digit fills its scan: cropping the border or mirroring it would change what it says.
    return Images("digits", images.classes, images.splits, [], {"crop_pct": 1.0}, augment="light")


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


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def _from_folder(folder: Path) -> Images:
    children = {child.name.lower(): child for child in _subfolders(folder)}
    found = {split: children[n] for split, names in SPLITS.items() for n in names if n in children}
    notes: list[str] = []
    if "train" not in found and "val" not in found:
        found = {"all": folder}
    classes: list[str] = []
    splits = {}
    for split, where in found.items():
        names = [child.name for child in _subfolders(where)]
        if not names:
            loose = "images but " if any(p.suffix.lower() in EXTENSIONS for p in where.iterdir()) else ""
            raise UserError(f"{where} has {loose}no class folders: put the images of each class in a folder of its own")
        if classes and names != classes:
            extra, missing = sorted(set(names) - set(classes)), sorted(set(classes) - set(names))
            parts = [f"has {', '.join(extra)} too" if extra else "", f"lacks {', '.join(missing)}" if missing else ""]
            first = next(iter(found.values()))
            raise UserError(
                f"{where} and {first} differ: {where.name}/ {' and '.join(filter(None, parts))}; "
                "every split needs the same class folders"
            )
        classes = names
        splits[split] = _class_folders(where, names, notes)
    return Images(folder.resolve().name, classes, splits, notes)


def _class_folders(folder: Path, classes: list[str], notes: list[str]) -> Samples:
    files: list[str] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label, name in enumerate(classes):
        before = len(files)
        for root, folders, names in os.walk(folder / name, followlinks=True):
            folders.sort()
            for file in sorted(names):
                if file.lower().endswith(EXTENSIONS) and not file.startswith("."):
                    files.append(os.path.join(root, file))
                elif not file.startswith("."):
                    skipped.append(os.path.join(root, file))
        if len(files) == before:
            raise UserError(
                f"class folder {folder / name} has no images ({', '.join(EXTENSIONS)}): add some, or remove the folder"
            )
        labels += [label] * (len(files) - before)
    if skipped:
        notes.append(f"{len(skipped)} files that are not images were left out, such as {skipped[0]}")
    return Samples(files, labels)


def check_apart(output: Path, data: str) -> None:
    """Make sure that what is written to `output` will not be taken for images of `data`.

    Raises:
        UserError: it would.
    """
    root = Path(data).expanduser().resolve()
    output = output.resolve()
    if data == "digits" or not os.path.isdir(root) or root not in (output, *output.parents):
        return
    of_splits = {name for names in SPLITS.values() for name in names}
    has_splits = any(child.name.lower() in (*SPLITS["train"], *SPLITS["val"]) for child in _subfolders(root))
    first = output.relative_to(root).parts[:1]
    if not has_splits or _holds_tables(root) or not first or first[0].lower() in of_splits:
        raise UserError(
            f"--output {output} lies among the images of --data {data}, and would be taken for some of them: give a "
            "folder elsewhere"
        )


def _holds_tables(folder: Path) -> bool:
    """True for a folder of parquet/arrow files, or one written by `save_to_disk`."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow"))
