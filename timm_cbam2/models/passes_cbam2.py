"""The passes of a CBAM2 block over its full-size tensors, forward and backward, by torch or by a compiled kernel.

With the masks ca (B, C) and sa (B, H, W), y = x·ca, and what follows in a residual block (`End`),

    out = act(shortcut + γ·y·sa)            g = that of out, 0 where the activation is flat: also the shortcut's
    g_sa = Σ_c γ·g·y                        g_y = γ·g·sa + g_avg/C + g_max at the maximum over channels + Wᵀ·g_learned
    g_ca = Σ_hw g_y·x                       g_x = g_y·ca + g_savg/HW + g_smax at the maximum over positions
    g_γ = Σ_b ca·Σ_hw g·x·sa                g_W = Σ_b ca·Σ_hw g_learned·x

where W (P, C) makes the learned maps of y, if there are any, and the gradients of the four squeezes come from the small
networks. Equal maxima share their gradient evenly, as in autograd's own `amax`. The class below is made for one pass
through a block and keeps what its next step needs.
"""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

from .parts_cbam2 import compute_dtype

__all__ = ["Affine", "End", "Small", "TorchPasses", "passes_for", "registered", "use_passes"]

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


_registered: Dict[str, Callable[..., Any]] = {}  # by device type


def use_passes(device_type: str, make: Optional[Callable[..., Any]]) -> None:
    """Let a kernel do the passes on devices of this type: `make(x, affine, owned)` gives what `TorchPasses` is, or None
    for what it does not serve, and `make.folds(z)`, if there is one, says whether what it does with an `Affine` over z
    is BatchNorm bit for bit. None for torch alone."""
    if make is None:
        _registered.pop(device_type, None)
    else:
        _registered[device_type] = make


def registered(device_type: str) -> Optional[Callable[..., Any]]:
    return _registered.get(device_type)


def passes_for(x: torch.Tensor, affine: Optional[Affine] = None, owned: bool = False, learned: bool = False) -> Any:
    """What runs the passes over x (B, C, H, W), or over scale·x + shift.

    `owned`: x may be overwritten. `learned`: there are learned maps, which a kernel need not know.
    """
    make = _registered.get(x.device.type)
    found = None if make is None else make(x, affine, owned)
    if found is None or (learned and not getattr(found, "learns", False)):
        return TorchPasses(x, affine, owned)
    return found


