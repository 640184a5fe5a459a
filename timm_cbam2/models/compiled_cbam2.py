"""The end of a residual branch as torch.compile sees it: so that inductor reads full-size tensors least often.

What costs is each tensor of that size which is written to be read again. Inductor computes a value anew in each loop
that needs it, unless it is made of more than four tensors or is used twice by one expression; and it keeps for the
backward what the forward would otherwise have to compute behind a matrix product, whatever that is. So BatchNorm is one
multiplication and addition by numbers that lie ready, and the products with the masks have backwards of their own, in
which no expression is one of the forward's, or another's of the same kind (else they would become one, and be stored):
the same product is once x·ca and once ca·x, the same comparison once =, once >=.

Sums over positions are made in two steps, row by row, on a CPU: over both axes at once inductor walks through the whole
image for every few channels, and finds nothing of it in the caches again.

A ResNet's block then costs 5 readings and writings of them in inference and 25 in training; with SE 6 and 21, plain 3
and 15, and with what autograd and inductor make of the block as it is written, 7 and 33.
"""

from typing import Any, Optional, Tuple

import torch
import torch.nn as nn

from .parts_cbam2 import as_dtype, compute_dtype, has_hooks, mean_in

__all__ = ["apply_masks", "is_compiled", "maps_of", "normalised", "squeezes_of"]


def is_compiled() -> bool:
    """Whether torch.compile is looking, and not an export, whose graph should hold what converters know."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


def _over_positions(t: torch.Tensor, dtype: Optional[torch.dtype] = None, batch: bool = False) -> torch.Tensor:
    """The sum over positions of t (B, C, H, W), (B, C, 1, 1); with `batch` over samples too, (1, C, 1, 1)."""
    if t.device.type != "cpu":
        return t.sum((0, 2, 3) if batch else (2, 3), True, dtype=dtype)
    return t.sum(3, True, dtype=dtype).sum((0, 2) if batch else 2, True)


class _Squeezes(torch.autograd.Function):
    """The average and the maximum over positions, (B, C, 1, 1) each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        average, largest = _squeezes(x)
        ctx.save_for_backward(x, largest)
        return average, largest

    @staticmethod
    def backward(ctx: Any, g_average: torch.Tensor, g_largest: torch.Tensor) -> torch.Tensor:
        x, largest = ctx.saved_tensors
        dtype = largest.dtype
        ties = _over_positions(as_dtype(as_dtype(x, dtype) >= largest, dtype))
        average, share = g_average / (x.shape[2] * x.shape[3]), g_largest / ties.clamp(min=1)
        zero = torch.zeros((), dtype=dtype, device=x.device)
        return as_dtype(torch.where(as_dtype(x, dtype) == largest, share, zero) + average, x.dtype)


class _Maps(torch.autograd.Function):
    """The average and the maximum over channels of x·ca, (B, 1, H, W) each, for ca (B, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ca: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        average, largest = _maps(x, ca)
        ctx.save_for_backward(x, ca, largest)
        return average, largest

    @staticmethod
    def backward(ctx: Any, g_average: torch.Tensor, g_largest: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        x, ca, largest = ctx.saved_tensors
        dtype = largest.dtype
        zero = torch.zeros((), dtype=dtype, device=x.device)
        ties = as_dtype(largest <= as_dtype(ca * x, dtype), dtype).sum(1, True)
        average, share = g_average / x.shape[1], g_largest / ties.clamp(min=1)
        g_y = average + torch.where(as_dtype(ca * x, dtype) >= largest, share, zero)
        again = torch.where(as_dtype(ca * x, dtype) == largest, share, zero) + average
        return as_dtype(g_y * ca, x.dtype), as_dtype(_over_positions(again * x), ca.dtype)


class _Masked(torch.autograd.Function):
    """x·ca·sa, for ca (B, C, 1, 1) and sa (B, 1, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ca: torch.Tensor, sa: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, ca, sa)
        return x * (ca * sa)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, ca, sa = ctx.saved_tensors
        dtype = compute_dtype(x)
        of_ca = _over_positions(as_dtype(x, dtype) * g * sa)
        of_sa = (as_dtype(g, dtype) * x * ca).sum(1, True)
        return (g * sa) * ca, as_dtype(of_ca, ca.dtype), as_dtype(of_sa, sa.dtype)


