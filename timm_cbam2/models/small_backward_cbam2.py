"""The small networks of a CBAM2 block with a backward by hand: a fifth of the operations that autograd would make.

Each is made for one pass through a block and keeps from its forward what its backward takes, weights excepted: those
are given to both, by name, as autograd saved them, and need not be the ones that the module has by now.
"""

from typing import Any, Callable, Dict, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .decisions_cbam2 import Measure, Norm
from .dense_cbam2 import dense_kernels, dense_kernels_backward, place_backward, place_of
from .parts_cbam2 import coordinates
from .small_cbam2 import mixes_samples, of_maps

__all__ = ["ChannelByHand", "Found", "Grads", "Own", "SpatialByHand"]

Grads = Dict[str, torch.Tensor]
Own = Mapping[str, torch.Tensor]
Found = Mapping[str, Measure]


def _matrix(own: Own, name: str, dtype: torch.dtype) -> torch.Tensor:
    return own[f"{name}.weight"].flatten(1).to(dtype)


def _dense(own: Own, name: str, x: torch.Tensor, times: int = 1) -> torch.Tensor:
    """x @ weight.T + bias, that `times`."""
    bias = own.get(f"{name}.bias")
    if bias is not None:
        bias = bias.to(x.dtype) if times == 1 else times * bias.to(x.dtype)
    return F.linear(x, _matrix(own, name, x.dtype), bias)


def _dense_backward(
    own: Own, grads: Grads, name: str, x: torch.Tensor, g: torch.Tensor, times: int = 1
) -> torch.Tensor:
    """The gradient of x."""
    grads[f"{name}.weight"] = torch.mm(g.t(), x).view_as(own[f"{name}.weight"])
    if f"{name}.bias" in own:
        grads[f"{name}.bias"] = g.sum(0) if times == 1 else times * g.sum(0)
    return torch.mm(g, _matrix(own, name, g.dtype))


class _Router:
    def __init__(self, router: nn.Module, own: Own, x: torch.Tensor) -> None:
        self.x = x
        self.hidden = _dense(own, "router.fc1", x).relu_()
        self.norm = Norm(router.norm, "router.norm", _dense(own, "router.fc2", self.hidden))
        self.weights = self.norm.y.softmax(-1)

    def backward(self, own: Own, found: Found, g: torch.Tensor, grads: Grads) -> torch.Tensor:
        """The gradient of x from that of the weights."""
        g = torch._softmax_backward_data(g, self.weights, -1, g.dtype)
        g = _dense_backward(own, grads, "router.fc2", self.hidden, self.norm.backward(own, found, g, grads))
        return _dense_backward(own, grads, "router.fc1", self.x, torch.ops.aten.threshold_backward(g, self.hidden, 0))


class _Gate:
    """gate((z − its mean) / temperature), where the layer takes its mean off."""

    def __init__(self, part: nn.Module, own: Own, z: torch.Tensor) -> None:
        self.part, self.over = part, tuple(range(1, z.dim()))
        if part.center:
            z = z - z.mean(self.over, keepdim=True)
        if part.temperature.learnable:
            self.temperature = F.softplus(own["temperature.raw"].to(z.dtype)) + part.temperature.eps
        else:
            self.temperature = part.temperature.value.to(z.dtype)
        self.u = z / self.temperature
        self.value = F.hardsigmoid(self.u) if part.gate == "hard_sigmoid" else torch.sigmoid(self.u)
        self.mask = 2 * self.value if part.gate == "unit_sigmoid" else self.value

    def backward(self, own: Own, g: torch.Tensor, grads: Grads) -> torch.Tensor:
        """The gradient of z from that of the mask."""
        part = self.part
        if part.gate == "hard_sigmoid":
            g = torch.ops.aten.hardsigmoid_backward(g, self.u)
        else:
            g = torch.ops.aten.sigmoid_backward(g, self.value)
        g.mul_((2 if part.gate == "unit_sigmoid" else 1) / self.temperature)
        if part.temperature.learnable:
            raw = own["temperature.raw"].to(g.dtype)
            along = -torch.dot(g.flatten(), self.u.flatten())
            grads["temperature.raw"] = torch.ops.aten.softplus_backward(along.view(1), raw, 1, 20)
        return g - g.mean(self.over, keepdim=True) if part.center else g


