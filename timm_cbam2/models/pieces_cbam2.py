"""What passes over full-size tensors are given and keep, and the few samples at a time that they work on."""

from typing import Dict, List, NamedTuple, Optional

import torch

from .parts_cbam2 import compute_dtype

__all__ = ["Affine", "End", "Small", "Wide", "across", "chunks_of", "largest"]

CHUNK_BYTES = 2**22  # of one full-size tensor: a few of them fit the cache that a CPU's cores share


class Affine(NamedTuple):
    """What a BatchNorm multiplies by and adds, (C,) each: x = scale·z + shift; in training, also what made them."""

    scale: torch.Tensor
    shift: torch.Tensor
    weight: Optional[torch.Tensor] = None
    bias: Optional[torch.Tensor] = None
    mean: Optional[torch.Tensor] = None
    invstd: Optional[torch.Tensor] = None


class End(NamedTuple):
    """What follows the masks in a residual block."""

    shortcut: Optional[torch.Tensor] = None  # (B, C, H, W), added
    gamma: Optional[torch.Tensor] = None  # (C,), layer-scale
    relu: bool = False
    dropped: bool = False  # sa carries the factors of stochastic depth: products are rounded before they are added


class Small(NamedTuple):
    """The small tensors of one forward pass, each in `compute_dtype`."""

    squeezes: torch.Tensor  # (B, 2, C), average and maximum over positions
    ca: torch.Tensor  # (B, C)
    maps: torch.Tensor  # (B, 2 + P, H, W), average and maximum over channels, learned maps
    sa: torch.Tensor  # (B, H, W)


def chunks_of(x: torch.Tensor) -> List[slice]:
    batch = x.shape[0]
    step = batch
    if x.device.type == "cpu":
        step = max(1, CHUNK_BYTES * batch // max(x.numel() * compute_dtype(x).itemsize, 1))
    return [slice(start, start + step) for start in range(0, batch, step)]


class Wide:
    """Copies of a few samples in half precision, in the type that sums are made in: a CPU sums half precision, and
    mixes it with that type, at a fraction of the speed. Elsewhere, and of other tensors, they themselves."""

    def __init__(self, first: torch.Tensor) -> None:
        """`first`: as many samples as will come at most."""
        self.first, self.dtype = first, compute_dtype(first)
        self.copies = first.device.type == "cpu" and first.dtype != self.dtype
        self.slots: Dict[str, torch.Tensor] = {}

    def __call__(self, part: torch.Tensor, slot: str = "x") -> torch.Tensor:
        """Valid until the next call for the same slot."""
        if not self.copies:
            return part
        if slot not in self.slots:
            self.slots[slot] = torch.empty_like(self.first, dtype=self.dtype)
        return self.slots[slot][: len(part)].copy_(part)


FEW_CHANNELS = 64  # torch reduces rows of fewer numbers than fill its vectors one by one, thirty times slower


def largest(x: torch.Tensor) -> torch.Tensor:
    """The maximum over positions (B, C) of x (B, C, H, W)."""
    batch, channels, height, width = x.shape
    together = 1  # positions whose channels are taken as one row
    if x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last):
        while together * channels < FEW_CHANNELS and height * width % (2 * together) == 0:
            together *= 2
    if together == 1:
        return x.amax((2, 3))
    return x.permute(0, 2, 3, 1).reshape(batch, -1, together, channels).amax(1).amax(1)


def across(values: torch.Tensor) -> torch.Tensor:
    """(C,) or (B, C) beside (B, C, H, W)."""
    return values[..., None, None]
