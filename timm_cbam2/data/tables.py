"""Labelled images in tables: parquet and arrow files, folders of them, data sets on the Hub."""

from __future__ import annotations

import sys
import tarfile
from pathlib import Path
from typing import Any, Iterator, Sequence

from ..errors import UserError, one_line, require
from ..models.reach_cbam2 import unreachable
from .images import SPLITS, Images, Samples
from .labels import choose_label_column, encode, indicator_names

__all__ = ["RowSamples", "choose_columns", "from_tables", "has_metadata"]

METADATA = ("csv", "jsonl", "parquet")


class RowSamples(Samples):
    """Rows of a `datasets.Dataset` whose image column is undecoded, so that a bad image is ours to name."""

    def __init__(self, items: Any, labels: Sequence[int], column: str):
        super().__init__(items, labels)
        self.column = column

    def source(self, index: int) -> Any:
        return self._content(self.items[index][self.column])

    def sources(self) -> Iterator[Any]:
        for rows in self.items.select_columns(self.column).iter(1000):
            yield from map(self._content, rows[self.column])

    @staticmethod
    def _content(image: dict[str, Any] | None) -> Any:
        image = image or {}
        return image.get("bytes") or image.get("path") or b""

    def name(self, index: int) -> str:
        path = (self.items[index][self.column] or {}).get("path")
        return f"row {index} of column '{self.column}'" + (f" ({path})" if path else "")

    def joined(self, other: Samples) -> Samples:
        from datasets import concatenate_datasets

        return RowSamples(concatenate_datasets([self.items, other.items]), [*self.labels, *other.labels], self.column)

    def select(self, indices: Sequence[int]) -> Samples:
        return RowSamples(self.items.select(indices), [self.labels[i] for i in indices], self.column)


def from_tables(
    data: str, path: Path | None, image_column: str | None, label_column: str | None, several: bool = False
) -> Images:
    """Read a parquet/arrow file or folder at `path`, an image folder with metadata, or else the Hub data set `data`.

    With `several`, the texts of the label column hold several labels each, or there is a column of 0 and 1 for each.

    Raises:
        UserError: it cannot be read, or it is not clear which columns hold images and labels.
    """
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
    image_column, label_column, values = _columns(data, splits, image_column, label_column, several)
    notes = []
    if "test" in splits and any(v is None or v == -1 for v in values["test"]):
        notes.append("the test split hides its labels: left out")
        del splits["test"], values["test"]
    found = encode(data, label_column, first.features.get(label_column), values, several)
    from datasets import Image

    samples = {
        split: RowSamples(table.cast_column(image_column, Image(decode=False)), found.splits[split], image_column)
        for split, table in splits.items()
    }
    name = path.resolve().stem if path else data.replace("/", "_")
    return Images(name, found.classes, samples, notes, multi_label=found.several)


def _columns(
    data: str, splits: dict[str, Any], image_column: str | None, label_column: str | None, several: bool
) -> tuple[str, str, dict[str, list[Any]]]:
    """The columns of images and labels, and the labels by split; `several` may stand in columns of 0 and 1."""
    first = next(iter(splits.values()))
    try:
        image_column, label_column = choose_columns(data, first, image_column, label_column)
    except UserError:
        if not several or label_column is not None:
            raise
        image_column = _image_column(data, first, image_column)
        names = [n for n in first.column_names if n != image_column]
        tables = {split: table.select_columns(names)[:] for split, table in splits.items()}
        return image_column, ", ".join(names[:3]), {s: indicator_names(data, table) for s, table in tables.items()}
    return image_column, label_column, {s: t.select_columns(label_column)[:][label_column] for s, t in splits.items()}


def has_metadata(folder: Path) -> bool:
    """Whether metadata.csv, .jsonl or .parquet says what is in the images of a folder, or of those inside it."""
    return any(next(folder.glob(f"{below}metadata.{end}"), None) for below in ("", "*/") for end in METADATA)


def _load_tables(data: str, path: Path | None) -> dict[str, Any]:
    require("datasets")
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it would log is raised, too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    host = unreachable() if path is None else None
    try:
        if path is None:
            # It would try five times.
            datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or host is not None
            loaded = datasets.load_dataset(data)
        elif path.is_file() and path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files=str(path))
        elif path.is_file() and path.suffix == ".arrow":
            loaded = datasets.Dataset.from_file(str(path))
        elif path.is_file() and path.suffix == ".tar":
            loaded = datasets.load_dataset("webdataset", data_files=str(path))
        elif path.is_file():
            raise UserError(
                f"--data {data} is a {path.suffix or 'plain'} file: give a folder, or a .parquet, .arrow or .tar file"
            )
        elif (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            loaded = datasets.load_from_disk(str(path))
        elif has_metadata(path):
            loaded = datasets.load_dataset("imagefolder", data_dir=str(path))
        else:
            loaded = datasets.load_dataset(str(path))
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        what = "no such folder, and as a Hub data set it cannot be read" if path is None else "cannot be read"
        if host is not None:
            raise UserError(
                f"--data {data}: no such folder, no data set in the cache, and {host} cannot be reached: go online once"
            ) from error
        raise UserError(f"--data {data}: {what}: {one_line(error, 250)}") from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def choose_columns(data: str, table: Any, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The columns of images and labels: those asked for, or else those that look like it.

    Raises:
        UserError: there is no such column, it holds no images, or it takes a person to choose.
    """
    from datasets import Image

    image_column = _image_column(data, table, image_column)
    kind = table.features[image_column]
    if not isinstance(kind, (Image, dict)) and getattr(kind, "dtype", None) not in ("string", "binary", "large_binary"):
        raise UserError(
            f"{data}: column '{image_column}' holds {getattr(kind, 'dtype', kind)}, no images: say which one does with "
            f"--image-column, of {', '.join(table.column_names)}"
        )
    return image_column, _label_column(data, table, image_column, label_column)


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
    from datasets import ClassLabel

    others = [n for n in table.column_names if n != image_column]
    return choose_label_column(data, others, asked, [n for n in others if isinstance(table.features[n], ClassLabel)])