class ChannelByHand:
    """A `ChannelAttn`: squeezes (B, 2, C) to the mask (B, C)."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part

    def forward(self, own: Own, squeezes: torch.Tensor) -> torch.Tensor:
        """The mask."""
        part, (batch, _, channels) = self.part, squeezes.shape
        self.norm = Norm(part.norm, "norm", squeezes.view(batch, 2 * channels))
        self.flat = self.norm.y.view(2 * batch, channels)
        self.hidden = _dense(own, "fc1", self.flat).relu_()
        self.both = self.hidden.view(batch, 2, -1)
        self.router = None if part.router is None else _Router(part.router, own, self.norm.y)
        if self.router is not None:
            self.mix = self.router.weights
        elif part.fusion_logits is not None:
            self.mix = own["fusion_logits"].to(squeezes.dtype).softmax(0).expand(batch, 2)
        else:
            self.mix = squeezes.new_ones(batch, 2)
        self.mixed = torch.bmm(self.mix[:, None], self.both)[:, 0]
        self.times = 2 if part.is_sum else 1  # both squeezes carry the bias
        self.gate = _Gate(part, own, _dense(own, "fc2", self.mixed, self.times))
        return self.gate.mask

    def backward(self, own: Own, found: Found, g: torch.Tensor) -> Tuple[torch.Tensor, Grads]:
        """The gradient of the squeezes, and those of the parameters by name.

        Args:
            own: The layer's parameters by name.
            found: What its norms measured by.
            g: (B, C), the gradient of the mask.
        """
        grads: Grads = {}
        batch = len(g)
        g_mixed = _dense_backward(own, grads, "fc2", self.mixed, self.gate.backward(own, g, grads), self.times)
        g_hidden = torch.bmm(self.mix[:, :, None], g_mixed[:, None]).view_as(self.hidden)
        g_hidden = torch.ops.aten.threshold_backward(g_hidden, self.hidden, 0)
        g_squeezes = _dense_backward(own, grads, "fc1", self.flat, g_hidden).view(batch, -1)
        if not self.part.is_sum:
            g_mix = torch.bmm(self.both, g_mixed[:, :, None])[:, :, 0]
            if self.router is not None:
                g_squeezes += self.router.backward(own, found, g_mix, grads)
            else:
                grads["fusion_logits"] = torch._softmax_backward_data(g_mix.sum(0), self.mix[0], 0, g.dtype)
        return self.norm.backward(own, found, g_squeezes, grads).view(batch, 2, -1), grads


class _Pooled:
    """The maps as the router sees them."""

    def __init__(self, part: nn.Module, maps: torch.Tensor) -> None:
        self.part, self.places = part, maps.shape[2] * maps.shape[3]
        self.x = maps.mean((2, 3))
        if part.moments:
            height, width = maps.shape[2:]
            self.across = coordinates(width, maps.device, maps.dtype)
            self.down = coordinates(height, maps.device, maps.dtype)
            x = maps[:, 0].mean(1) @ self.across / width
            moments = torch.stack([x, maps[:, 0].mean(2) @ self.down / height], 1)
        elif part.coords:
            moments = self.x.new_zeros(len(maps), 2)  # the mean of a symmetric coordinate is 0
        if part.coords:
            self.x = torch.cat([self.x[:, :2], moments, self.x[:, 2:]], 1)

    def backward(self, g: torch.Tensor, g_maps: torch.Tensor) -> None:
        """Adds to g_maps (B, M, H, W) what comes by way of the router, g being the gradient of x."""
        g = g[:, :, None, None] / self.places
        g_maps += of_maps(self.part, g)
        if self.part.moments:
            g_maps[:, 0] += g[:, 2] * self.across + g[:, 3] * self.down[:, None]


class SpatialByHand:
    """A `SpatialAttn`, but for what makes the learned maps of the features: maps (B, M, H, W) to the mask (B, H, W).

    `convolutions` are compiled ones, or None for torch's.
    """

    def __init__(self, part: nn.Module, convolutions: Any = None) -> None:
        self.part, self.convolutions = part, convolutions
        self.norm: Optional[Norm] = None

    def forward(self, own: Own, maps: torch.Tensor) -> torch.Tensor:
        """The mask."""
        part, (_, _, height, width) = self.part, maps.shape
        if part.learned is not None:
            self.norm = Norm(part.learned.norm, "learned.norm", maps[:, 2:].contiguous())
            maps = torch.cat([maps[:, :2], self.norm.y], 1)
        self.pooled = _Pooled(part, maps)
        self.router = _Router(part.router, own, self.pooled.x)
        self.dense, self.spread = dense_kernels(part, own, maps.dtype)  # (K, S, f, f)
        self.seen = of_maps(part, self.dense).flatten(1)  # (K, M·f·f)
        self.place = place_of(part, self.dense, height, width) if part.coords else None
        branches = self._mixed if mixes_samples(maps, self.convolutions) else self._by_branch
        self.gate = _Gate(part, own, branches(maps, self.router.weights))
        return self.gate.mask

    def backward(self, own: Own, found: Found, g: torch.Tensor) -> Tuple[torch.Tensor, Grads]:
        """The gradient of the maps, and those of the parameters by name.

        Args:
            own: The layer's parameters by name.
            found: What its norms measured by.
            g: (B, H, W), the gradient of the mask.
        """
        grads: Grads = {}
        part, (_, height, width) = self.part, g.shape
        g_maps, g_mix, g_seen, g_place = self.branches_backward(self.gate.backward(own, g, grads))
        g_dense = g_seen.view(len(g_seen), -1, part.footprint, part.footprint)
        if part.coords:
            g_coords = place_backward(part, g_place, height, width)
            g_dense = torch.cat([g_dense[:, :2], g_coords, g_dense[:, 2:]], 1)
        grads.update(dense_kernels_backward(part, own, self.spread, g_dense))
        self.pooled.backward(self.router.backward(own, found, g_mix, grads), g_maps)
        if self.norm is not None:
            g_maps = torch.cat([g_maps[:, :2], self.norm.backward(own, found, g_maps[:, 2:], grads)], 1)
        return g_maps, grads

    def _mixed(self, maps: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """The sum of the branches, (B, H, W): each sample's maps with its own kernel."""
        seen, place = self.seen, self.place
        z, convolution = _convolve_mixed(maps, mix @ seen, self.part.footprint, self.convolutions)
        if place is not None:
            z = torch.addmm(z.flatten(1), mix, place).view_as(z)

        def backward(g: torch.Tensor) -> Tuple[torch.Tensor, ...]:
            g_maps, g_kernels = convolution(g)
            g_mix, flat = g_kernels @ seen.t(), g.flatten(1)
            if place is not None:
                g_mix.addmm_(flat, place.t())
            return g_maps, g_mix, mix.t() @ g_kernels, mix.t() @ flat

        self.branches_backward = backward
        return z

    def _by_branch(self, maps: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """The same, every kernel over all maps."""
        batch, count, height, width = maps.shape
        taps = self.part.footprint
        kernels = self.seen.view(-1, count, taps, taps)
        by_branch = F.conv2d(maps, kernels, padding=taps // 2).flatten(2)
        by_branch = by_branch if self.place is None else by_branch + self.place

        def backward(g: torch.Tensor) -> Tuple[torch.Tensor, ...]:
            flat = g.flatten(1)
            g_mix = torch.bmm(by_branch, flat[:, :, None])[:, :, 0]
            g_branch = mix[:, :, None] * flat[:, None]
            g_maps, g_seen = _convolution_backward(g_branch.view(batch, -1, height, width), maps, kernels, 1)
            return g_maps, g_mix, g_seen.flatten(1), g_branch.sum(0)

        self.branches_backward = backward
        return torch.bmm(mix[:, None], by_branch).view(batch, height, width)


def _convolution_backward(g: torch.Tensor, maps: torch.Tensor, weight: torch.Tensor, groups: int) -> Any:
    margin = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        g, maps, weight, None, [1, 1], [margin] * 2, [1, 1], False, [0, 0], groups, [True, True, False]
    )[:2]


def _convolve_mixed(
    maps: torch.Tensor, kernels: torch.Tensor, taps: int, compiled: Any
) -> Tuple[torch.Tensor, Callable]:
    """Each sample's maps with its own kernel, (B, H, W), and the function from its gradient to theirs."""
    batch, count, height, width = maps.shape
    if compiled is not None:
        kernels = kernels.view(batch, count, taps, taps)

        def by_kernel(g: torch.Tensor) -> Any:
            g_maps, g_kernels = compiled.convolve_backward(g.contiguous(), maps, kernels)
            return g_maps, g_kernels.flatten(1)

        return compiled.convolve(maps, kernels), by_kernel
    rows = maps.view(1, count * batch, height, width).contiguous(memory_format=torch.channels_last)
    weight = kernels.view(count * batch, 1, taps, taps)

    def backward(g: torch.Tensor) -> Any:
        g = g[:, None].expand(batch, count, height, width).reshape(1, count * batch, height, width)
        g_maps, g_kernels = _convolution_backward(
            g.contiguous(memory_format=torch.channels_last), rows, weight, count * batch
        )
        return g_maps.reshape(batch, count, height, width), g_kernels.reshape(batch, -1)

    z = F.conv2d(rows, weight, padding=taps // 2, groups=count * batch)
    return z.reshape(batch, count, height, width).sum(1), backward
