"""Classes of unequal size: draw each equally often, let each count equally, and say what a person should know."""

from __future__ import annotations

from typing import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import WeightedRandomSampler

from ..errors import require
from .images import Images

__all__ = ["BALANCE", "BalancedSampler", "balance_notes", "class_weights"]

BALANCE = ("none", "sampler", "weights")
RARE = 10  # a class with so many times fewer images than the largest one is called rare


def class_weights(images: Images) -> Tensor:
    """What each class counts so that all count equally: images / (classes · images of the class), (K,), float32.

    With several labels an image, what the positives of a class count so that they weigh as much as its negatives:
    negatives / positives. A class without any image counts 1. "Logistic regression in rare events data" (King, Zen,
    2001), by scikit-learn.
    """
    require("sklearn")
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array(images.splits["train"].labels)
    weights = torch.ones(len(images.classes))
    if not images.multi_label:
        present = np.unique(labels)
        found = compute_class_weight("balanced", classes=present, y=labels)
        weights[torch.from_numpy(present)] = torch.from_numpy(found).float()
        return weights
    for number, column in enumerate(labels.T):
        if 0 < column.sum() < len(column):
            absent, present = compute_class_weight("balanced", classes=np.array([0, 1]), y=column)
            weights[number] = present / absent
    return weights


class BalancedSampler(WeightedRandomSampler):
    """As many indices as there are images, drawn with replacement so that each class is expected equally often.

    The order is a function of (seed, epoch), which is what a run needs to be resumed in the middle of an epoch. The
    n-th repetition of image `i` is the index `n * count + i`, by which `ImageDataset` augments it in its own way.

    Args:
        labels: class of each image.
        seed: of the order.
    """

    def __init__(self, labels: Sequence[int], seed: int = 0):
        counts = torch.bincount(torch.tensor(labels))
        super().__init__((1.0 / counts)[torch.tensor(labels)], len(labels), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Which order to give from the next iteration on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]))
        drawn = [0] * len(self)
        for index in super().__iter__():
            yield drawn[index] * len(self) + index
            drawn[index] += 1


def balance_notes(images: Images, balance: str) -> list[str]:
    """What a person should know: rare classes, those with one image, and those that validation or training lacks."""
    if not images.splits["train"].labels:  # a stream's are not known in advance
        return []
    counts, held = (_counts(images, split) for split in ("train", "val"))
    notes = []
    lacking, single = counts == 0, counts == 1
    if lacking.any():
        notes.append(f"no image to train on of {_some(images, lacking)}: such a class cannot be learnt")
    if single.any():
        notes.append(f"a single image to train on of {_some(images, single)}: add images of it")
    rare = (counts * RARE <= counts.max()) & (counts > 1)
    if rare.any():
        advice = "" if balance != "none" else ": --balance sampler or --balance weights makes up for it"
        least = int(counts[rare].min())
        notes.append(
            f"few images of {_some(images, rare)} ({least} to train on; {int(counts.max())} of the largest){advice}"
        )
    absent = (held == 0) & ~lacking
    if absent.any():
        notes.append(f"no validation image of {_some(images, absent)}: how well it is told apart is not measured")
    return notes


def _counts(images: Images, split: str) -> Tensor:
    """Images of each class, (K,)."""
    labels = torch.from_numpy(np.array(images.splits[split].labels, dtype=np.int64))
    return labels.sum(0) if images.multi_label else torch.bincount(labels, minlength=len(images.classes))


def _some(images: Images, chosen: Tensor) -> str:
    """The names of the chosen classes, at most five of them."""
    names = [images.classes[i] for i in chosen.nonzero().flatten().tolist()]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{'class' if len(names) == 1 else 'the classes'} {', '.join(names[:5])}{more}"
