"""The end of a residual branch as torch.compile sees it: so that inductor reads full-size tensors least often.

What costs is each tensor of that size which is written to be read again. Inductor computes a value anew in each loop
that needs it, unless it is made of more than four tensors or is used twice by one expression; and it keeps for the
backward what the forward would otherwise have to compute behind a matrix product, whatever that is. So BatchNorm is one
multiplication and addition by numbers that lie ready, whose gradients are sums by sample and channel that the masks'
need anyway; and the products with the masks have backwards of their own, in which no expression is one of the
forward's, or another's of the same kind (else they would become one, and be stored): the same product is once x·ca and
once ca·x, the same comparison once =, once >=. The gradient that comes to a block is a sum of several tensors, and is
read in every loop: that one is stored.

Sums over positions are made in two steps, row by row, on a CPU: over both axes at once inductor walks through the whole
image for every few channels, and finds nothing of it in the caches again.

A ResNet's block then costs 5 readings and writings of them in inference and 20 in training; with SE 6 and 21, plain 3
and 15, and with what autograd and inductor make of the block as it is written, 7 and 33.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from .parts_cbam2 import as_dtype, compute_dtype, has_hooks, mean_in

__all__ = ["Source", "apply_masks", "is_compiled", "maps_of", "normalised", "squeezes_of", "stored"]


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) is at work, which dynamo follows as it looks."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_compiled() -> bool:
    """Whether torch.compile is looking, and not an export, whose graph should hold what converters know; nor is
    torch.func at work, which takes no gradients that are given as here."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not _is_transformed()


def _over_positions(t: torch.Tensor, dtype: Optional[torch.dtype] = None, batch: bool = False) -> torch.Tensor:
    """The sum over positions of t (B, C, H, W), (B, C, 1, 1); with `batch` over samples too, (1, C, 1, 1)."""
    if t.device.type != "cpu":
        return t.sum((0, 2, 3) if batch else (2, 3), True, dtype=dtype)
    return t.sum(3, True, dtype=dtype).sum((0, 2) if batch else 2, True)


class Source(NamedTuple):
    """What the attention sees: x = z (B, C, H, W), or x = (z − mean)·scale + bias, which is never stored."""

    z: torch.Tensor
    scale: Optional[torch.Tensor] = None  # (1, C, 1, 1), as bias and mean
    bias: Optional[torch.Tensor] = None
    mean: Optional[torch.Tensor] = None
    ready: Optional[torch.Tensor] = None  # (2, C, 1, 1): what z is multiplied by, and what is added

    @property
    def x(self) -> torch.Tensor:
        return self.z if self.ready is None else as_dtype(self.z * self.ready[:1] + self.ready[1:], self.z.dtype)

    def gradients(self, g: torch.Tensor, g_scale: Any, g_bias: Any) -> Tuple[Any, ...]:
        """Of each of these; g is the gradient of x."""
        if self.scale is None:
            return as_dtype(g, self.z.dtype), None, None, None, None
        return as_dtype(g * self.scale, self.z.dtype), g_scale, g_bias, None, None


class _Squeezes(torch.autograd.Function):
    """The average and the maximum over positions, (B, C, 1, 1) each."""

    @staticmethod
    def forward(ctx: Any, *source: Any) -> Tuple[torch.Tensor, ...]:
        s = Source(*source)
        average, largest, away, top = _squeezes(s, not _repeats(s.z))
        ctx.save_for_backward(*source, top, away)
        return average, largest

    @staticmethod
    def backward(ctx: Any, g_average: torch.Tensor, g_largest: torch.Tensor) -> Tuple[Any, ...]:
        *source, top, away = ctx.saved_tensors
        s, dtype = Source(*source), away.dtype
        zero = torch.zeros((), dtype=dtype, device=away.device)
        if _repeats(s.z):
            at_top, again = s.x >= top, s.x == top
            share = g_largest / _over_positions(as_dtype(at_top, dtype)).clamp(min=1)
        else:
            height, width = s.z.shape[2:]
            at_top = again = torch.arange(height * width, device=top.device).view(1, 1, height, width) == top
            share = g_largest
        average, g_scale, g_bias = g_average / (s.z.shape[2] * s.z.shape[3]), None, None
        if s.mean is not None:
            off = _over_positions(torch.where(at_top, s.z - s.mean, zero))
            g_scale, g_bias = (share * off + g_average * away).sum(0, True), (g_average + g_largest).sum(0, True)
        return s.gradients(torch.where(again, share, zero) + average, g_scale, g_bias)


