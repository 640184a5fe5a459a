"""The passes of a CBAM2 block over its full-size tensors, forward and backward, by torch or by a compiled kernel.

With the masks ca (B, C) and sa (B, H·W), y = x·ca and out = y·sa, and the gradient g of the output,

    g_sa = Σ_c g·y                          g_y = g·sa + g_avg/C + g_max at the maximum over channels
    g_ca = Σ_hw g_y·x                       g_x = g_y·ca + g_savg/HW + g_smax at the maximum over positions

where the gradients of the four squeezes come from the small networks. Equal maxima share their gradient evenly, as in
autograd's own `amax`. Each class below is made for one pass through a block and keeps what its next step needs.
"""

import functools
from typing import Any, List, Tuple

import torch

from .parts_cbam2 import compute_dtype

__all__ = ["KernelPasses", "TorchPasses", "kernel_in_use", "passes_for", "use_kernel"]

CHUNK_BYTES = 2**22  # of one full-size tensor: a few of them fit the cache that a CPU's cores share

_kernel: Any = None  # namespace of compiled operations


def use_kernel(operations: Any) -> None:
    """Let these compiled operations do the passes on CPUs; None for torch alone."""
    global _kernel
    _kernel = operations


def kernel_in_use() -> bool:
    return _kernel is not None


def passes_for(x: torch.Tensor) -> Any:
    """What runs the passes over x (B, C, H, W)."""
    if _kernel is not None and x.device.type == "cpu" and x.numel() > 0:
        if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
            return KernelPasses(x, _kernel)
    return TorchPasses(x)