def _chunks(x: torch.Tensor) -> List[slice]:
    batch = x.shape[0]
    step = batch
    if x.device.type == "cpu":
        step = max(1, CHUNK_BYTES * batch // max(x.numel() * x.element_size(), 1))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _across(values: torch.Tensor) -> torch.Tensor:
    """(C,) or (B, C) beside (B, C, H, W)."""
    return values[..., None, None]


def _add_product(g_y: torch.Tensor, g: torch.Tensor, learned: torch.Tensor) -> None:
    """Adds learnedᵀ·g, of (P, C) and (b, P, H·W), to g_y (b, C, H, W)."""
    rows = g_y.flatten(2).transpose(1, 2)  # (b, H·W, C)
    if rows.data_ptr() == g_y.data_ptr():
        rows.baddbmm_(g.transpose(1, 2), learned.expand(len(g), -1, -1))
    else:  # a copy: positions lie otherwise than by rows
        g_y.add_(torch.matmul(learned.t(), g).view(g_y.shape))


class TorchPasses:
    """By torch's own operations; on a CPU a few samples at a time, so that memory is read and written once where each
    operation alone would do it again."""

    kernel = None  # compiled operations
    convolve = None
    learns = True  # knows learned maps

    def __init__(self, x: torch.Tensor, affine: Optional[Affine] = None, owned: bool = False) -> None:
        self.given, self.affine, self.owned = x, affine, owned
        self.x = x if owned or affine is None else torch.empty_like(x)
        self.owned = owned or affine is not None
        self.dtype = compute_dtype(x)
        self.chunks = _chunks(x)

    @staticmethod
    def networks(block: Any) -> Any:
        """Who computes the block's small networks, channel and spatial, if the passes know better than torch."""
        return None

    @staticmethod
    def again(x: torch.Tensor, affine: Optional[Affine]) -> "TorchPasses":
        """For the backward of the same pass."""
        return TorchPasses(x, affine)

    def _normalised(self, c: slice) -> torch.Tensor:
        """Those samples of x, after BatchNorm; computed where they are not yet."""
        if self.affine is not None:
            scale, shift = (_across(t) for t in self.affine[:2])
            torch.addcmul(shift, self.given[c], scale, out=self.x[c])
        return self.x[c]

    def squeeze(self) -> torch.Tensor:
        """The average and the maximum over positions, (B, 2, C)."""
        out = self.given.new_empty((self.x.shape[0], 2, self.x.shape[1]), dtype=self.dtype)
        for c in self.chunks:
            x = self._normalised(c)
            torch.mean(x, (2, 3), dtype=self.dtype, out=out[c, 0])
            out[c, 1] = x.amax((2, 3))
        return out

    def maps(self, ca: torch.Tensor, learned: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The average and the maximum over channels of x·ca, and its sums weighted by `learned` (P, C), for ca (B, C):
        (B, 2 + P, H, W)."""
        mask = _across(ca.to(self.x.dtype))
        self.y = self.x if self.owned else torch.empty_like(self.x)
        count = 2 if learned is None else 2 + len(learned)
        out = self.x.new_empty((self.x.shape[0], count, *self.x.shape[2:]), dtype=self.dtype)
        for c in self.chunks:
            y = torch.mul(self.x[c], mask[c], out=self.y[c])
            torch.mean(y, 1, dtype=self.dtype, out=out[c, 0])
            out[c, 1] = y.amax(1)
            if learned is not None:
                out[c, 2:] = torch.matmul(learned, y.flatten(2).to(self.dtype)).view_as(out[c, 2:])
        return out

    def finish(self, ca: torch.Tensor, sa: torch.Tensor, end: End) -> torch.Tensor:
        """The output, for the ca of `maps` and sa (B, H, W)."""
        sa = sa.to(self.x.dtype)[:, None]
        if end.shortcut is None:
            return self.y.mul_(sa)
        gamma = None if end.gamma is None else _across(end.gamma)
        for c in self.chunks:
            y = self.y[c] if gamma is None else self.y[c].mul_(gamma)
            if end.dropped:
                y.mul_(sa[c]).add_(end.shortcut[c])
            else:
                torch.addcmul(end.shortcut[c], y, sa[c], out=y)
            if end.relu:
                y.relu_()
        return self.y

    def start_backward(self, g: torch.Tensor, small: Small, gamma: Any, out: Any) -> torch.Tensor:
        """The gradient of sa (B, H, W) from g, that of the output; `out` is given where an activation followed."""
        self.small, self.gamma = small, None if gamma is None else _across(gamma)
        self.ca, self.sa = _across(small.ca.to(self.x.dtype)), small.sa.to(self.x.dtype)[:, None]
        self.scratch = torch.empty_like(self.x[self.chunks[0]], dtype=self.dtype)
        self.g = g if out is None else torch.empty_like(out)
        g_sa = torch.empty_like(small.sa)
        for c in self.chunks:
            if out is not None:
                torch.ops.aten.threshold_backward.grad_input(g[c], out[c], 0, grad_input=self.g[c])
            x = self._normalised(c)
            if self.dtype == x.dtype:
                p = torch.mul(x, self.ca[c], out=self.scratch[: len(x)]).mul_(self.g[c])
            else:
                p = (x * self.ca[c]).mul_(self.g[c])
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
        largest, g_max = self.small.maps[:, 1:2], g_max[:, None]
        g_avg = g_avg[:, None] / self.x.shape[1]
        self.g_x = torch.empty_like(self.x)
        g_ca = torch.empty_like(self.small.ca)
        self.by_channel = torch.empty_like(g_ca)  # Σ_hw g·x·sa, which layer-scale needs
        by_map: Any = None if learned is None else g_ca.new_empty(len(g_ca), *learned.shape)
        for c in self.chunks:
            x, y = self.x[c], self.scratch[: len(self.x[c])]
            if self.gamma is None and self.dtype == x.dtype:
                g_y = torch.addcmul(g_avg[c], self.g[c], self.sa[c], out=self.g_x[c])
            else:
                g_y = self._weighted(c)
                if self.gamma is not None:
                    torch.sum(torch.mul(g_y, x, out=y), (2, 3), out=self.by_channel[c])
                    g_y.mul_(self.gamma)
                g_y.add_(g_avg[c])
            if self.dtype == x.dtype:
                torch.mul(x, self.ca[c], out=y)
            else:
                y.copy_(x * self.ca[c])
            at = torch.eq(y, largest[c], out=y)  # 1 and 0
            g_y.addcmul_(at, g_max[c] / at.sum(1, keepdim=True))
            if g_learned is not None:
                given = g_learned[c].flatten(2)  # (b, P, H·W)
                _add_product(g_y, given, learned)
                by_map[c] = torch.bmm(given, x.flatten(2).transpose(1, 2).to(self.dtype))
            torch.sum(torch.mul(g_y, x, out=y), (2, 3), out=g_ca[c])
            if self.dtype != x.dtype:
                self.g_x[c] = g_y
        if g_learned is not None:
            self.learned_gradient = (by_map * self.small.ca[:, None]).sum(0)  # (P, C)
        return g_ca

    def _weighted(self, c: slice) -> torch.Tensor:
        """g·sa of those samples, in the type that sums are made in."""
        if self.dtype == self.x.dtype:
            return torch.mul(self.g[c], self.sa[c], out=self.g_x[c])
        return (self.g[c] * self.sa[c]).to(self.dtype)

    def input_gradient(
        self, g_savg: torch.Tensor, g_smax: torch.Tensor
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """The gradient of x (B, C, H, W) from those of the two squeezes (B, C); where x comes of a BatchNorm, that of
        its input, and those of its weight and bias."""
        s_max = _across(self.small.squeezes[:, 1].to(self.x.dtype))
        g_savg, g_smax = _across(g_savg) / self.x[0, 0].numel(), _across(g_smax)
        for c in self.chunks:
            x, g_y = self.x[c], self.g_x[c].to(self.dtype)
            at = torch.eq(x, s_max[c], out=self.scratch[: len(x)])
            share = g_smax[c] / at.sum((2, 3), keepdim=True)
            torch.addcmul(g_savg[c], g_y, self.ca[c], out=g_y).addcmul_(at, share)
            if self.dtype != x.dtype:
                self.g_x[c] = g_y
        if self.affine is None:
            return self.g_x, None, None
        _, _, weight, _, mean, invstd = self.affine
        everything = [True, True, True]
        return torch.ops.aten.native_batch_norm_backward(
            self.g_x, self.given, weight, None, None, mean, invstd, True, 0.0, everything
        )

    def gamma_gradient(self) -> torch.Tensor:
        """The gradient of layer-scale (C,); after `channel_gradient`."""
        return (self.small.ca * self.by_channel).sum(0)
