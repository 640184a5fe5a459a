"""Test-time augmentation: a model's probabilities averaged over mirrored and cropped views of each image."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import five_crop

from ..errors import UserError

__all__ = ["TTA_HELP", "AveragedViews", "with_views"]

TTA = ("flip", "crops", "flip+crops")
TTA_HELP = "Average over views of each image: flip (mirrored too), crops (corners and centre), or flip+crops."


class AveragedViews(nn.Module):
    """A classifier whose probabilities are the mean over views of each image.

    Args:
        model: gives logits (B, K).
        flip: also the mirrored image.
        side: (height, width) of the corner and centre crops; None for the whole image.
        multi_label: whether each class is decided for itself.
    """

    def __init__(self, model: nn.Module, flip: bool, side: tuple[int, int] | None = None, multi_label: bool = False):
        super().__init__()
        self.model, self.flip, self.side, self.multi_label = model, flip, side, multi_label

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of the mean probabilities; their softmax (sigmoid, with `multi_label`) gives those back."""
        views = [images] if self.side is None else list(five_crop(images, list(self.side)))
        if self.flip:
            views += [view.flip(-1) for view in views]
        logits = torch.stack([self.model(view).float() for view in views])  # (views, B, K)
        if self.multi_label:
            return logits.sigmoid().mean(0).logit(eps=1e-6)
        return logits.log_softmax(2).logsumexp(0) - math.log(len(views))


def with_views(
    model: nn.Module, config: dict[str, Any], tta: str | None, augment: str | None, multi_label: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """`model` that averages over views, and the preprocessing that leaves room for them.

    Args:
        model: a classifier.
        config: its preprocessing, see `data_config`.
        tta: one of `TTA`, or None to leave both as they are.
        augment: with which the model was trained, None if that is not known.
        multi_label: whether each class is decided for itself.

    Raises:
        UserError: no such views, mirroring where it changes what an image says, or crops where nothing is cut off.
    """
    if tta is None:
        return model, config
    if tta not in TTA:
        raise UserError(f"--tta {tta} is unknown; there are {', '.join(TTA)}")
    flip, crops = "flip" in tta, "crops" in tta
    if flip and augment == "light":
        instead = "give --tta crops, or leave it out" if config["crop_pct"] < 1 else "leave it out"
        raise UserError(
            f"--tta {tta}: this model was trained without mirroring (--augment light), as for letters or digits, which "
            f"a mirror changes; {instead}"
        )
    if not crops:
        return AveragedViews(model, flip, None, multi_label), config
    channels, height, width = config["input_size"]
    whole = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
    if whole == (height, width):
        raise UserError(
            f"--tta {tta}: this model sees whole images (crop_pct is 1), so there are no crops to take; "
            + ("give --tta flip" if flip else "leave it out")
        )
    config = config | {"input_size": (channels, *whole), "crop_pct": 1.0}
    return AveragedViews(model, flip, (height, width), multi_label), config
