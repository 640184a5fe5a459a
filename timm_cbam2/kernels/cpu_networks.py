"""The block's small networks by the compiled kernel: a call for each and direction, where torch takes a hundred."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.dense_cbam2 import branch_shapes, kept_windows
from ..models.small_backward_cbam2 import Found, Grads, Norm, Own

__all__ = ["KernelChannel", "KernelSpatial", "serves"]

GATES = ("sigmoid", "unit_sigmoid", "hard_sigmoid")  # by their number in the kernel
ROUTER = ("router.fc1.weight", "router.fc1.bias", "router.fc2.weight", "router.fc2.bias")
ROUTER += ("router.norm.weight", "router.norm.bias")
CHANNEL = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", *ROUTER, "fusion_logits", "temperature.raw")


def serves(block: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernel knows these networks, computed in `dtype`: without learned maps, and with norms that keep
    their statistics as they usually do."""
    channel, spatial = block.channel, block.spatial
    norms = [part.router.norm for part in (channel, spatial) if part.router is not None]
    return spatial.learned is None and all(
        norm is None or (norm.running_mean.dtype == dtype and norm.track_running_stats and norm.momentum is not None)
        for norm in norms
    )


def _masking(part: nn.Module) -> tuple[int, bool, bool, float]:
    return GATES.index(part.gate), part.center, part.temperature.learnable, part.temperature.eps


class _Network:
    names: tuple[str, ...]  # of the weights that the kernel takes

    def __init__(self, kernel: Any, part: nn.Module) -> None:
        self.kernel, self.part = kernel, part
        self.router_norm = None if part.router is None else part.router.norm

    def _weights(self, own: Own) -> list[Tensor | None]:
        given = [own.get(name) for name in self.names]
        if not self.part.temperature.learnable:
            given[self.names.index("temperature.raw")] = self.part.temperature.value
        return given

    def _measure(self, batch: int) -> tuple[list[Tensor], bool, float, float]:
        """How the norm of the router's logits measures now: its statistics, whether by the batch, momentum, eps."""
        norm = self.router_norm
        if norm is None:
            return [], False, 0.0, 0.0
        return [norm.running_mean, norm.running_var], norm.training and batch > 1, norm.momentum, norm.eps

    def _measured(self, found: Found) -> tuple[list[Tensor], bool, float]:
        """How it measured."""
        if self.router_norm is None:
            return [], False, 0.0
        measure = found["router.norm"]
        return list(measure or ()), measure is None, self.router_norm.eps

    def _named(self, own: Own, found: list[Tensor]) -> tuple[Tensor, Grads]:
        return found[0], dict(zip((name for name in self.names if name in own), found[1:], strict=True))


class KernelChannel(_Network):
    """What `ChannelByHand` is."""

    names = CHANNEL

    def forward(self, own: Own, squeezes: Tensor) -> Tensor:
        """The mask (B, C) of squeezes (B, 2, C)."""
        self.norm = Norm(self.part.norm, "norm", squeezes.flatten(1))
        self.squeezes = self.norm.y.view_as(squeezes)
        measure = self._measure(len(squeezes))
        self.kept = self.kernel.channel(self.squeezes, self._weights(own), *measure, *_masking(self.part))
        return self.kept[0]

    def backward(self, own: Own, found: Found, g: Tensor) -> tuple[Tensor, Grads]:
        given = (g, self.squeezes, self._weights(own), self.kept, *self._measured(found), *_masking(self.part))
        g_squeezes, grads = self._named(own, self.kernel.channel_backward(*given))
        return self.norm.backward(own, found, g_squeezes.flatten(1), grads).view_as(g_squeezes), grads


class KernelSpatial(_Network):
    """What `SpatialByHand` is."""

    def __init__(self, kernel: Any, part: nn.Module) -> None:
        super().__init__(kernel, part)
        branches = [f"branches.{i}.{kind}.weight" for i in range(len(part.branches)) for kind in ("dw", "pw")]
        self.names = (*ROUTER, "temperature.raw", *(branches or ["conv.weight"]))

    def _options(self, maps: Tensor) -> tuple[Any, ...]:
        part, windows = self.part, []
        if part.coords:
            windows = list(kept_windows(*maps.shape[2:], part.footprint, maps.device, maps.dtype))
        shapes = [number for shape in branch_shapes(part) for number in shape]
        return shapes, part.footprint, windows, part.moments

    def forward(self, own: Own, maps: Tensor) -> Tensor:
        """The mask (B, H, W) of maps (B, 2, H, W)."""
        self.maps = maps
        options = (*self._options(maps), *self._measure(len(maps)), *_masking(self.part))
        self.kept = self.kernel.spatial(maps, self._weights(own), *options)
        return self.kept[0]

    def backward(self, own: Own, found: Found, g: Tensor) -> tuple[Tensor, Grads]:
        options = (*self._options(self.maps), *self._measured(found), *_masking(self.part))
        given = (g, self.maps, self._weights(own), self.kept, *options)
        return self._named(own, self.kernel.spatial_backward(*given))
