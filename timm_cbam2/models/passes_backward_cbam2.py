"""The backward of the passes in `passes_cbam2` by torch's own operations; the formulas are there.

A tensor of full size that is new costs a CPU more than reading one that is there: the system has to clear its pages. So
only the two gradients that are given away are such, everything else is made a few samples at a time, and where x comes
of a BatchNorm in training its backward is done in the same passes: all that it needs besides are sums by channel.
"""

from typing import Any, List, Optional, Tuple

import torch

from .parts_cbam2 import compute_dtype
from .pieces_cbam2 import Affine, Small, Wide, across, chunks_of

__all__ = ["TorchBackward"]

Found = Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]


def _add_product(g_y: torch.Tensor, g: torch.Tensor, learned: torch.Tensor) -> None:
    """Adds learnedᵀ·g, of (P, C) and (b, P, H·W), to g_y (b, C, H, W)."""
    rows = g_y.flatten(2).transpose(1, 2)  # (b, H·W, C)
    if rows.data_ptr() == g_y.data_ptr():
        rows.baddbmm_(g.transpose(1, 2), learned.expand(len(g), -1, -1))
    else:  # a copy: positions lie otherwise than by rows
        g_y.add_(torch.matmul(learned.t(), g).view(g_y.shape))


class TorchBackward:
    """Of one pass through a block, for x (B, C, H, W), or x = scale·z + shift where a BatchNorm makes it of z."""

    def __init__(self, z: torch.Tensor, affine: Optional[Affine]) -> None:
        self.z, self.affine = z, affine
        self.dtype = compute_dtype(z)
        self.chunks = chunks_of(z)
        first = z[self.chunks[0]]
        self.wide = Wide(first)
        self.scratch = torch.empty_like(first, dtype=self.dtype)
        if self.dtype != z.dtype:
            self.rounded, self.weighted = torch.empty_like(first), torch.empty_like(self.scratch)
        if affine is not None:
            self.normalised, self.top = torch.empty_like(first), torch.empty_like(first, dtype=self.dtype)

    def _x(self, c: slice) -> torch.Tensor:
        """Those samples of x."""
        z = self.z[c]
        if self.affine is None:
            return z
        return torch.addcmul(across(self.affine.shift), z, across(self.affine.scale), out=self.normalised[: len(z)])

    def _masked(self, c: slice, x: torch.Tensor) -> torch.Tensor:
        """x·ca of those samples, as the forward pass rounded it, in the type that sums are made in."""
        y = self.scratch[: len(x)]
        if self.dtype == x.dtype:
            return torch.mul(x, self.ca[c], out=y)
        return y.copy_(torch.mul(x, self.ca[c], out=self.rounded[: len(x)]))

    def _product(self, c: slice) -> torch.Tensor:
        """The same but for rounding, in fewer steps where x has yet to be made."""
        if self.affine is None:
            return self._masked(c, self._x(c))
        scale, shift = (self.small.ca[c] * t for t in self.affine[:2])
        z = self.z[c]
        return torch.addcmul(across(shift), z, across(scale), out=self.scratch[: len(z)])

    def start_backward(self, g: torch.Tensor, small: Small, gamma: Any, out: Any) -> torch.Tensor:
        """The gradient of sa (B, H, W) from g, that of the output; `out` is given where an activation followed."""
        self.small, self.gamma = small, None if gamma is None else across(gamma)
        self.ca, self.sa = across(small.ca.to(self.z.dtype)), small.sa.to(self.z.dtype).to(self.dtype)[:, None]
        self.g = g if out is None else torch.empty_like(out)
        g_sa = torch.empty_like(small.sa)
        for c in self.chunks:
            if out is not None:
                torch.ops.aten.threshold_backward.grad_input(g[c], out[c], 0, grad_input=self.g[c])
            p = self._product(c).mul_(self.wide(self.g[c], "g"))
            if self.gamma is not None:
                p.mul_(self.gamma)
            torch.sum(p, 1, dtype=self.dtype, out=g_sa[c])
        return g_sa

    def channel_gradient(
        self,
        g_avg: torch.Tensor,
        g_max: torch.Tensor,
        g_learned: Optional[torch.Tensor] = None,
        learned: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """The gradient of ca (B, C) from those of the maps (B, H, W), of the learned ones (B, P, H, W)."""
        g_avg, g_max = g_avg[:, None] / self.z.shape[1], g_max[:, None]
        self.g_x = torch.empty_like(self.z)
        g_ca = torch.empty_like(self.small.ca)
        self.ties = torch.empty_like(g_ca)  # at the maximum over positions
        self.sums = [torch.empty_like(g_ca) for _ in range(4 if self.affine is not None else 0)]
        self.by_channel = torch.empty_like(g_ca)  # Σ_hw g·x·sa, which layer-scale needs
        by_map: List[torch.Tensor] = []
        for c in self.chunks:
            stored = self._x(c)
            x = self.wide(stored)
            g_y = self._weighted(c, x)
            at = self._masked(c, stored)
            torch.eq(at, self.small.maps[c, 1:2], out=at)  # 1 and 0
            g_y.addcmul_(at, g_max[c] / at.sum(1, keepdim=True)).add_(g_avg[c])
            if g_learned is not None:
                given = g_learned[c].flatten(2)  # (b, P, H·W)
                _add_product(g_y, given, learned)
                by_map.append(torch.bmm(given, x.flatten(2).transpose(1, 2).to(self.dtype)))
            self._sum(c, g_y, x, g_ca)
            if self.dtype != self.z.dtype:
                self.g_x[c] = g_y
        if g_learned is not None:
            self.learned_gradient = (torch.cat(by_map) * self.small.ca[:, None]).sum(0)  # (P, C)
        return g_ca

    def _weighted(self, c: slice, x: torch.Tensor) -> torch.Tensor:
        """γ·g·sa of those samples."""
        to = self.g_x[c] if self.dtype == self.z.dtype else self.weighted[: len(x)]
        g_y = torch.mul(self.wide(self.g[c], "g"), self.sa[c], out=to)
        if self.gamma is not None:
            torch.sum(torch.mul(g_y, x, out=self.scratch[: len(x)]), (2, 3), out=self.by_channel[c])
            g_y.mul_(self.gamma)
        return g_y

    def _sum(self, c: slice, g_y: torch.Tensor, x: torch.Tensor, g_ca: torch.Tensor) -> None:
        """What those samples of g_y·x sum to by channel; of a BatchNorm, what its backward needs besides."""
        product = self.scratch[: len(x)]
        if self.affine is None:
            torch.sum(torch.mul(g_y, x, out=product), (2, 3), out=g_ca[c])
            return
        alone, along, away, at_top = (sums[c] for sums in self.sums)  # of g_y, g_y·z̃, z̃, z̃ where x is at its largest
        torch.sub(self.z[c], across(self.affine.mean), out=product)
        torch.sum(product, (2, 3), out=away)
        top = self._at_top(c, x)
        torch.sum(top, (2, 3), out=self.ties[c])
        torch.sum(top.mul_(product), (2, 3), out=at_top).div_(self.ties[c])
        torch.sum(product.mul_(g_y), (2, 3), out=along)
        torch.sum(g_y, (2, 3), out=alone)
        torch.addcmul(self.affine.bias * alone, self.affine.scale, along, out=g_ca[c])

    def _at_top(self, c: slice, x: torch.Tensor) -> torch.Tensor:
        """1 where those samples of x are at their largest over positions, else 0."""
        scratch = self.scratch if self.affine is None else self.top
        return torch.eq(x, across(self.small.squeezes[c, 1].to(x.dtype)), out=scratch[: len(x)])

    def input_gradient(self, g_savg: torch.Tensor, g_smax: torch.Tensor) -> Found:
        """The gradient of z (B, C, H, W) from those of the two squeezes (B, C), and those of the BatchNorm's weight and
        bias, if there is one."""
        ca, rest, most = self.small.ca, g_savg / self.z[0, 0].numel(), g_smax
        offset, slope, g_weight, g_bias = [None] * 4
        if self.affine is not None:  # then g_z = (g_x − offset − z̃·slope)·scale
            offset, slope, g_weight, g_bias = self._norm_gradient(self.affine, g_savg, g_smax)
            scale = self.affine.scale
            ca, rest, most, slope = ca * scale, (rest - offset) * scale, most * scale, across(slope * scale)
        else:
            ca = ca.to(self.z.dtype).to(self.dtype)
        ca, rest = across(ca), across(rest)
        for c in self.chunks:
            x, g_y = self.wide(self._x(c)), self.g_x[c]
            if self.dtype != self.z.dtype:
                g_y = self.weighted[: len(x)].copy_(g_y)
            top = self._at_top(c, x)
            if self.affine is None:
                torch.sum(top, (2, 3), out=self.ties[c])
            torch.addcmul(rest[c], g_y, ca[c], out=g_y).addcmul_(top, across(most[c] / self.ties[c]))
            if self.affine is not None:
                away = torch.sub(self.z[c], across(self.affine.mean), out=self.scratch[: len(x)])
                g_y.addcmul_(away, slope, value=-1)
            if self.dtype != self.z.dtype:
                self.g_x[c] = g_y
        return self.g_x, g_weight, g_bias

    def _norm_gradient(self, affine: Affine, g_savg: torch.Tensor, g_smax: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """What BatchNorm's backward takes off g_x for its statistics, and the gradients of its weight and bias."""
        alone, along, away, at_top = self.sums
        ca, places, invstd = self.small.ca, self.z[0, 0].numel(), affine.invstd
        total = (ca * alone + g_savg + g_smax).sum(0)
        product = (ca * along + g_savg / places * away + g_smax * at_top).sum(0)
        count = len(ca) * places
        return total / count, product * invstd * invstd / count, product * invstd, total

    def gamma_gradient(self) -> torch.Tensor:
        """The gradient of layer-scale (C,); after `channel_gradient`."""
        return (self.small.ca * self.by_channel).sum(0)