class _Normalised(torch.autograd.Function):
    """As BatchNorm in training; mean, invstd, weight and bias are (1, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor, weight: Any, bias: Any) -> Any:
        scale = weight * invstd
        ctx.save_for_backward(z, mean, invstd, scale)
        return _scaled(z, scale, bias - mean * scale)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        z, mean, invstd, scale = ctx.saved_tensors
        count = z.numel() // z.shape[1]
        g_bias = _over_positions(g, mean.dtype, batch=True)
        g_weight = _over_positions(g * (z - mean), batch=True) * invstd
        off, slope = torch.cat([g_bias / count, g_weight * invstd / count]).split(1)
        return as_dtype((g - off - (z - mean) * slope) * scale, z.dtype), None, None, g_weight, g_bias


def _squeezes(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(x)
    average = _over_positions(x, dtype) / (x.shape[2] * x.shape[3])
    largest = x.amax(3, True).amax(2, True) if x.device.type == "cpu" else x.amax((2, 3), True)
    return average, as_dtype(largest, dtype)


def squeezes_of(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The average and the maximum over positions of x (B, C, H, W), (B, C) each."""
    average, largest = _Squeezes.apply(x) if torch.is_grad_enabled() else _squeezes(x)
    return average.flatten(1), largest.flatten(1)


def _maps(x: torch.Tensor, ca: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    y, dtype = x * ca, compute_dtype(x)
    return mean_in(y, [1], dtype, True), as_dtype(y.amax(1, True), dtype)


def maps_of(x: torch.Tensor, ca: torch.Tensor) -> torch.Tensor:
    """The average and the maximum over channels of x·ca, (B, 2, H, W), for ca (B, C, 1, 1)."""
    return torch.cat(_Maps.apply(x, ca) if torch.is_grad_enabled() else _maps(x, ca), 1)


def apply_masks(x: torch.Tensor, ca: torch.Tensor, sa: torch.Tensor) -> torch.Tensor:
    """x·ca·sa, for ca (B, C, 1, 1) and sa (B, 1, H, W)."""
    return _Masked.apply(x, ca, sa) if torch.is_grad_enabled() else x * (ca * sa)


def _scaled(z: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    ready = torch.cat([scale, shift])  # which inductor stores
    return as_dtype(z * ready[:1] + ready[1:], z.dtype)


def _own(norm: Any, z: torch.Tensor) -> bool:
    """Whether `normalised` does what this module would: a BatchNorm in training, or in evaluation with no gradient."""
    return (
        type(norm) is nn.BatchNorm2d
        and not has_hooks(norm)
        and norm.affine
        and norm.running_mean is not None
        and norm.weight.dtype == norm.running_mean.dtype == compute_dtype(z)
        and norm.training == torch.is_grad_enabled()
        and (norm.momentum is not None or not norm.training)
    )


def _var_mean(z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Variance, without a correction, and mean of each channel of z (B, C, H, W), (1, C, 1, 1) each."""
    if z.device.type != "cpu":
        return torch.var_mean(z, (0, 2, 3), correction=0, keepdim=True)
    # In one reading: the sums are of what z is off a row's mean, so that they are not of large numbers.
    count = z.numel() // z.shape[1]
    near = z[:1, :, :1].mean(3, True)
    off = near - z
    first, second = (_over_positions(t, batch=True) / count for t in (off, off * off))
    return (second - first * first).clamp(min=0), near - first


def normalised(norm: Optional[nn.Module], z: torch.Tensor) -> torch.Tensor:
    """norm(z), for z (B, C, H, W); z itself where norm is None."""
    if norm is None:
        return z
    if not _own(norm, z):
        return norm(z)
    weight, bias = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
    if not norm.training:
        mean, var = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        scale = weight * torch.rsqrt(var + norm.eps)
        return _scaled(z, scale, bias - mean * scale)
    count = z.numel() // z.shape[1]
    if count == 1:
        return norm(z)  # which refuses
    with torch.no_grad():
        var, mean = _var_mean(as_dtype(z, compute_dtype(z)))
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.view(-1), norm.momentum)
        norm.running_var.lerp_(var.view(-1) * (count / (count - 1)), norm.momentum)
        invstd = torch.rsqrt(var + norm.eps)
    return _Normalised.apply(z, mean, invstd, weight, bias)
