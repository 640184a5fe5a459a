"""Several labels an image: each class is decided for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

import torch
from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from ..errors import UserError, require

__all__ = ["MultiLabelLoss", "MultiPredictions", "check_multi_label", "said_of_labels"]


class MultiLabelLoss(BinaryCrossEntropy):
    """Binary cross-entropy of logits (B, K) with labels (B, K) of 0 and 1.

    Args:
        smoothing: share of each label that moves towards 1/2.
        target_threshold: labels above it count as 1.
        pos_weight: (K,) what the positives of each class count.
    """

    def __init__(self, smoothing: float, target_threshold: float | None, pos_weight: Tensor | None):
        super().__init__(0.0, target_threshold, pos_weight=pos_weight)
        self.spread = smoothing

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """The mean over images and classes."""
        return super().forward(x, target.to(x.dtype) * (1 - self.spread) + self.spread / 2)


@dataclass
class MultiPredictions:
    """What a model said about N images with several labels: probabilities (N, K), loss (N,) and labels (N, K)."""

    scores: Tensor
    loss: Tensor
    labels: Tensor

    @property
    def correct(self) -> Tensor:
        """Whether every label of an image is right, (N,)."""
        return ((self.scores > 0.5) == (self.labels > 0)).all(1)

    def accuracy(self) -> float:
        """Share of the images of which every label is right."""
        return self.correct.double().mean().item()

    def measures(self) -> dict[str, float]:
        """Mean average precision over the classes that occur, and macro F1 at a probability of 1/2."""
        from sklearn.metrics import average_precision_score, f1_score

        occur = (self.labels > 0).any(0)
        labels, scores = self.labels[:, occur].numpy(), self.scores[:, occur].numpy()
        if not occur.any():
            return {"val_map": 0.0, "val_f1": 0.0}
        return {
            "val_map": float(average_precision_score(labels, scores, average="macro")),
            "val_f1": float(f1_score(labels, scores > 0.5, average="macro", zero_division=0.0)),
        }


def said_of_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of `MultiPredictions` for a batch: logits and labels (B, K), -1 throughout where unreadable."""
    target = labels.clamp(min=0).to(logits.dtype)
    loss = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
    return logits.sigmoid(), loss, labels.to(torch.int8)


def check_multi_label(settings: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing for images with several labels.

    Raises:
        UserError: says which.
    """
    require("sklearn")
    for option in ("mixup", "cutmix"):
        if settings[option] > 0:
            raise UserError(f"--{option} mixes images of one label each, and these have several: leave it out")
    if settings["balance"] == "sampler":
        raise UserError(
            "--balance sampler draws images by their one class, and these have several: give --balance weights"
        )