def _chunks(x: torch.Tensor) -> List[slice]:
    batch = x.shape[0]
    step = batch
    if x.device.type == "cpu":
        step = max(1, CHUNK_BYTES * batch // max(x.numel() * x.element_size(), 1))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _share(g: torch.Tensor, values: torch.Tensor, largest: torch.Tensor, dim: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Where `values` reach their maximum, as 1 and 0 in their place, and g shared evenly among equal ones."""
    at = torch.eq(values, largest, out=values)
    return at, g / at.sum(dim, keepdim=True)


class TorchPasses:
    """By torch's own operations; on a CPU a few samples at a time, so that memory is read and written once where each
    operation alone would do it again."""

    convolve = None

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.again = TorchPasses  # for the backward of the same pass
        self.dtype = compute_dtype(x)
        self.chunks = _chunks(x)

    def squeeze(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """The average and the maximum over positions, (B, C) each."""
        pairs = [(self.x[c].mean((2, 3), dtype=self.dtype), self.x[c].amax((2, 3)).to(self.dtype)) for c in self.chunks]
        return self._join(pairs)

    def maps(self, ca: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The average and the maximum over channels of x·ca, (B, H, W) each, for ca (B, C)."""
        mask = ca.to(self.x.dtype)[:, :, None, None]
        self.out = torch.empty_like(self.x)
        pairs = []
        for c in self.chunks:
            y = torch.mul(self.x[c], mask[c], out=self.out[c])
            pairs.append((y.mean(1, dtype=self.dtype), y.amax(1).to(self.dtype)))
        return self._join(pairs)

    def apply(self, ca: torch.Tensor, sa: torch.Tensor) -> torch.Tensor:
        """x·ca·sa for the ca of `maps` and sa (B, H, W)."""
        return self.out.mul_(sa.to(self.x.dtype)[:, None])

    def start_backward(self, g: torch.Tensor, small: Any) -> torch.Tensor:
        """The gradient of sa (B, H, W) from that of the output; `small` has the masks and the squeezes."""
        self.g, self.small = g, small
        self.ca, self.sa = small.ca.to(self.x.dtype)[:, :, None, None], small.sa.to(self.x.dtype)[:, None]
        self.scratch = torch.empty_like(self.x[self.chunks[0]], dtype=self.dtype)
        g_sa = torch.empty_like(small.avg)
        for c in self.chunks:
            x = self.x[c]
            if self.dtype == x.dtype:
                y = torch.mul(x, self.ca[c], out=self.scratch[: len(x)]).mul_(g[c])
            else:
                y = (x * self.ca[c]).mul_(g[c])
            torch.sum(y, 1, dtype=self.dtype, out=g_sa[c])
        return g_sa

    def channel_gradient(self, g_avg: torch.Tensor, g_max: torch.Tensor) -> torch.Tensor:
        """The gradient of ca (B, C) from those of the two maps (B, H, W)."""
        largest, g_max = self.small.largest[:, None], g_max[:, None]
        g_avg = g_avg[:, None] / self.x.shape[1]
        self.g_x = torch.empty_like(self.x)
        g_ca = torch.empty_like(self.small.s_avg)
        for c in self.chunks:
            x, y = self.x[c], self.scratch[: len(self.x[c])]
            if self.dtype == x.dtype:
                g_y = torch.mul(self.g[c], self.sa[c], out=self.g_x[c])
                torch.mul(x, self.ca[c], out=y)
            else:
                g_y = (self.g[c] * self.sa[c]).to(self.dtype)
                y.copy_(x * self.ca[c])
            at, share = _share(g_max[c], y, largest[c], 1)
            g_y.add_(g_avg[c]).addcmul_(at, share)
            torch.sum(torch.mul(g_y, x, out=y), (2, 3), out=g_ca[c])
            if self.dtype != x.dtype:
                self.g_x[c] = g_y
        return g_ca

    def input_gradient(self, g_savg: torch.Tensor, g_smax: torch.Tensor) -> torch.Tensor:
        """The gradient of x (B, C, H, W) from those of the two squeezes (B, C)."""
        s_max = self.small.s_max.to(self.x.dtype)[:, :, None, None]
        g_savg, g_smax = g_savg[:, :, None, None] / self.x[0, 0].numel(), g_smax[:, :, None, None]
        for c in self.chunks:
            x, g_y = self.x[c], self.g_x[c].to(self.dtype)
            at = torch.eq(x, s_max[c], out=self.scratch[: len(x)])
            share = g_smax[c] / at.sum((2, 3), keepdim=True)
            g_y.mul_(self.ca[c]).add_(g_savg[c]).addcmul_(at, share)
            if self.dtype != x.dtype:
                self.g_x[c] = g_y
        return self.g_x

    @staticmethod
    def _join(pairs: List[Tuple[torch.Tensor, torch.Tensor]]) -> Tuple[torch.Tensor, torch.Tensor]:
        if len(pairs) == 1:
            return pairs[0]
        first, second = zip(*pairs)
        return torch.cat(first), torch.cat(second)


class KernelPasses:
    """By the compiled kernel: each step reads its tensors once and makes none that is not its result."""

    def __init__(self, x: torch.Tensor, kernel: Any) -> None:
        x = x.resolve_neg()  # a view that only stands for its negative
        is_dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        self.x = x if is_dense else x.contiguous()  # whoever kept it for the backward may have laid it out anew
        self.kernel = kernel
        self.again = functools.partial(KernelPasses, kernel=kernel)

    def squeeze(self) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.kernel.squeeze(self.x)

    def maps(self, ca: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        average, largest = self.kernel.maps(self.x, ca)
        return average.unflatten(1, self.x.shape[2:]), largest.unflatten(1, self.x.shape[2:])

    def convolve(self, maps: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Each sample's maps (B, 2, H, W) with its own kernel (B, 2, f, f), summed over the maps: (B, H, W)."""
        if torch.is_grad_enabled():
            return _Convolution.apply(self.kernel, maps, kernels)
        return self.kernel.convolve(maps, kernels)

    def apply(self, ca: torch.Tensor, sa: torch.Tensor) -> torch.Tensor:
        return self.kernel.apply(self.x, ca, sa)

    def start_backward(self, g: torch.Tensor, small: Any) -> torch.Tensor:
        order = torch.contiguous_format if self.x.is_contiguous() else torch.channels_last
        self.g, self.small = g.resolve_neg().contiguous(memory_format=order), small
        g_sa, self.ties_c, self.g_ca, self.ties_p = self.kernel.products(
            self.g, self.x, small.ca, small.sa, small.largest, small.s_max
        )
        return g_sa.view_as(small.sa)

    def channel_gradient(self, g_avg: torch.Tensor, g_max: torch.Tensor) -> torch.Tensor:
        self.g_avg, self.g_max = g_avg.flatten(1) / self.x.shape[1], g_max.flatten(1) / self.ties_c
        return self.g_ca + self.kernel.spread(self.x, self.small.ca, self.small.largest, self.g_avg, self.g_max)

    def input_gradient(self, g_savg: torch.Tensor, g_smax: torch.Tensor) -> torch.Tensor:
        by_place = [self.small.sa, self.small.largest, self.g_avg, self.g_max]
        by_channel = [self.small.ca, self.small.s_max, g_savg / self.x[0, 0].numel(), g_smax / self.ties_p]
        return self.kernel.input_gradient(self.g, self.x, by_place, by_channel)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Any, maps: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        ctx.kernel = kernel
        ctx.save_for_backward(maps, kernels)
        return kernel.convolve(maps, kernels)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[None, torch.Tensor, torch.Tensor]:
        return (None, *ctx.kernel.convolve_backward(g.contiguous(), *ctx.saved_tensors))
