"""Where labelled images come from: image folders, parquet/arrow/Hub data sets, scikit-learn's digits."""

from __future__ import annotations

import os
import random
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Sequence

from .errors import UserError, one_line, require

__all__ = ["Images", "Samples", "find_images"]

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


class RowSamples(Samples):
    """Rows of a `datasets.Dataset` whose image column is undecoded, so that a bad image is ours to name."""

    def __init__(self, items: Any, labels: Sequence[int], column: str):
        super().__init__(items, labels)
        self.column = column

    def source(self, index: int) -> Any:
        image = self.items[index][self.column] or {}
        return image.get("bytes") or image.get("path") or b""

    def name(self, index: int) -> str:
        path = (self.items[index][self.column] or {}).get("path")
        return f"row {index} of column '{self.column}'" + (f" ({path})" if path else "")

    def select(self, indices: Sequence[int]) -> Samples:
        return RowSamples(self.items.select(indices), [self.labels[i] for i in indices], self.column)


@dataclass
class Images:
    """A data set: class names in label order, its splits ("train", "val", "test", or "all" before splitting)."""

    name: str
    classes: list[str]
    splits: dict[str, Samples]
    notes: list[str] = field(default_factory=list)  # things a person should know about how the data was read
    data_config: dict[str, Any] = field(default_factory=dict)  # overrides the model's own preprocessing
    augment: str = "standard"

    def with_val(self, fraction: float) -> Images:
        """The same data with a "train" and a "val" split: its own, or a stratified share held out of the rest.

        Raises:
            UserError: `fraction` is not in (0, 1), or too few images to split.
        """
        if "train" in self.splits and "val" in self.splits:
            return self
        if not 0 < fraction < 1:
            raise UserError(f"--val-split {fraction} is not a share of the images: give a number between 0 and 1")
        pool = "train" if "train" in self.splits else "all"
        if pool not in self.splits:
            raise UserError(f"{self.name} has {', '.join(self.splits)} but no train/ split: add a train/ folder")
        train, val = _stratified(self.splits[pool].labels, fraction)
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


def find_images(data: str, image_column: str | None = None, label_column: str | None = None) -> Images:
    """Read `data`: "digits", an image folder, a parquet/arrow file or folder, or a Hub data set "owner/name".

    An image folder holds one folder per class, either directly or below train/, val/ and test/.

    Raises:
        UserError: nothing there, no images, an empty class, a single class, class sets that differ between splits.
    """
    path = Path(data).expanduser()
    if path.exists():
        if path.is_file() or _holds_tables(path):
            images = _from_tables(data, path, image_column, label_column)
        else:
            images = _from_folder(path)
    elif data == "digits":
        images = _digits()
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", data) and not path.parent.exists():
        images = _from_tables(data, None, image_column, label_column)
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


def _holds_tables(folder: Path) -> bool:
    """True for a folder of parquet/arrow files, or one written by `save_to_disk`."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*.arrow", "*/*.parquet", "*/*.arrow"))


def _from_tables(data: str, path: Path | None, image_column: str | None, label_column: str | None) -> Images:
    loaded = _load_tables(data, path)
    splits = {}
    for split, names in SPLITS.items():
        matches = [n for n in loaded if n.lower() in names]
        if matches:
            splits[split] = loaded[matches[0]]
    if not ({"train", "val"} & splits.keys()) and len(loaded) == 1:
        splits = {"all": next(iter(loaded.values()))}
    elif list(splits) == ["train"] and len(loaded) == 1:
        splits = {"all": splits["train"]}  # `datasets` calls whatever it finds "train"
    if not splits:
        raise UserError(f"{data} has the splits {', '.join(loaded)}: one must be called train")
    first = next(iter(splits.values()))
    image_column = _image_column(data, first, image_column)
    label_column = _label_column(data, first, image_column, label_column)
    values = {split: table.select_columns(label_column)[:][label_column] for split, table in splits.items()}
    notes = []
    if "test" in splits and {-1, None} & set(values["test"]):
        notes.append("the test split hides its labels: left out")
        del splits["test"], values["test"]
    classes, index = _class_names(data, first.features[label_column], label_column, values)
    from datasets import Image

    samples = {
        split: RowSamples(
            table.cast_column(image_column, Image(decode=False)), [index[v] for v in values[split]], image_column
        )
        for split, table in splits.items()
    }
    name = path.resolve().stem if path else data.replace("/", "_")
    return Images(name, classes, samples, notes)


def _load_tables(data: str, path: Path | None) -> dict[str, Any]:
    require("datasets")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is raised, too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if path is None:
            loaded = datasets.load_dataset(data)
        elif path.is_file() and path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        elif path.is_file() and path.suffix == ".arrow":
            loaded = datasets.Dataset.from_file(str(path))
        elif path.is_file():
            raise UserError(
                f"--data {data} is a {path.suffix or 'plain'} file: give a folder, or a .parquet/.arrow file"
            )
        elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        what = "no such folder, and as a Hub data set it cannot be read" if path is None else "cannot be read"
        raise UserError(f"--data {data}: {what}: {one_line(error, 250)}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _image_column(data: str, table: Any, asked: str | None) -> str:
    if asked is not None:
        if asked not in table.column_names:
            raise UserError(f"--image-column {asked}: {data} has the columns {', '.join(table.column_names)}")
        return asked
    from datasets import Image

    typed = [n for n, kind in table.features.items() if isinstance(kind, Image)]
    named = [n for n in table.column_names if n.lower() in ("image", "img", "picture", "pixel_values")]
    columns = typed or named
    if len(columns) != 1:
        raise UserError(
            f"{data}: say which column holds the images with --image-column, one of "
            f"{', '.join(columns or table.column_names)}"
        )
    return columns[0]


def _label_column(data: str, table: Any, image_column: str, asked: str | None) -> str:
    others = [n for n in table.column_names if n != image_column]
    if asked is not None:
        if asked not in others:
            raise UserError(f"--label-column {asked}: {data} has the columns {', '.join(others)}")
        return asked
    from datasets import ClassLabel

    typed = [n for n in others if isinstance(table.features[n], ClassLabel)]
    named = [n for n in others if n.lower() in ("label", "labels", "class", "target", "category")]
    columns = typed or named
    if len(columns) != 1:
        raise UserError(
            f"{data}: say which column holds the labels with --label-column, one of {', '.join(columns or others)}"
        )
    return columns[0]


def _class_names(data: str, kind: Any, column: str, values: dict[str, list[Any]]) -> tuple[list[str], dict[Any, int]]:
    """Class names in label order, and the class index of each value of the label column."""
    from datasets import ClassLabel

    seen = {split: Counter(labels) for split, labels in values.items()}
    everything = set().union(*seen.values())
    bad = [v for v in everything if not isinstance(v, (int, str)) or v == -1]
    if bad:
        raise UserError(f"{data}: column '{column}' holds {bad[0]!r}, which names no class; remove those rows")
    if isinstance(kind, ClassLabel):
        beyond = [v for v in everything if not 0 <= v < len(kind.names)]
        if beyond:
            raise UserError(f"{data}: label {beyond[0]} in column '{column}', which names {len(kind.names)} classes")
        return list(kind.names), {i: i for i in range(len(kind.names))}
    for split, counts in seen.items():
        missing = sorted(everything - counts.keys(), key=str)
        if missing:
            raise UserError(
                f"{data}: the {split} split lacks the classes {', '.join(map(str, missing[:10]))}; "
                "every split needs the same classes"
            )
    ordered = sorted(everything)
    return [str(v) for v in ordered], {v: i for i, v in enumerate(ordered)}
