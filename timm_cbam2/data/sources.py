"""Where labelled images come from: image folders, tables (tables.py), and what is made on the spot (built_in.py)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Mapping

from ..errors import UserError
from .built_in import BUILT_IN, made
from .folders import from_folder, subfolders
from .images import SPLITS, Images
from .labels_file import from_labels_file
from .tables import from_tables, has_metadata

__all__ = ["check_apart", "find_images", "images_of_run"]


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
    more = dict(labels=run.get("labels"), several=bool(run.get("multi_label")))
    split = run.get("val_split", 0.2) if val_split is None else val_split
    return find_images(run["data"], *columns, **more).with_val(split, val_split is None and bool(run.get("streaming")))


def find_images(
    data: str,
    image_column: str | None = None,
    label_column: str | None = None,
    labels: str | None = None,
    several: bool = False,
) -> Images:
    """Read `data`: an image folder, a parquet/arrow file or folder, a Hub data set "owner/name", "digits" or "clutter".

    An image folder holds one folder per class, either directly or below train/, val/ and test/; or metadata.csv or
    .jsonl as `datasets` reads it; or `labels` is a table that says what is in each image. With `several`, a label is a
    text of several, or there is a column of 0 and 1 for each class; lists are several anyway.

    Raises:
        UserError: nothing there, no images, an empty class, a single class, or one without training images.
    """
    path = Path(data).expanduser()
    if os.path.exists(path):  # which, unlike Path's, takes a name of any length
        if labels is not None and path.is_dir():
            images = from_labels_file(path, labels, image_column, label_column, several)
        elif path.is_file() or _holds_tables(path) or has_metadata(path):
            images = from_tables(data, path, image_column, label_column, several)
        else:
            images = from_folder(path)
    elif data in BUILT_IN:
        images = made(data)
    elif re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", data) and not os.path.exists(path.parent):
        images = from_tables(data, None, image_column, label_column, several)
    else:
        raise UserError(
            f"--data {data}: no such folder or file; give a folder with one folder of images per class, "
            "a parquet or arrow file or folder, a Hub data set written owner/name, digits, or clutter"
        )
    if labels is not None and not os.path.isdir(path):
        raise UserError(f"--labels says what is in the images of a folder, and --data {data} is none")
    if several and not images.multi_label:
        raise UserError(
            f"--multi-label: {data} tells classes by folders, one for each image: give a table, metadata.csv, or "
            "--labels FILE"
        )
    if len(images.classes) < 2:
        only = f"only one class, '{images.classes[0]}'" if images.classes else "no class"
        raise UserError(f"--data {data} has {only}: a classifier needs at least two, each in its own folder")
    return images


def check_apart(output: Path, data: str) -> None:
    """Make sure that what is written to `output` will not be taken for images of `data`.

    Raises:
        UserError: it would.
    """
    root = Path(data).expanduser().resolve()
    output = output.resolve()
    if data in BUILT_IN or not os.path.isdir(root) or root not in (output, *output.parents):
        return
    of_splits = {name for names in SPLITS.values() for name in names}
    has_splits = any(child.name.lower() in (*SPLITS["train"], *SPLITS["val"]) for child in subfolders(root))
    first = output.relative_to(root).parts[:1]
    if not has_splits or _holds_tables(root) or has_metadata(root) or not first or first[0].lower() in of_splits:
        raise UserError(
            f"--output {output} lies among the images of --data {data}, and would be taken for some of them: give a "
            "folder elsewhere"
        )


def _holds_tables(folder: Path) -> bool:
    """True for a folder of parquet, arrow or tar files, or one written by `save_to_disk`."""
    kinds = ("parquet", "arrow", "tar")
    return any(next(folder.glob(f"{where}*.{kind}"), None) for kind in kinds for where in ("", "*/"))