class _Maps(torch.autograd.Function):
    """The average and the maximum over channels of x·ca, (B, 1, H, W) each, for ca (B, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, ca: torch.Tensor, *source: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        x = Source(*source).x
        average, largest, top = _maps(x, ca, not _repeats(x))
        ctx.save_for_backward(ca, *source, top)
        return average, largest

    @staticmethod
    def backward(ctx: Any, g_average: torch.Tensor, g_largest: torch.Tensor) -> Tuple[Any, ...]:
        ca, *source, top = ctx.saved_tensors
        s, dtype = Source(*source), g_largest.dtype
        zero = torch.zeros((), dtype=dtype, device=top.device)
        if _repeats(s.z):
            x = s.x
            tops, share = (ca * x >= top, ca * x == top, top == ca * x), g_largest
            share = share / as_dtype(top <= ca * x, dtype).sum(1, True).clamp(min=1)
        else:
            tops, share = (torch.arange(s.z.shape[1], device=top.device).view(1, -1, 1, 1) == top,) * 3, g_largest
        average = g_average / s.z.shape[1]
        # One number three times, each for a loop of its own.
        g = average + torch.where(tops[0], share, zero)
        again = torch.where(tops[1], share, zero) + average
        once_more = torch.where(tops[2], share, zero) + average
        return _of_product(s, ca, g * ca, again, once_more)


class _Masked(torch.autograd.Function):
    """x·ca·sa, for ca (B, C, 1, 1) and sa (B, 1, H, W)."""

    @staticmethod
    def forward(ctx: Any, sa: torch.Tensor, ca: torch.Tensor, *source: Any) -> torch.Tensor:
        ctx.save_for_backward(sa, ca, *source)
        return Source(*source).x * (ca * sa)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        sa, ca, *source = ctx.saved_tensors
        s, dtype = Source(*source), compute_dtype(g)
        of_sa = (as_dtype(g, dtype) * s.x * ca).sum(1, True)
        of_y = sa * as_dtype(g, dtype)
        return (as_dtype(of_sa, sa.dtype), *_of_product(s, ca, (g * sa) * ca, of_y, of_y))


def _of_product(
    s: Source, ca: torch.Tensor, g_x: torch.Tensor, g: torch.Tensor, again: torch.Tensor
) -> Tuple[Any, ...]:
    """The gradients of ca and of a source from that of x·ca, g, which is given twice, and g_x = g·ca."""
    if s.scale is None:
        return as_dtype(_over_positions(g * s.z), ca.dtype), *s.gradients(g_x, None, None)
    along, alone = _over_positions(g * (s.z - s.mean)), _over_positions(again)
    g_ca = as_dtype(along * s.scale + alone * s.bias, ca.dtype)
    return g_ca, *s.gradients(g_x, (ca * along).sum(0, True), (ca * alone).sum(0, True))


class _Measured(torch.autograd.Function):
    """What a BatchNorm in training makes of its batch: scale and bias; all but z are (1, C, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor, weight: Any, bias: Any) -> Any:
        scale = weight * invstd
        ctx.save_for_backward(z, mean, invstd, scale)
        return scale, bias.clone()

    @staticmethod
    def backward(ctx: Any, g_scale: torch.Tensor, g_bias: torch.Tensor) -> Tuple[Any, ...]:
        z, mean, invstd, scale = ctx.saved_tensors
        count = z.numel() // z.shape[1]
        g_weight = g_scale * invstd
        off, slope = torch.cat([scale * g_bias / count, scale * g_weight * invstd / count]).split(1)
        return as_dtype((mean - z) * slope - off, z.dtype), None, None, g_weight, g_bias


