"""Repeated augmentation: an image occurs several times in a batch, each time augmented anew."""

from __future__ import annotations

from typing import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["RepeatedSampler"]


class RepeatedSampler(Sampler[int]):
    """Indices for an epoch of `count` images, of which each that occurs does so `repeats` times in a row.

    "Augment your batch" (Hoffer et al., 2020, https://arxiv.org/abs/1901.09335), also called repeated augmentation. An
    epoch is as long as without it and sees one image in `repeats`. As with timm's RepeatAugSampler, the copies of an
    image go to different processes where there are several; unlike there, the order is a function of (seed, epoch),
    which is what a run needs to be resumed in the middle of an epoch.

    The copy `n` of image `i` is the index `n * count + i`, by which `ImageDataset` augments it in its own way.

    Args:
        count: number of images.
        repeats: how often each occurs.
        batch_size: of one process.
        processes: among which Accelerate deals the batches in turn.
        seed: of the order.
    """

    def __init__(self, count: int, repeats: int, batch_size: int, processes: int = 1, seed: int = 0):
        self.count, self.repeats, self.batch_size, self.processes = count, repeats, batch_size, processes
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        """Which order to give from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.count, generator=generator)
        copies = torch.arange(self.repeats) * self.count
        indices = (order[:, None] + copies).flatten()[: self.count]  # image by image, its copies side by side
        step = self.batch_size * self.processes
        whole = len(indices) // step * step
        # Each step's indices are dealt to the processes one by one, while Accelerate deals whole batches.
        dealt = indices[:whole].view(-1, self.batch_size, self.processes).transpose(1, 2).flatten()
        yield from torch.cat([dealt, indices[whole:]]).tolist()
