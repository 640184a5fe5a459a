"""How much of each mask depends on the image, and what that part is worth: accuracy with masks that do not."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn

from ...models.cbam2 import is_cbam2
from ...seeing.health import NEAR, RANGE

__all__ = ["Moments", "averaged", "fixed_mask_accuracy"]

KINDS: dict[str, tuple[str, ...]] = {  # which masks are averaged
    "as trained": (),
    "channel masks averaged": ("channel",),
    "spatial masks averaged": ("spatial",),
    "both averaged": ("channel", "spatial"),
}


class Moments:
    """Mean and variance of a mask's elements over images, gathered batch by batch.

    Args:
        gate: of the mask, which says where it ends.
    """

    def __init__(self, gate: str):
        self.range = RANGE[gate]
        self.count, self.low, self.high = 0, 0.0, 0.0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, mask: Tensor) -> None:
        """Take in masks (B, C, 1, 1) or (B, 1, H, W)."""
        mask = mask.double()
        self.count += len(mask)
        self.total = self.total + mask.sum(0, keepdim=True)
        self.squares = self.squares + (mask**2).sum(0, keepdim=True)
        self.low += (mask < NEAR * self.range).double().mean(0).mean().item() * len(mask)
        self.high += (mask > (1 - NEAR) * self.range).double().mean(0).mean().item() * len(mask)

    @property
    def mean(self) -> Tensor:
        """The mask averaged over images, (1, C, 1, 1) or (1, 1, H, W)."""
        return self.total / self.count

    def summary(self) -> dict[str, float]:
        """`mean`; `between_samples`, the standard deviation over images (root mean square over the elements);
        `within`, that of the averaged mask over channels or positions; `low` and `high`, the share of values at that
        end of the gate."""
        variance = (self.squares / self.count - self.mean**2).clamp(min=0)
        return {
            "mean": self.mean.mean().item(),
            "between_samples": variance.mean().sqrt().item(),
            "within": self.mean.std(correction=0).item(),
            "low": self.low / self.count,
            "high": self.high / self.count,
        }


@contextmanager
def averaged(model: nn.Module, means: Mapping[str, Mapping[str, Tensor]], parts: tuple[str, ...]) -> Iterator[None]:
    """Meanwhile, blocks multiply by their averaged masks instead of the image's own.

    Args:
        model: With CBAM2 blocks.
        means: For each block by name, the masks "channel" and "spatial".
        parts: Which of the two are averaged.
    """

    def replace(name: str) -> Any:
        def hook(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            channel, spatial = (means[name][part].to(output.dtype) for part in ("channel", "spatial"))
            y = args[0] * channel if "channel" in parts else block.channel(args[0])
            return y * spatial if "spatial" in parts else block.spatial(y)

        return hook

    blocks = [(name, module) for name, module in model.named_modules() if is_cbam2(module)]
    handles = [module.register_forward_hook(replace(name)) for name, module in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def fixed_mask_accuracy(model: nn.Module, loader: Any, means: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Share of images that `model` gets right as it is, and with masks replaced by `means`; it is not trained again.

    What is lost is what the masks gain by looking at the image.
    """
    model.eval()
    found = {}
    for kind, parts in KINDS.items():
        hits = count = 0
        with averaged(model, means, parts):
            for images, labels, _ in loader:
                hits += int((model(images).argmax(1) == labels).sum())
                count += len(labels)
        found[kind] = hits / count
    return found
