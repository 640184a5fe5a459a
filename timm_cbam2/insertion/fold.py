"""The mean of each mask over data, and that mean multiplied into the layer before the block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..models.cbam2 import record_attention
from .hosts import Seat, last_layer
from .measure import answer

__all__ = ["MaskMeans", "fold_means", "last_layers", "mean_masks"]


@dataclass
class MaskMeans:
    """Of one block, over images: sums until `finish` is called, then means."""

    channel: Tensor  # (C,), float64
    spatial: Tensor  # (), over positions too
    spatial_squares: Tensor  # (), of the values
    images: int = 0

    def add(self, channel_mask: Tensor, spatial_mask: Tensor) -> None:
        """Count the masks (B, C, 1, 1) and (B, 1, H, W) of a batch."""
        spatial = spatial_mask.double().flatten(1)
        self.channel += channel_mask.double().sum(0).flatten()
        self.spatial += spatial.mean(1).sum()
        self.spatial_squares += spatial.square().mean(1).sum()
        self.images += len(channel_mask)

    @property
    def factor(self) -> Tensor:
        """What each channel is multiplied by instead of the masks: (C,)."""
        return self.channel / self.images * (self.spatial / self.images)

    @property
    def spread(self) -> float:
        """The standard deviation of the spatial mask over positions and images, as a share of its mean."""
        mean = self.spatial / self.images
        return float((self.spatial_squares / self.images - mean.square()).clamp(min=0).sqrt() / mean.clamp(min=1e-12))


def last_layers(found: Sequence[Seat]) -> dict[str, nn.Module]:
    """The layer into which each block's mean mask goes, by the block's name.

    Raises:
        ValueError: a block has none.
    """
    layers = {}
    for seat in found:
        layer = last_layer(seat.host, seat.kind)
        if layer is None or getattr(layer, "weight", None) is None:
            raise ValueError(
                f"{seat.block} does not come right after a norm or convolution with weights, into which a mask could "
                "be folded; remove it with fold=False"
            )
        layers[seat.block] = layer
    return layers


@torch.no_grad()
def mean_masks(model: nn.Module, found: Sequence[Seat], data: Iterable[Any]) -> dict[str, MaskMeans]:
    """Mean masks by block, from one pass over `data`.

    Raises:
        ValueError: there are no batches, or a block did not run.
    """
    means: dict[str, MaskMeans] = {}
    for batch in data:
        with record_attention(model) as records:
            answer(model, batch)
        for name, seen in records.items():
            if name not in means:
                zero = torch.zeros((), dtype=torch.float64, device=seen.channel_mask.device)
                means[name] = MaskMeans(zero.repeat(seen.channel_mask.shape[1]), zero.clone(), zero.clone())
            means[name].add(seen.channel_mask, seen.spatial_mask)
    missing = [seat.block for seat in found if seat.block not in means]
    if missing:
        raise ValueError("data holds no batch" if not means else f"{missing[0]} did not run on data")
    return means


@torch.no_grad()
def fold_means(layers: dict[str, nn.Module], means: dict[str, MaskMeans]) -> None:
    """Multiply each mean mask into the weight and the bias of its layer, in place."""
    for name, layer in layers.items():
        for tensor in (layer.weight, getattr(layer, "bias", None)):
            if tensor is not None:
                shape = (-1,) + (1,) * (tensor.ndim - 1)
                tensor.copy_((tensor.double() * means[name].factor.view(shape)).to(tensor.dtype))
