"""What folding changes: accuracy where labels are given, otherwise the outputs."""

from __future__ import annotations

from typing import Any, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .probe import plain

__all__ = ["answer", "compared"]


def answer(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """What a network says of a batch, as rows (B, N), and the labels (B,) where the batch has some it can get right.

    Where it does not classify, everything it says is one row (1, N).

    Raises:
        ValueError: it says nothing in floating-point numbers.
    """
    inputs, labels = _split(batch)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    given = model(*(_moved(value, place) for value in inputs))
    given = getattr(given, "logits", given)
    leaves = [leaf for leaf in tree_leaves(plain(given)) if torch.is_tensor(leaf) and leaf.is_floating_point()]
    if not leaves:
        raise ValueError(f"{type(model).__name__} gave no tensor of numbers for a batch of data")
    if torch.is_tensor(given) and given.ndim == 2 and given.shape[1] > 1:
        fits = labels is not None and labels.ndim == 1 and not labels.is_floating_point()
        return given.float().cpu(), labels.cpu() if labels is not None and fits else None
    return torch.cat([leaf.flatten() for leaf in leaves])[None].float().cpu(), None


@torch.no_grad()
def compared(before: nn.Module, after: nn.Module, data: Iterable[Any]) -> str:
    """What differs between two networks on `data`, in words."""
    images, right, moved, size, unlike = 0, [0, 0], 0.0, 0.0, 0
    for batch in data:
        (old, labels), (new, _) = answer(before, batch), answer(after, batch)
        if labels is not None:
            images += len(labels)
            right = [count + int((rows.argmax(1) == labels).sum()) for count, rows in zip(right, (old, new))]
        elif old.shape == new.shape:
            moved += float((old - new).double().square().sum())
            size += float(old.double().square().sum())
        else:
            unlike += 1  # detection: another number of boxes
    if images:
        old, new = (100 * count / images for count in right)
        return f"accuracy on {images} images {old:.2f} % before, {new:.2f} % after ({new - old:+.2f})"
    other = f", and in number in {unlike} batches" if unlike else ""
    return f"the outputs change by {100 * (moved / max(size, 1e-30)) ** 0.5:.2f} % (root mean square){other}"


def _split(batch: Any) -> tuple[list[Any], Tensor | None]:
    """The network's inputs and the labels in a batch."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels", batch.get("label"))
        images = batch.get("pixel_values", batch.get("image", batch.get("images")))
        if images is None:
            raise ValueError(f"a batch of data has no pixel_values, image or images, only {', '.join(map(str, batch))}")
        return [images], labels if torch.is_tensor(labels) else None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        if all(torch.is_tensor(part) and part.ndim == 3 for part in batch):
            return [list(batch)], None  # detection takes a list of images
        return [batch[0]], batch[1] if torch.is_tensor(batch[1]) else None
    return [
        batch[0] if isinstance(batch, (tuple, list)) and torch.is_tensor(batch[0]) and batch[0].ndim == 4 else batch
    ], None


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return [_moved(part, device) for part in value]
    return value.to(device) if torch.is_tensor(value) else value
