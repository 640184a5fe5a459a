"""Data sets larger than the disk: read as they are used, a share for each process, resumed from the set's own state."""

from __future__ import annotations

import tarfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import UserError, one_line, require
from ..models.reach_cbam2 import unreachable
from .built_in import BUILT_IN
from .images import SPLITS, Images, Samples, is_held_out, parse_val_split
from .loading import build_transform, seeded
from .reading import UNREADABLE, read_image
from .stream_labels import describe
from .tables import choose_columns

__all__ = ["StreamedImages", "find_stream"]

NAMED, NAME_BYTES = 16, 240  # unreadable images that each worker keeps the names of
SHUFFLE_BUFFER = 2000  # images, undecoded, that are read and then given in an order of their own


class StreamSamples(Samples):
    """A split that is only read as it is used: its size and its rows that `keep` keeps, no labels in advance."""

    def __init__(self, table: Any, count: int, columns: tuple[str, str], index: dict[Any, int], keep: Any = None):
        super().__init__([], [])
        self.table, self.count, self.columns, self.index, self.keep = table, count, columns, index, keep

    def __len__(self) -> int:
        return self.count


def find_stream(data: str, image_column: str | None, label_column: str | None, val_split: float | str) -> Images:
    """Open a folder of parquet or WebDataset tar files, an image folder or a Hub data set without reading it.

    Classes come from the set's own description or, without one, from one pass over its label column. Where there is no
    validation split, some rows are held out, the same in any order and number of processes; how many is estimated.

    Raises:
        UserError: it cannot be streamed, has no train split, or does not say its classes.
    """
    require("datasets")
    import datasets

    if data in BUILT_IN:
        raise UserError(
            f"--streaming: {data} is in memory already; give --data a folder of parquet or tar files, or a Hub data set"
        )
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    share, last = parse_val_split(val_split)
    path = Path(data).expanduser()
    host = None if path.exists() else unreachable()
    if host is not None:
        raise UserError(f"--data {data}: no such folder, and {host} cannot be reached to stream a data set from")
    try:
        if path.is_file():
            kind = "webdataset" if path.suffix == ".tar" else "parquet"
            loaded = datasets.load_dataset(kind, data_files=str(path), streaming=True)
        else:
            loaded = datasets.load_dataset(str(path) if path.exists() else data, streaming=True)
    except (OSError, ValueError, RuntimeError, tarfile.TarError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--data {data} cannot be streamed: {one_line(error, 250)}") from error
    tables = {}
    for split, names in SPLITS.items():
        match = next((n for n in loaded if n.lower() in names), None)
        if match:
            tables[split] = loaded[match]
    if "train" not in tables:
        raise UserError(f"--data {data} has the splits {', '.join(loaded)}: one must be called train to be streamed")
    if tables["train"].features is None:  # such as CSV, whose columns are known when they have been read
        raise UserError(f"--data {data}: its files do not describe their columns: give parquet or tar files to stream")
    columns = choose_columns(data, tables["train"], image_column, label_column)
    classes, index, counts = describe(data, tables, columns[1])
    tables = {split: table.cast_column(columns[0], datasets.Image(decode=False)) for split, table in tables.items()}
    keep: dict[str, Any] = {}
    notes = [f"streamed: files come in another order each epoch, and {SHUFFLE_BUFFER} images at a time are shuffled"]
    if "val" not in tables:
        if last:
            raise UserError(f"--val-split {val_split}: with --streaming give a share, or data with a val split")
        tables["val"], total = tables["train"], counts["train"]
        keep = {"train": partial(_is_held_out, columns[0], share, False)}
        keep["val"] = partial(_is_held_out, columns[0], share, True)
        counts["val"] = min(max(round(total * share), 1), total - 1)
        counts["train"] = total - counts["val"]
        notes.append(f"no val split: about {100 * share:g} % of the images, told by their content, are held out")
    splits = {split: StreamSamples(tables[split], n, columns, index, keep.get(split)) for split, n in counts.items()}
    return Images(path.resolve().stem if path.exists() else data.replace("/", "_"), classes, splits, notes)


def _content(row: dict[str, Any], column: str) -> Any:
    """What PIL can open."""
    image = row[column] or {}
    return image.get("bytes") or image.get("path") or b""


def _is_held_out(column: str, share: float, wanted: bool, row: dict[str, Any]) -> bool:
    return is_held_out(_content(row, column), share) is wanted


class StreamedImages(IterableDataset):
    """This process's share of a stream, as (tensor (C, H, W), label, -1); unreadable images are counted and left out.

    To train, files come in an order of their own each epoch, and rows are read and shuffled a block at a time, so that
    a state is that of the table where the block begins, and a number within it: going on from there, no image is lost
    or given twice. (What is in the shuffle buffer of `datasets` itself would be lost.)

    Args:
        samples: the split.
        config: see `data_config`.
        augment: a key of `AUGMENT` to train, None to evaluate.
        seed: of order and augmentation.
        skip_bad: count unreadable images and go on, instead of stopping at the first.
        process: (index, number) of processes, among which the rows are divided.
        more: further arguments of timm's `create_transform`.
    """

    collate = None

    def __init__(
        self,
        samples: StreamSamples,
        config: dict[str, Any],
        augment: str | None,
        seed: int,
        skip_bad: bool,
        process: tuple[int, int],
        **more: Any,
    ):
        from datasets.distributed import split_dataset_by_node

        self.samples, self.seed, self.skip_bad, self.process = samples, seed, skip_bad, process
        self.training = augment is not None
        self.transform = build_transform(config, augment, **more)
        self.mode = "L" if config["input_size"][0] == 1 else "RGB"
        self.table = split_dataset_by_node(samples.table, *process)
        self.epoch = 0
        self.state: dict[str, Any] = {}
        self.loaded: dict[str, Any] | None = None
        # Shared memory: worker processes count and name them here.
        self.bad = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.bad_names = torch.zeros((NAMED, NAME_BYTES), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        """Images of the whole split, over all processes."""
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Which order and augmentation to give from the next iteration on."""
        self.epoch = epoch
        if self.training:  # by this number `datasets` shuffles the files, alike on every process
            self.table.set_epoch(1 + int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))

    def name(self, index: int) -> str:
        """Rows of a stream have no number to be found by."""
        return "an image of the stream"

    def _remember(self, name: str | None) -> None:
        """Count an unreadable image and, where it has a name, keep that of the first few."""
        free = (self.bad_names[:, 0] == 0).nonzero()
        if name and len(free) and name not in self.left_out():
            content = np.frombuffer(name.encode(errors="replace")[:NAME_BYTES], dtype=np.uint8).copy()
            self.bad_names[free[0, 0], : len(content)] = torch.from_numpy(content)
        self.bad += 1

    def left_out(self) -> list[str]:
        """Names of the first unreadable images of this process's share."""
        return [name for row in self.bad_names if (name := bytes(row.tolist()).rstrip(b"\0").decode(errors="replace"))]

    def check_headers(self) -> None:
        """Nothing can be checked in advance."""

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is."""
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there at the next iteration.

        Raises:
            ValueError: that is no place in a stream.
        """
        table, *counts = (state.get(name) for name in ("table", "block", "given"))
        if state and not (isinstance(table, (dict, type(None))) and all(type(c) is int and c >= 0 for c in counts)):
            raise ValueError(f"no place in a stream: {one_line(repr(state), 80)}")
        self.loaded = dict(state)

    def _rows(self, stream: tuple[int, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbered rows of this share; when training, in the order that `stream` and the number of a block give."""
        if not self.training:
            yield from enumerate(filter(self.samples.keep, self.table))
            return
        self.state, self.loaded = self.loaded or {"table": None, "block": 0, "given": 0}, None
        if self.state["table"] is not None:
            self.table.load_state_dict(self.state["table"])
        # The state of a filter of `datasets` itself loses rows in datasets 4.0.
        rows = filter(self.samples.keep, self.table)
        while block := list(islice(rows, SHUFFLE_BUFFER)):
            number = self.state["block"]
            after = {"table": self.table.state_dict(), "block": number + 1, "given": 0}
            order = np.random.default_rng((*stream, number)).permutation(len(block))
            for index in order[self.state["given"] :].tolist():
                self.state["given"] += 1
                yield number * SHUFFLE_BUFFER + index, block[index]
            self.state = after

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        image_column, label_column = self.samples.columns
        worker = torch.utils.data.get_worker_info()
        stream = (self.seed, self.epoch, self.process[0], worker.id if worker else 0)
        for number, row in self._rows(stream):
            try:
                image = read_image(_content(row, image_column), self.mode)
            except UNREADABLE as error:
                if not self.skip_bad:
                    name = (row[image_column] or {}).get("path") or f"row {number} of the stream"
                    raise UserError(
                        f"cannot read {name} as an image ({one_line(error, 150)}): leave such images out with "
                        "--skip-bad-images"
                    ) from error
                self._remember((row[image_column] or {}).get("path"))
                continue
            label = self.samples.index.get(row[label_column])
            if label is None:
                raise UserError(
                    f"row {number} of the stream: column '{label_column}' holds {row[label_column]!r}, which names no "
                    "class; remove such rows"
                )
            if not self.training:
                yield self.transform(image), label, -1
                continue
            with seeded(*stream, number):
                tensor = self.transform(image)
            yield tensor, label, -1
