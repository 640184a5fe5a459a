"""The block's passes by Triton: each of forward and backward reads the full-size tensors three times."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..models.parts_cbam2 import compute_dtype
from ..models.passes_cbam2 import Affine, End, Small
from . import triton_backward, triton_forward
from .cpu_passes import is_dense

__all__ = ["TritonPasses"]

TILE = 1024  # numbers to a program and step: eight to a thread of the four warps that Triton takes by itself


def _power(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (count - 1).bit_length()


class TritonPasses:
    """What `TorchPasses` is."""

    kernel = None  # the small networks are torch's
    learns = False  # knows no learned maps: such blocks are torch's
    convolve = None
    again: Any

    def __init__(self, x: Tensor, affine: Affine | None = None, owned: bool = False) -> None:
        x = x.resolve_neg()  # a view that only stands for its negative
        self.owned = owned and is_dense(x)
        self.x = x if is_dense(x) else x.contiguous()  # whoever kept it for the backward may have laid it out anew
        self.affine, self.dtype = affine, compute_dtype(x)
        self.order = torch.contiguous_format if self.x.is_contiguous() else torch.channels_last
        self.batch, self.channels, self.places = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
        self.again = type(self)

    def whole(self, block: Any, names: Any, count: int) -> None:
        return None

    def _laid_out(self, t: Tensor) -> Tensor:
        return t.resolve_neg().contiguous(memory_format=self.order)

    def _small(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.dtype)

    @functools.cached_property
    def _norm(self) -> tuple[Tensor, Tensor, Tensor]:
        """scale, shift and mean (C,); whatever there is, where nothing looks."""
        if self.affine is None:
            return self.x, self.x, self.x
        scale, shift, mean = self.affine.scale, self.affine.shift, self.affine.mean
        return scale, shift, scale if mean is None else mean

    def _run(self, reading: Any, axes: str, inner: int, *tensors: Tensor, **options: int):
        """Run a reading. `axes` names what its programs divide among them, "c", "p" or both; what is neighbouring in
        memory gets `inner` numbers of a tile."""
        last = self.order is torch.channels_last
        wide, narrow = (self.channels, self.places) if last else (self.places, self.channels)
        first = min(inner, TILE, _power(wide))
        second = min(TILE // first, _power(narrow))
        bc, bp = (first, second) if last else (second, first)
        programs = self.batch
        if "c" in axes:
            programs *= -(-self.channels // bc)
        if "p" in axes:
            programs *= -(-self.places // bp)
        by_channel, by_place = (1, self.channels) if last else (self.places, 1)
        sizes = [self.channels, self.places, self.channels * self.places, by_channel, by_place]
        with torch.cuda.device_of(self.x):
            reading[(programs,)](*tensors, *sizes, AFFINE=self.affine is not None, **options, BC=bc, BP=bp)

    def squeeze(self) -> Tensor:
        """The average and the maximum over positions, (B, 2, C)."""
        out = self._small(self.batch, 2, self.channels)
        self._run(triton_forward.squeeze, "c", self._along("c"), self.x, *self._norm[:2], out)
        return out

    def _along(self, kept: str) -> int:
        """How many neighbouring numbers a tile has, in a reading that sums over all but channels or positions: few
        where neighbours are kept apart, so that there are programs enough."""
        return 32 if (kept == "c") == (self.order is torch.channels_last) else 128

    def maps(self, ca: Tensor) -> Tensor:
        """The average and the maximum over channels of x·ca, (B, 2, H, W), for ca (B, C)."""
        out = self._small(self.batch, 2, *self.x.shape[2:])
        self._run(triton_forward.maps, "p", self._along("p"), self.x, *self._norm[:2], ca.contiguous(), out)
        return out

    def finish(self, ca: Tensor, sa: Tensor, end: End) -> Tensor:
        """The output, for the ca of `maps` and sa (B, H, W)."""
        out = self.x if self.owned else torch.empty_like(self.x)
        shortcut = self.x if end.shortcut is None else self._laid_out(end.shortcut)
        gamma = self.x if end.gamma is None else end.gamma.contiguous()
        tensors = (self.x, *self._norm[:2], ca.contiguous(), sa.contiguous(), shortcut, gamma, out)
        options = dict(SHORTCUT=end.shortcut is not None, GAMMA=end.gamma is not None)
        self._run(triton_forward.finish, "cp", 128, *tensors, **options, RELU=end.relu, DROPPED=end.dropped)
        return out

    def start_backward(self, g: Tensor, small: Small, gamma: Tensor | None, out: Tensor | None) -> Tensor:
        """The gradient of sa (B, H, W) from g, that of the output; `out` is given where an activation followed."""
        self.small = Small(*(t.contiguous() for t in small))
        self.has_gamma = gamma is not None
        self.gamma = self.x if gamma is None else gamma.contiguous()
        g = self._laid_out(g)
        self.g = g if out is None else torch.empty_like(self.x)
        g_sa, self.ties = (self._small(*small.sa.shape) for _ in range(2))
        given = g if out is None else self._laid_out(out)
        tensors = (g, given, self.x, *self._norm[:2], self.small.ca, self.small.maps, self.gamma, self.g, g_sa)
        self._run(
            triton_backward.products,
            "p",
            self._along("p"),
            *(*tensors, self.ties),
            GAMMA=self.has_gamma,
            RELU=out is not None,
        )
        return g_sa

    def channel_gradient(self, g_avg: Tensor, g_max: Tensor) -> Tensor:
        """The gradient of ca (B, C) from those of the two maps (B, H, W)."""
        small, count = self.small, 3 if self.affine is None else 7
        self.spots = torch.stack([small.sa, small.maps[:, 1], self.ties, g_avg, g_max], 1)
        sums = self._small(self.batch, count, self.channels)
        tensors = (self.g, self.x, *self._norm, small.ca, small.squeezes, self.spots, self.gamma, sums)
        self._run(triton_backward.spread, "c", self._along("c"), *tensors, GAMMA=self.has_gamma, COUNT=count)
        self.sums = sums.unbind(1)
        return self.sums[0]

    def gamma_gradient(self) -> Tensor:
        """The gradient of layer-scale (C,); after `channel_gradient`."""
        return (self.small.ca * self.sums[1]).sum(0)

    def input_gradient(self, g_savg: Tensor, g_smax: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The gradient of x (B, C, H, W) from those of the two squeezes (B, C); where x comes of a BatchNorm, that of
        its input, and those of its weight and bias."""
        channels = torch.stack([self.small.ca, self.small.squeezes[:, 1], self.sums[2], g_savg, g_smax], 1)
        of_norm, g_weight, g_bias = self.x, None, None
        if self.affine is not None:
            of_norm, g_weight, g_bias = self._norm_gradient(g_savg, g_smax)
        g_x = torch.empty_like(self.x)
        tensors = (self.g, self.x, *self._norm, channels, self.spots, self.gamma, of_norm, g_x)
        self._run(triton_backward.input_gradient, "cp", 128, *tensors, GAMMA=self.has_gamma)
        return g_x, g_weight, g_bias

    def _norm_gradient(self, g_savg: Tensor, g_smax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What BatchNorm's backward takes off g_x for its statistics, (2, C), and the gradients of its weight and bias:
        the sums of g_x, and of g_x·z̃, are known before it is."""
        _, _, ties, alone, along, away, away_at = self.sums
        ca = self.small.ca.to(self.x.dtype).to(self.dtype)
        total = (ca * alone + g_savg + g_smax).sum(0)
        product = (ca * along + g_savg / self.places * away + g_smax / ties * away_at).sum(0)
        count, invstd = self.batch * self.places, self.affine.invstd
        return torch.stack([total / count, product * invstd * invstd / count]), product * invstd, total