class _Stored(torch.autograd.Function):
    """x, whose gradient is stored, since inductor stores what is read by its strides."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g.as_strided(g.shape, g.stride())


def _repeats(z: torch.Tensor) -> bool:
    """Whether what is computed from z anew, in another loop, is the same number.

    It is not where inductor leaves out roundings to half precision, in one loop and not in the other, nor where a
    compiler may join a multiplication and an addition. There a maximum is found again by its place, not by its value.
    """
    return z.dtype == compute_dtype(z) and z.device.type == "cpu"


def _squeezes(s: Source, places: bool = False) -> Tuple[torch.Tensor, ...]:
    """The average and the maximum of x over positions, the average of z − mean, and what finds the maximum again: its
    value, or with `places` its position in H·W."""
    dtype, x = compute_dtype(s.z), s.x
    if places:
        in_row, column = x.max(3, True)
        largest, row = in_row.max(2, True)
        top = row * x.shape[3] + column.gather(2, row)
    else:
        top = largest = x.amax(3, True).amax(2, True) if x.device.type == "cpu" else x.amax((2, 3), True)
    away = average = _over_positions(s.z, dtype) / (x.shape[2] * x.shape[3])
    if s.ready is not None:
        away = average - s.mean
        average = away * s.scale + s.bias
    return average, as_dtype(largest, dtype), away, top


def squeezes_of(s: Source) -> Tuple[torch.Tensor, torch.Tensor]:
    """The average and the maximum over positions of x, (B, C) each."""
    average, largest = (_Squeezes.apply(*s) if torch.is_grad_enabled() else _squeezes(s))[:2]
    return average.flatten(1), largest.flatten(1)


def _maps(x: torch.Tensor, ca: torch.Tensor, places: bool = False) -> Tuple[torch.Tensor, ...]:
    """The average and the maximum of x·ca over channels, and what finds the maximum again: its value, or with `places`
    its channel."""
    y, dtype = x * ca, compute_dtype(x)
    largest, top = y.max(1, True) if places else (y.amax(1, True),) * 2
    return mean_in(y, [1], dtype, True), as_dtype(largest, dtype), top


def maps_of(s: Source, ca: torch.Tensor) -> torch.Tensor:
    """The average and the maximum over channels of x·ca, (B, 2, H, W), for ca (B, C, 1, 1)."""
    return torch.cat(_Maps.apply(ca, *s) if torch.is_grad_enabled() else _maps(s.x, ca)[:2], 1)


def apply_masks(s: Source, ca: torch.Tensor, sa: torch.Tensor) -> torch.Tensor:
    """x·ca·sa, for ca (B, C, 1, 1) and sa (B, 1, H, W)."""
    return _Masked.apply(sa, ca, *s) if torch.is_grad_enabled() else s.x * (ca * sa)


@torch.compiler.allow_in_graph  # dynamo would take the strides for those of a contiguous tensor
def _stored(x: torch.Tensor) -> torch.Tensor:
    return _Stored.apply(x)


def stored(x: torch.Tensor) -> torch.Tensor:
    """x, of which several loops of the backward read the gradient."""
    return _stored(x).clone() if torch.is_grad_enabled() else x  # a clone may be overwritten by an activation


def _own(norm: Any, z: torch.Tensor) -> bool:
    """Whether `normalised` does what this module would: a BatchNorm in training, or in evaluation with no gradient."""
    return (
        type(norm) is nn.BatchNorm2d
        and not has_hooks(norm)
        and norm.weight is not None
        and norm.bias is not None
        and norm.running_mean is not None
        and norm.weight.dtype == norm.running_mean.dtype == compute_dtype(z)
        and norm.training == torch.is_grad_enabled()
        and (norm.momentum is not None and norm.track_running_stats or not norm.training)
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


def normalised(norm: Optional[nn.Module], z: torch.Tensor) -> Source:
    """norm(z), for z (B, C, H, W); z itself where norm is None."""
    if norm is None or not _own(norm, z) or (norm.training and z.numel() == z.shape[1]):
        return Source(z if norm is None else norm(z))
    weight, bias = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
    if not norm.training:
        mean, var = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        return _source(z, weight * torch.rsqrt(var + norm.eps), bias, mean)
    count = z.numel() // z.shape[1]
    with torch.no_grad():
        var, mean = _var_mean(as_dtype(z, compute_dtype(z)))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.view(-1), norm.momentum)
        norm.running_var.lerp_(var.view(-1) * (count / (count - 1)), norm.momentum)
        invstd = torch.rsqrt(var + norm.eps)
    scale, shift = _Measured.apply(z, mean, invstd, weight, bias)
    return _source(z, scale, shift, mean)


def _source(z: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor) -> Source:
    with torch.no_grad():
        ready = torch.cat([scale, bias - mean * scale])  # which inductor stores
    return Source(z, scale, bias, mean, ready)
