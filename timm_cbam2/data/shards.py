"""WebDataset shards: tar files in which an image and its class lie side by side, as 000123.jpg and 000123.cls."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..files import write_whole

__all__ = ["labels_in", "shards_of"]

THREADS = 8


def shards_of(table: Any) -> list[str]:
    """Paths of the tar files that a streamed split of `datasets` is read from; none if it is of another kind."""
    if table.info.builder_name != "webdataset":
        return []
    return list(table._ex_iterable.kwargs["tar_paths"])


def labels_in(files: list[str], column: str) -> dict[str, int] | None:
    """How often each label occurs in tar files on this machine, read from headers and labels, not from images.

    It is remembered for the same files, by their size and time, in Hugging Face's cache.

    Args:
        files: paths of the shards.
        column: the end of the names that hold labels, such as "cls"; whole numbers or text.

    Returns:
        Counts by label as text, or None where there are none or one lies on another machine.

    Raises:
        UserError: a shard cannot be read.
    """
    paths = [Path(file) for file in files]
    if not paths or not all(path.is_file() for path in paths):
        return None
    place = _place(paths, column)
    if place.is_file():
        return json.loads(place.read_text(encoding="utf-8"))
    found: dict[str, int] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for counts in pool.map(lambda path: _labels(path, column), paths):
            for label, count in counts.items():
                found[label] = found.get(label, 0) + count
    with suppress(OSError):  # where nothing can be written, the next run reads them again
        write_whole(place, json.dumps(found).encode())
    return found


def _labels(path: Path, column: str) -> dict[str, int]:
    found: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isfile() and os.path.basename(member.name).partition(".")[2] == column:
                    content: Any = shard.extractfile(member)
                    label = content.read().decode().strip()
                    found[label] = found.get(label, 0) + 1
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(
            f"shard {path} cannot be read ({one_line(error, 150)}): write it again, or leave it out"
        ) from error
    return found


def _place(paths: list[Path], column: str) -> Path:
    from huggingface_hub import cached_assets_path

    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    digest = hashlib.sha256(repr((column, states)).encode())
    return cached_assets_path("timm_cbam2", "shards") / f"{digest.hexdigest()[:32]}.json"
