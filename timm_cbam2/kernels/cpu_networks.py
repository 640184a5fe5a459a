"""The block's small networks by the compiled kernel: a call for each and direction, where torch takes a hundred."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..models.dense_cbam2 import branch_shapes, kept_windows
from ..models.small_backward_cbam2 import Grads, Own

__all__ = ["KernelChannel", "KernelSpatial", "serves"]

GATES = ("sigmoid", "unit_sigmoid", "hard_sigmoid")  # by their number in the kernel
ROUTER = ("router.fc1.weight", "router.fc1.bias", "router.fc2.weight", "router.fc2.bias")
CHANNEL = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", *ROUTER, "fusion_logits", "temperature.raw")


def serves(block: nn.Module) -> bool:
    """Whether the kernel knows these networks: without norms and learned maps."""
    channel, spatial = block.channel, block.spatial
    routers = [part.router for part in (channel, spatial) if part.router is not None]
    return channel.norm is None and spatial.learned is None and all(router.norm is None for router in routers)


def _masking(part: nn.Module) -> tuple[int, bool, bool, float]:
    return GATES.index(part.gate), part.center, part.temperature.learnable, part.temperature.eps


class _Network:
    names: tuple[str, ...]  # of the weights that the kernel takes

    def __init__(self, kernel: Any, part: nn.Module) -> None:
        self.kernel, self.part = kernel, part

    def _weights(self, own: Own) -> list[Tensor | None]:
        given = [own.get(name) for name in self.names]
        if not self.part.temperature.learnable:
            given[self.names.index("temperature.raw")] = self.part.temperature.value
        return given

    def _named(self, own: Own, found: list[Tensor]) -> tuple[Tensor, Grads]:
        return found[0], dict(zip((name for name in self.names if name in own), found[1:], strict=True))


class KernelChannel(_Network):
    """What `ChannelByHand` is."""

    names = CHANNEL

    def forward(self, own: Own, squeezes: Tensor) -> Tensor:
        """The mask (B, C) of squeezes (B, 2, C)."""
        self.squeezes = squeezes
        self.kept = self.kernel.channel(squeezes, self._weights(own), *_masking(self.part))
        return self.kept[0]

    def backward(self, own: Own, found: Any, g: Tensor) -> tuple[Tensor, Grads]:
        weights, masking = self._weights(own), _masking(self.part)
        return self._named(own, self.kernel.channel_backward(g, self.squeezes, weights, self.kept, *masking))


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
        return shapes, part.footprint, windows, part.moments, *_masking(part)

    def forward(self, own: Own, maps: Tensor) -> Tensor:
        """The mask (B, H, W) of maps (B, 2, H, W)."""
        self.maps = maps
        self.kept = self.kernel.spatial(maps, self._weights(own), *self._options(maps))
        return self.kept[0]

    def backward(self, own: Own, found: Any, g: Tensor) -> tuple[Tensor, Grads]:
        given = (g, self.maps, self._weights(own), self.kept, *self._options(self.maps))
        return self._named(own, self.kernel.spatial_backward(*given))
