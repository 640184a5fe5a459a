"""The loader of a stream, and the place in it that a run goes on from."""

from __future__ import annotations

import warnings
from typing import Any, Iterator

import torch

from ..errors import UserError, require
from .loading import start_worker
from .stream import StreamedImages

__all__ = ["in_turns", "load_place", "make_stream_loader", "place"]


def make_stream_loader(dataset: StreamedImages, batch_size: int, workers: int) -> Any:
    """torchdata's loader, which knows where each of its worker processes is.

    Raises:
        UserError: torchdata is not installed.
    """
    require("torchdata", extra="stream")
    from torchdata.stateful_dataloader import StatefulDataLoader

    # torchdata 0.11 calls what torch 2.14 has deprecated.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    shards = getattr(dataset.table, "num_shards", 1)
    return StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=min(workers, shards),
        drop_last=dataset.training,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
    )


def place(loader: Any) -> tuple[int, Any]:
    """Where each worker of a stream's loader is, to go on from with `load_place`."""
    return loader.num_workers, loader.state_dict()


def load_place(loader: Any, saved: tuple[int, Any]) -> None:
    """Go on from there at the next iteration.

    Raises:
        UserError: there was another number of workers.
    """
    workers, state = saved
    if workers != loader.num_workers:
        raise UserError(
            f"cannot resume: --workers was {workers} and is now {loader.num_workers}, and each has its own place in "
            f"the stream: give --workers {workers}"
        )
    loader.load_state_dict(state)


def in_turns(loader: Any, count: int) -> Iterator[Any]:
    """`count` batches; a share that is a little smaller than the others' starts again.

    Raises:
        UserError: the share makes no batch at all.
    """
    made, idle = 0, False
    while made < count:
        before = made
        for batch in loader:
            yield batch
            made += 1
            if made == count:
                return
        if idle and made == before:
            raise UserError(
                f"a process's share of the stream makes no batch of {loader.batch_size}: lower --batch-size"
            )
        idle = made == before
