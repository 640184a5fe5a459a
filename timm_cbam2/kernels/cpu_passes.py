"""The block's passes by the compiled kernel: the forward pass in one call, the backward in three readings."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..models.passes_cbam2 import Affine, End, Small

__all__ = ["KernelPasses", "is_dense"]

FUSIONS = ("router", "static", "sum")
GATES = ("sigmoid", "hard_sigmoid", "unit_sigmoid")


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _layer(conv: nn.Conv2d | None) -> list[Tensor | None]:
    return [None, None] if conv is None else [conv.weight, conv.bias]


def _temperature(part: nn.Module) -> Tensor:
    return part.temperature.raw if part.temperature.learnable else part.temperature.value


def weights_of(block: nn.Module) -> tuple[Any, ...]:
    """What the kernel's forward pass takes of a `Cbam2`; csrc/cbam2_cpu.cpp says what lies where."""
    channel, spatial = block.channel, block.spatial
    router = [None] * 4 if channel.router is None else [*_layer(channel.router.fc1), *_layer(channel.router.fc2)]
    fusion = "router" if channel.router is not None else "sum" if channel.is_sum else "static"
    of_channel = [*_layer(channel.fc1), *_layer(channel.fc2), *router, channel.fusion_logits, _temperature(channel)]
    of_spatial = [*_layer(spatial.router.fc1), *_layer(spatial.router.fc2), _temperature(spatial)]
    of_spatial.append(None if spatial.conv is None else spatial.conv.weight)
    branches = list(spatial.branches)
    options = [FUSIONS.index(fusion), GATES.index(channel.gate), channel.center, spatial.center]
    options += [spatial.coords, spatial.moments, channel.temperature.learnable, spatial.temperature.learnable]
    convs = [weight for branch in branches for weight in (branch.dw.weight, branch.pw.weight)]
    return of_channel, of_spatial, convs, [branch.dilation for branch in branches], [int(option) for option in options]


class KernelPasses:
    """By the compiled kernel; what `TorchPasses` is, and the whole forward pass in `whole`."""

    def __init__(self, x: Tensor, affine: Affine | None, kernel: Any, owned: bool = False) -> None:
        x = x.resolve_neg()  # a view that only stands for its negative
        self.owned = owned and is_dense(x)
        self.x = x if is_dense(x) else x.contiguous()  # whoever kept it for the backward may have laid it out anew
        self.affine, self.kernel = affine, kernel
        self.order = torch.contiguous_format if self.x.is_contiguous() else torch.channels_last
        self.again = functools.partial(KernelPasses, kernel=kernel)

    def _laid_out(self, t: Tensor) -> Tensor:
        return t.resolve_neg().contiguous(memory_format=self.order)

    def whole(self, block: nn.Module, end: End, drop: Tensor | None) -> tuple[Tensor, Small]:
        """The output and the small tensors."""
        scale, shift = (None, None) if self.affine is None else self.affine[:2]
        out = self.x if self.owned else torch.empty_like(self.x)
        shortcut = None if end.shortcut is None else self._laid_out(end.shortcut)
        small = self.kernel.forward(self.x, scale, shift, shortcut, end.gamma, drop, end.relu, *weights_of(block), out)
        return out, Small(*small)

    def convolve(self, maps: Tensor, kernels: Tensor) -> Tensor:
        """Each sample's maps (B, 2, H, W) with its own kernel (B, 2, f, f), summed over the maps: (B, H, W)."""
        return _Convolution.apply(self.kernel, maps, kernels)

    def start_backward(self, g: Tensor, small: Small, gamma: Tensor | None, out: Tensor | None) -> Tensor:
        norm = self.affine
        self.norm = [None] * 3 if norm is None else [norm.scale, norm.shift, norm.mean]
        self.small, self.gamma = small, gamma
        self.g, g_sa, self.ties_c, self.sums = self.kernel.products(
            self._laid_out(g), out, self.x, self.norm, gamma, list(small)
        )
        return g_sa.view_as(small.sa)

    def channel_gradient(self, g_avg: Tensor, g_max: Tensor) -> Tensor:
        self.g_avg, self.g_max = g_avg.flatten(1) / self.x.shape[1], g_max.flatten(1) / self.ties_c
        self.spread = self.kernel.spread(self.x, self.norm, list(self.small), self.g_avg, self.g_max)
        product, of_maps = self.sums[0], self.spread[0]
        if self.affine is not None:  # of x = scale·z̃ + bias
            product = self.affine.scale * product + self.affine.bias * self.sums[2]
            of_maps = self.affine.scale * of_maps + self.affine.bias * self.spread[1]
        self.by_channel = product  # Σ_hw g·x·sa
        return (product if self.gamma is None else self.gamma * product) + of_maps

    def gamma_gradient(self) -> Tensor:
        return (self.small.ca * self.by_channel).sum(0)

    def input_gradient(self, g_savg: Tensor, g_smax: Tensor) -> tuple[Tensor, Any, Any]:
        places = self.x[0, 0].numel()
        by_channel = [g_savg / places, g_smax / self.sums[1], None, None, None]
        g_weight = g_bias = None
        if self.affine is not None:
            by_channel[2:], g_weight, g_bias = self._norm_gradient(g_savg, g_smax, by_channel)
        g_x = self.kernel.input_gradient(
            self.g, self.x, self.norm, self.gamma, list(self.small), self.g_avg, self.g_max, by_channel
        )
        return g_x, g_weight, g_bias

    def _norm_gradient(self, g_savg: Tensor, g_smax: Tensor, by_channel: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        """What BatchNorm's backward needs of g_x, of which the sums by channel are known before it is."""
        product, _, plain, at_ties, centered = self.sums
        of_maps, alone = self.spread
        gamma = 1 if self.gamma is None else self.gamma
        total = (self.small.ca * (gamma * plain + alone) + g_savg + g_smax).sum(0)
        away = self.small.ca * (gamma * product + of_maps) + by_channel[0] * centered + by_channel[1] * at_ties
        away = away.sum(0)
        count = self.x.numel() // self.x.shape[1]
        invstd = self.affine.invstd
        return [total / count, away * invstd * invstd / count, self.affine.scale], away * invstd, total


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, maps: Tensor, kernels: Tensor) -> Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(maps, kernels)
        return kernel.convolve(maps.contiguous(), kernels.contiguous())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor]:
        return (None, *ctx.kernel.convolve_backward(g.contiguous(), *(t.contiguous() for t in ctx.saved_tensors)))
