"""The spatial branches of a CBAM2 block as one dense kernel, what their coordinate maps add, and both backward."""

import functools
from typing import Any, Dict, Mapping, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .parts_cbam2 import coordinates

__all__ = [
    "branch_shapes",
    "coordinate_rows",
    "coordinate_windows",
    "dense_kernels",
    "dense_kernels_backward",
    "kept_windows",
    "own_kernels",
    "place_backward",
    "place_of",
]


@functools.lru_cache(64)
def _tap_places(
    shapes: Tuple[Tuple[int, int], ...], taps: int, device: torch.device, inference: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Where each place of the dense kernels (K, f, f) finds its tap among those of all branches in a row, and where
    there is none, one past the last: (K·f·f,); and where each tap is in them. `shapes` holds kernel size and dilation.
    """
    total = sum(k * k for k, _ in shapes)
    places = torch.full((len(shapes), taps, taps), total, device=device)
    first = 0
    for choice, (k, dilation) in enumerate(shapes):
        margin = (taps - dilation * (k - 1) - 1) // 2
        inner = slice(margin, taps - margin, dilation)
        places[choice, inner, inner] = first + torch.arange(k * k, device=device).view(k, k)
        first += k * k
    inverse = places.flatten().argsort(stable=True)[:total]
    return places.flatten(), inverse


def dense_kernels(part: nn.Module, own: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Tuple[torch.Tensor, Any]:
    """`SpatialAttn.kernel`, (K, S, f, f), without an operation for each branch and step; and what its backward takes.

    `own` are the layer's parameters by name.
    """
    if part.conv is not None:
        return own["conv.weight"].to(dtype), None
    count = len(part.branches)
    weights = [own[f"branches.{i}.dw.weight"].flatten(1) for i in range(count)]
    places = _tap_places(branch_shapes(part), part.footprint, weights[0].device, torch.is_inference_mode_enabled())[0]
    taps = F.pad(torch.cat(weights, 1).to(dtype), [0, 1])  # (S, taps + 1), the last one 0
    scale = torch.cat([own[f"branches.{i}.pw.weight"].flatten(1) for i in range(count)]).to(dtype)  # (K, S)
    spread = taps.index_select(1, places).view(taps.shape[0], count, -1).transpose(0, 1)  # (K, S, f·f)
    return (spread * scale[:, :, None]).view(count, -1, part.footprint, part.footprint), (spread, scale)


def dense_kernels_backward(
    part: nn.Module, own: Mapping[str, torch.Tensor], kept: Any, g: torch.Tensor
) -> Dict[str, torch.Tensor]:
    """The gradients of the weights, by name, from that of the kernels (K, S, f, f)."""
    if part.conv is not None:
        return {"conv.weight": g}
    spread, scale = kept
    g = g.flatten(2)  # (K, S, f·f)
    inverse = _tap_places(branch_shapes(part), part.footprint, g.device, torch.is_inference_mode_enabled())[1]
    by_tap = (g * scale[:, :, None]).transpose(0, 1).flatten(1).index_select(1, inverse)  # (S, taps)
    by_branch = by_tap.split([size * size for size, _ in branch_shapes(part)], 1)
    g_scale = (g * spread).sum(2)
    grads = {}
    for i, taps in enumerate(by_branch):
        for name, grad in ((f"branches.{i}.dw.weight", taps), (f"branches.{i}.pw.weight", g_scale[i])):
            grads[name] = grad.reshape(own[name].shape)
    return grads


def branch_shapes(part: nn.Module) -> Tuple[Tuple[int, int], ...]:
    """Kernel size and dilation of each branch; none once they are merged."""
    return tuple((branch.dw.kernel_size[0], branch.dilation) for branch in part.branches)


def own_kernels(part: nn.Module) -> Dict[str, torch.Tensor]:
    """The weights that make the kernels, by name, parametrised or not."""
    if part.conv is not None:
        return {"conv.weight": part.conv.weight}
    named = ((f"branches.{i}.{kind}.weight", b, kind) for i, b in enumerate(part.branches) for kind in ("dw", "pw"))
    return {name: getattr(branch, kind).weight for name, branch, kind in named}


def _met_by_taps(x: torch.Tensor, taps: int) -> torch.Tensor:
    """What each of `taps` taps of a centred kernel meets at each position of x (n,), zeros outside: (n, taps)."""
    padded = F.pad(x, [taps // 2, taps // 2])
    place = torch.arange(x.shape[0], device=x.device)[:, None] + torch.arange(taps, device=x.device)
    return padded.index_select(0, place.flatten()).view(-1, taps)


def coordinate_windows(
    height: int, width: int, taps: int, device: torch.device, dtype: torch.dtype
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a centred kernel of `taps` meets of 1 and of Y along H, (H, f) each, and of X and of 1 along W, (W, 2f)."""
    across, down = coordinates(width, device, dtype), coordinates(height, device, dtype)
    columns = torch.cat([_met_by_taps(across, taps), _met_by_taps(torch.ones_like(across), taps)], 1)
    return _met_by_taps(torch.ones_like(down), taps), _met_by_taps(down, taps), columns


def coordinate_rows(kernel: torch.Tensor, windows: Tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The maps X and Y convolved with kernel (K, 2, f, f) along H: (K·H, 2f). Each depends on one axis only, so that
    the whole convolution, zeros around, is a matrix product with the windows along W more."""
    ones, down, _ = windows
    choices, _, taps, _ = kernel.shape
    by_column = kernel.permute(1, 2, 0, 3).flatten(2)  # (2, f, K·f)
    rows = torch.stack([ones @ by_column[0], down @ by_column[1]]).view(2, -1, choices, taps)
    return rows.permute(2, 1, 0, 3).flatten(2).flatten(0, 1)


@functools.lru_cache(64)
def _kept_windows(*size: Any, inference: bool) -> Any:  # a tensor of inference mode cannot serve autograd
    with torch.no_grad():
        return coordinate_windows(*size)


def kept_windows(*size: Any) -> Any:
    """About sixty small operations on constants, kept between passes."""
    return _kept_windows(*size, inference=torch.is_inference_mode_enabled())


def place_of(part: nn.Module, kernel: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What the coordinates add (K, H·W) to maps of this size, for kernels (K, S, f, f)."""
    windows = kept_windows(height, width, part.footprint, kernel.device, kernel.dtype)
    return (coordinate_rows(kernel[:, 2:4], windows) @ windows[2].t()).view(len(kernel), height * width)


def place_backward(part: nn.Module, g: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The gradient of the coordinates' kernels (K, 2, f, f) from that of `place_of` (K, H·W)."""
    windows = kept_windows(height, width, part.footprint, g.device, g.dtype)
    g_rows = (g.view(len(g) * height, width) @ windows[2]).view(len(g), height, 2, part.footprint)
    return torch.stack([windows[0].t() @ g_rows[:, :, 0], windows[1].t() @ g_rows[:, :, 1]], 1)
