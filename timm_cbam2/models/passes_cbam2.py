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

from typing import Any, Callable, Dict, Optional

import torch

from .parts_cbam2 import compute_dtype
from .passes_backward_cbam2 import TorchBackward
from .pieces_cbam2 import Affine, End, Small, Wide, across, chunks_of, largest

__all__ = ["Affine", "End", "Small", "TorchPasses", "passes_for", "registered", "use_passes"]

_registered: Dict[str, Callable[..., Any]] = {}  # by device type


def use_passes(device_type: str, make: Optional[Callable[..., Any]]) -> None:
    """Let a kernel do the passes on devices of this type: `make(x, affine, owned)` gives what `TorchPasses` is, or None
    for what it does not serve, and `make.folds(z)`, if there is one, says whether what it does with an `Affine` over z
    is BatchNorm bit for bit; `make.normalises(z)`, whether in training, too, BatchNorm is best left to its passes. None
    for torch alone."""
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
        self.chunks = chunks_of(x)
        self.wide = Wide(x[self.chunks[0]])

    @staticmethod
    def whole(block: Any, names: Any, count: int) -> Any:
        """Who does all of a block at once, if the passes can."""
        return None

    again = TorchBackward  # for the backward of the same pass

    def _normalised(self, c: slice) -> torch.Tensor:
        """Those samples of x, after BatchNorm; computed where they are not yet."""
        if self.affine is not None:
            scale, shift = (across(t) for t in self.affine[:2])
            torch.addcmul(shift, self.given[c], scale, out=self.x[c])
        return self.x[c]

    def squeeze(self) -> torch.Tensor:
        """The average and the maximum over positions, (B, 2, C)."""
        out = self.given.new_empty((self.x.shape[0], 2, self.x.shape[1]), dtype=self.dtype)
        for c in self.chunks:
            x = self.wide(self._normalised(c))
            torch.mean(x, (2, 3), dtype=self.dtype, out=out[c, 0])
            out[c, 1] = largest(x)
        return out

    def maps(self, ca: torch.Tensor, learned: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The average and the maximum over channels of x·ca, and its sums weighted by `learned` (P, C), for ca (B, C):
        (B, 2 + P, H, W)."""
        mask = across(ca.to(self.x.dtype))
        self.y = self.x if self.owned else torch.empty_like(self.x)
        count = 2 if learned is None else 2 + len(learned)
        out = self.x.new_empty((self.x.shape[0], count, *self.x.shape[2:]), dtype=self.dtype)
        for c in self.chunks:
            y = self.wide(torch.mul(self.x[c], mask[c], out=self.y[c]))
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
        gamma = None if end.gamma is None else across(end.gamma)
        for c in self.chunks:
            y = self.y[c] if gamma is None else self.y[c].mul_(gamma)
            if end.dropped:
                y.mul_(sa[c]).add_(end.shortcut[c])
            else:
                torch.addcmul(end.shortcut[c], y, sa[c], out=y)
            if end.relu:
                y.relu_()
        return self.y
