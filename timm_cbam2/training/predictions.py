"""What a model says about labelled images, on one process or many: each image counts once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..errors import UserError
from .multi_label import MultiPredictions, said_of_labels

__all__ = ["Predictions", "count_hits", "predict_all"]


def count_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of B images are named rightly: class indices (B,), or all of K labels (B, K)."""
    if labels.ndim == 1:
        return (logits.argmax(1) == labels).sum()
    return ((logits > 0) == (labels > 0)).all(1).sum()


@dataclass
class Predictions:
    """What a model said about N images.

    `top` (N, k) are its k best classes, `loss` (N,) the loss, `labels` (N,) the true classes, and `confidence` (N,) the
    probability that it gives its best class.
    """

    top: Tensor
    loss: Tensor
    labels: Tensor
    confidence: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether the best class is the true one, (N,)."""
        return self.top[:, 0] == self.labels

    def accuracy(self, k: int = 1) -> float:
        """Share of the images whose true class is among the k best."""
        return (self.top[:, :k] == self.labels[:, None]).any(1).double().mean().item()

    def confusion(self, classes: int) -> Tensor:
        """Counts (K, K), rows the true class, columns the predicted one."""
        return torch.bincount(self.labels * classes + self.top[:, 0], minlength=classes**2).view(classes, classes)


@torch.no_grad()
def predict_all(
    accelerator: Any, model: nn.Module, loader: DataLoader, stop: Callable[[], bool] | None = None
) -> Predictions | MultiPredictions | None:
    """Run `model` over `loader` on every process; each image counts once, unreadable ones (label -1) not at all.

    The model is left in the mode it was in. A loader that Accelerate did not prepare holds this process's own images,
    however many.

    Args:
        accelerator: of the process.
        model: gives logits (B, K).
        loader: gives images, labels (B,) or several of each image (B, K), indices.
        stop: asked before each batch, on all processes alike, whether to leave; the result is then None.

    Raises:
        UserError: none of the images can be read.
    """
    training = model.training
    prepared = hasattr(loader, "gradient_state")
    run = model if prepared else accelerator.unwrap_model(model)
    model.eval()
    parts = []
    for batch in loader if prepared else _while_any(accelerator, loader):
        if stop is not None and stop():
            model.train(training)
            return None
        if batch is None:
            continue
        images, labels, _ = batch
        images, labels = images.to(accelerator.device), labels.to(accelerator.device)
        with accelerator.autocast():
            logits = run(images).float()
        if labels.ndim > 1:
            found = said_of_labels(logits, labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
            top = logits.topk(min(5, logits.shape[1]), dim=1).indices
            found = (top, loss, labels, logits.softmax(1).amax(1))
        parts.append([t.cpu() for t in (accelerator.gather_for_metrics(found) if prepared else found)])
    model.train(training)
    if not parts:  # this process's share of a stream is empty
        top = torch.zeros(0, min(5, accelerator.unwrap_model(model).num_classes), dtype=torch.int64)
        parts.append([top, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0)])
    columns = [torch.cat(column) for column in zip(*parts)]
    if not prepared:
        on_device = [t.to(accelerator.device) for t in columns]
        padded = [accelerator.pad_across_processes(t, pad_index=-1) for t in on_device]
        columns = [accelerator.gather(t).cpu() for t in padded]
    several = columns[2].ndim > 1
    seen = (columns[2][:, 0] if several else columns[2]) >= 0
    if not seen.any():
        raise UserError("none of the images to measure on can be read")
    return (MultiPredictions if several else Predictions)(*(column[seen] for column in columns))


def _while_any(accelerator: Any, loader: DataLoader) -> Iterator[Any]:
    """Batches of this process's own loader, and None while only other processes still have some."""
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        left = torch.tensor(batch is not None, dtype=torch.int32, device=accelerator.device)
        if not accelerator.reduce(left):
            return
        yield batch
