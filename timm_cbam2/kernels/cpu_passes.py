"""The block's passes by the compiled kernel: three readings forward, three backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..models.parts_cbam2 import compute_dtype
from ..models.passes_cbam2 import Affine, End, Small
from .cpu_block import KernelBlock

__all__ = ["KernelPasses", "is_dense"]


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


class KernelPasses:
    """By the compiled kernel; what `TorchPasses` is."""

    learns = True

    def __init__(self, x: Tensor, affine: Affine | None, kernel: Any, owned: bool = False) -> None:
        x = x.resolve_neg()  # a view that only stands for its negative
        self.owned = owned and is_dense(x)
        self.x = x if is_dense(x) else x.contiguous()  # whoever kept it for the backward may have laid it out anew
        self.affine, self.kernel = affine, kernel
        self.dtype = compute_dtype(x)
        self.order = torch.contiguous_format if self.x.is_contiguous() else torch.channels_last
        self.again = functools.partial(KernelPasses, kernel=kernel)

    def whole(self, block: nn.Module, names: tuple[str, ...], count: int) -> KernelBlock | None:
        """Who does all of the block at once, unless torch must do some of it."""
        by = KernelBlock(self.kernel, block, names, count)
        return by if by.serves(self.dtype) else None

    def laid_out(self, t: Tensor) -> Tensor:
        """As x lies in memory."""
        return t.resolve_neg().contiguous(memory_format=self.order)

    def ends(self, end: End) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, where the output goes, and the shortcut."""
        out = self.x if self.owned else torch.empty_like(self.x)
        return self.x, out, None if end.shortcut is None else self.laid_out(end.shortcut)

    @property
    def norm(self) -> tuple[Tensor | None, Tensor | None]:
        """What a BatchNorm multiplies by and adds, if x has yet to pass one."""
        return (None, None) if self.affine is None else (self.affine.scale, self.affine.shift)

    @property
    def trained_norm(self) -> list[Tensor | None]:
        """Of such a one in training also its mean, bias and 1 / standard deviation."""
        a = self.affine
        return [None] * 5 if a is None else [a.scale, a.shift, a.mean, a.bias, a.invstd]

    def squeeze(self) -> Tensor:
        """The average and the maximum over positions, (B, 2, C)."""
        return self.kernel.squeeze(self.x, *self.norm)

    def maps(self, ca: Tensor, learned: Tensor | None = None) -> Tensor:
        """The average and the maximum over channels of x·ca, and its sums weighted by `learned` (P, C), for ca (B, C):
        (B, 2 + P, H, W)."""
        weights = offsets = None
        if learned is not None:  # of z, from which the kernel makes x
            weights = learned * ca[:, None]
            if self.affine is None:
                offsets = weights.new_zeros(weights.shape[:2])
            else:
                offsets, weights = weights @ self.affine.shift, weights * self.affine.scale
        return self.kernel.maps(self.x, *self.norm, ca, weights, offsets)

    def finish(self, ca: Tensor, sa: Tensor, end: End) -> Tensor:
        """The output, for the ca of `maps` and sa (B, H, W)."""
        x, out, shortcut = self.ends(end)
        self.kernel.finish(x, *self.norm, shortcut, end.gamma, ca, sa, end.relu, out)
        return out

    def convolve(self, maps: Tensor, kernels: Tensor) -> Tensor:
        """Each sample's maps (B, M, H, W) with its own kernel (B, M, f, f), summed over the maps: (B, H, W)."""
        return _Convolution.apply(self.kernel, maps, kernels)

    def start_backward(self, g: Tensor, small: Small, gamma: Tensor | None, out: Tensor | None) -> Tensor:
        self.norms = self.trained_norm[:3]
        self.small, self.gamma = small, gamma
        self.g, g_sa, self.ties_c, self.sums = self.kernel.products(
            self.laid_out(g), out, self.x, self.norms, gamma, list(small)
        )
        return g_sa.view_as(small.sa)

    def channel_gradient(
        self, g_avg: Tensor, g_max: Tensor, g_learned: Tensor | None = None, learned: Tensor | None = None
    ) -> Tensor:
        self.g_avg, self.g_max = g_avg.flatten(1) / self.x.shape[1], g_max.flatten(1) / self.ties_c
        self.spread = self.kernel.spread(self.x, self.norms, list(self.small), self.g_avg, self.g_max)
        self.learned = g_learned, learned
        if g_learned is not None and learned is not None:
            self._spread_learned(g_learned.flatten(2), learned)
        product, of_maps = self.sums[0], self.spread[0]
        if self.affine is not None:  # of x = scale·z̃ + bias
            product = self.affine.scale * product + self.affine.bias * self.sums[2]
            of_maps = self.affine.scale * of_maps + self.affine.bias * self.spread[1]
        self.by_channel = product  # Σ_hw g·x·sa
        return (product if self.gamma is None else self.gamma * product) + of_maps

    def _spread_learned(self, g: Tensor, learned: Tensor) -> None:
        """Adds what learned maps, with gradients g (B, P, H·W) and weights (P, C), give to `spread`."""
        rows = self.x.flatten(2).transpose(1, 2)  # (B, H·W, C)
        if rows.dtype == g.dtype:
            product = torch.bmm(g, rows)  # (B, P, C), Σ_hw g·z̃
        else:  # one sample at a time, in the type that sums are made in
            product = torch.stack([one @ row.to(g.dtype) for one, row in zip(g, rows)])
        if self.affine is not None:
            total = g.sum(2)[:, :, None]
            product = product - total * self.affine.mean
            self.spread[1] += (learned * total).sum(1)
        self.spread[0] += (learned * product).sum(1)
        if self.affine is not None:
            product = self.affine.scale * product + self.affine.bias * total
        self.learned_gradient = (self.small.ca[:, None] * product).sum(0)  # (P, C)

    def gamma_gradient(self) -> Tensor:
        return (self.small.ca * self.by_channel).sum(0)

    def input_gradient(self, g_savg: Tensor, g_smax: Tensor) -> tuple[Tensor, Any, Any]:
        places = self.x[0, 0].numel()
        by_channel = [g_savg / places, g_smax / self.sums[1], None, None, None]
        g_weight = g_bias = None
        if self.affine is not None:
            by_channel[2:], g_weight, g_bias = self._norm_gradient(g_savg, g_smax, by_channel)
        g_x = self.kernel.input_gradient(
            *(self.g, self.x, self.norms, self.gamma, list(self.small), self.g_avg, self.g_max, by_channel),
            *self.learned,
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
