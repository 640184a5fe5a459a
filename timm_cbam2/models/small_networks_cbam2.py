"""Who computes the small networks of a CBAM2 block in one pass through it, and their backward.

Each network has `forward(own, squeezes)`, which gives the mask, and `backward(own, found, g)`, which gives from the
mask's gradient that of the squeezes and those of the parameters, by name. `own` are its parameters by name, and `found`
what its norms measured by.
"""

from typing import Any, Dict, Sequence, Tuple

import torch
import torch.nn as nn

from .small_backward_cbam2 import ChannelByHand, Found, Grads, Own, SpatialByHand
from .small_cbam2 import channel_mask, channel_weights, kept_spatial_weights, spatial_mask, spatial_weights

__all__ = ["networks_for"]


def networks_for(block: nn.Module, passes: Any, names: Sequence[str], with_grad: bool = True) -> Tuple[Any, Any]:
    """Those of the channel and the spatial part, beside these passes, for parameters of these names."""
    made = any("parametrizations" in name for name in names)  # weights are made of others
    if made or not with_grad:
        kind = _ByAutograd if with_grad else _WithoutGradient
        return kind(block.channel), kind(block.spatial, passes.convolve)
    return ChannelByHand(block.channel), SpatialByHand(block.spatial, passes.kernel)


def _mask(part: nn.Module, x: torch.Tensor, convolve: Any) -> torch.Tensor:
    if hasattr(part, "footprint"):
        weigh = spatial_weights if torch.is_grad_enabled() else kept_spatial_weights
        return spatial_mask(part, weigh(part, x.shape[2], x.shape[3], x.dtype), x, convolve)
    return channel_mask(part, channel_weights(part, x.dtype), x)


class _WithoutGradient:
    def __init__(self, part: nn.Module, convolve: Any = None) -> None:
        self.part, self.convolve = part, convolve

    def forward(self, own: Own, x: torch.Tensor) -> torch.Tensor:
        return _mask(self.part, x, self.convolve)


class _ByAutograd(_WithoutGradient):
    """With a graph of its own, kept until the backward."""

    def forward(self, own: Own, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            self.x = x.detach().requires_grad_()
            self.mask = _mask(self.part, self.x, self.convolve)
        return self.mask.detach()

    def backward(self, own: Own, found: Found, g: torch.Tensor) -> Tuple[torch.Tensor, Grads]:
        needed = {name: p for name, p in own.items() if p.requires_grad}
        inputs = [self.x, *needed.values()]
        g_x, *rest = torch.autograd.grad(self.mask, inputs, g, retain_graph=True, allow_unused=True)
        grads: Dict[str, torch.Tensor] = dict(zip(needed, rest))
        return torch.zeros_like(self.x) if g_x is None else g_x, grads
