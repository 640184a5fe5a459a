"""What passes over full-size tensors are given and keep, and the few samples at a time that they work on."""

from typing import List, NamedTuple, Optional

import torch

__all__ = ["Affine", "End", "Small", "across", "chunks_of"]

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
        step = max(1, CHUNK_BYTES * batch // max(x.numel() * x.element_size(), 1))
    return [slice(start, start + step) for start in range(0, batch, step)]


def across(values: torch.Tensor) -> torch.Tensor:
    """(C,) or (B, C) beside (B, C, H, W)."""
    return values[..., None, None]
