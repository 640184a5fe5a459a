"""The whole CBAM2 block as one autograd function that keeps its input and a few small tensors.

Written literally the block makes about eight passes over full-size tensors and autograd keeps most of them. With the
masks ca (B, C) and sa (B, H·W), out = x·ca·sa, and the gradient g of the output,

    g_sa = Σ_c g·x·ca                       g_y = g·sa + g_avg/C + g_max at the maximum over channels
    g_ca = Σ_hw g_y·x                       g_x = g_y·ca + g_savg/HW + g_smax at the maximum over positions

where the gradients of the squeezes come from the small networks, which autograd differentiates as they are. On a CPU
all this runs over a few samples at a time, so that intermediate values stay in the cache.
"""

from typing import Any, Iterator, Tuple

import torch
import torch.nn as nn
from torch.autograd import forward_ad

from .parts_cbam2 import compute_dtype

__all__ = ["can_fuse", "fused", "fused_without_grad"]

CHUNK_BYTES = 2**21  # of one full-size tensor: a few of them fit a core's share of the cache


def can_fuse(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether `fused` serves this call; whatever it cannot serve takes the plain path, which autograd knows in full."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, grad, jvp
        and forward_ad._current_level < 0
        and not any(p._backward_hooks for p in block.parameters())  # the inner graphs would call them once more
    )


def _chunks(x: torch.Tensor) -> Iterator[slice]:
    batch = x.shape[0]
    step = batch
    if x.device.type == "cpu":
        step = max(1, CHUNK_BYTES * batch // max(x.numel() * x.element_size(), 1))
    return (slice(start, start + step) for start in range(0, batch, step))


def _squeeze(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(x)
    pairs = [(x[c].mean((2, 3), dtype=dtype), x[c].amax((2, 3)).to(dtype)) for c in _chunks(x)]
    s_avg, s_max = zip(*pairs)
    return torch.cat(s_avg), torch.cat(s_max)  # (B, C) each


def _apply_channels(x: torch.Tensor, mask: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = x·ca, and its average and maximum over channels, (B, H, W) each."""
    dtype = compute_dtype(x)
    y = torch.empty_like(x)
    pairs = []
    for c in _chunks(x):
        part = torch.mul(x[c], mask[c], out=y[c])
        pairs.append((part.mean(1, dtype=dtype), part.amax(1).to(dtype)))
    avg, largest = zip(*pairs)
    return y, torch.cat(avg), torch.cat(largest)


def _spread(g: torch.Tensor, values: torch.Tensor, largest: torch.Tensor, dim: Any, scratch: torch.Tensor):
    """Where `values` reach their maximum, as 1 and 0 in `scratch`, and g shared evenly among ties."""
    at = torch.eq(values, largest, out=scratch)
    return at, g / at.sum(dim, keepdim=True)


class _Cbam2Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        s_avg, s_max = _squeeze(x)
        with torch.enable_grad():
            s_avg.requires_grad_()
            s_max.requires_grad_()
            channel = block.channel.mask_of(s_avg, s_max)[0]  # (B, C)
        mask = channel.detach().to(x.dtype)[:, :, None, None]
        out, avg, largest = _apply_channels(x, mask)
        with torch.enable_grad():
            avg.requires_grad_()
            largest.requires_grad_()
            spatial = block.spatial.mask_of(avg, largest)[0]  # (B, H, W)
        out.mul_(spatial.detach().to(x.dtype)[:, None])
        ctx.block, ctx.inner = block, (s_avg, s_max, channel, avg, largest, spatial)
        ctx.save_for_backward(x, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _recompute(ctx, g, x, parameters)
        dtype = compute_dtype(x)
        s_avg, s_max, channel, avg, largest, spatial = ctx.inner
        ca = channel.detach().to(x.dtype)[:, :, None, None]
        sa = spatial.detach().to(x.dtype)[:, None]

        g_spatial = torch.cat([(g[c] * (x[c] * ca[c])).sum(1, dtype=dtype) for c in _chunks(x)])  # (B, H, W)
        g_avg, g_largest, *spatial_grads = _small(ctx, spatial, (avg, largest), parameters, g_spatial)

        g_x = torch.empty_like(x)
        g_channel = torch.empty_like(s_avg)
        for c in _chunks(x):
            part, y = x[c].to(dtype), (x[c] * ca[c]).to(dtype)
            g_y = torch.mul(g[c], sa[c], out=g_x[c]) if dtype == x.dtype else (g[c] * sa[c]).to(dtype)
            at, share = _spread(g_largest[c, None], y, largest[c, None], 1, torch.empty_like(y))
            g_y.add_(g_avg[c, None] / x.shape[1]).addcmul_(at, share)
            torch.sum(torch.mul(g_y, part, out=at), (2, 3), out=g_channel[c])
            if dtype != x.dtype:
                g_x[c] = g_y
        g_savg, g_smax, *channel_grads = _small(ctx, channel, (s_avg, s_max), parameters, g_channel)

        if ctx.needs_input_grad[1]:
            for c in _chunks(x):
                part = x[c].to(dtype)
                g_y = g_x[c].to(dtype)
                limit = s_max[c, :, None, None]
                at, share = _spread(g_smax[c, :, None, None], part, limit, (2, 3), torch.empty_like(part))
                g_y.mul_(ca[c]).add_(g_savg[c, :, None, None] / part[0, 0].numel()).addcmul_(at, share)
                if dtype != x.dtype:
                    g_x[c] = g_y
        both = [a if b is None else b for a, b in zip(spatial_grads, channel_grads)]
        return (None, g_x if ctx.needs_input_grad[1] else None, *both)


def _small(ctx: Any, output: torch.Tensor, squeezes: Tuple, parameters: Any, g: torch.Tensor):
    """Gradients of one of the small networks: of its two squeezes, then of every parameter, None where it has none."""
    needed = [p for p, needs in zip(parameters, ctx.needs_input_grad[2:]) if needs]
    found = torch.autograd.grad(output, [*squeezes, *needed], g, retain_graph=True, allow_unused=True)
    rest = iter(found[2:])
    zeros = [torch.zeros_like(s) if f is None else f for s, f in zip(squeezes, found)]
    return (*zeros, *(next(rest) if needs else None for needs in ctx.needs_input_grad[2:]))


def _recompute(ctx: Any, g: torch.Tensor, x: torch.Tensor, parameters: Any) -> Tuple[Any, ...]:
    """The backward that can itself be differentiated: through the plain path."""
    names = [name for name, _ in ctx.block.named_parameters()]
    out, _ = torch.func.functional_call(ctx.block, dict(zip(names, parameters)), (x,), {"return_attention": True})
    inputs = [t for t, needs in zip((x, *parameters), ctx.needs_input_grad[1:]) if needs]
    found = iter(torch.autograd.grad(out, inputs, g, create_graph=True, allow_unused=True))
    return (None, *(next(found) if needs else None for needs in ctx.needs_input_grad[1:]))


def fused(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block's output for x (B, C, H, W), with the lean backward."""
    return _Cbam2Function.apply(block, x, *block.parameters())


def fused_without_grad(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block's output for x (B, C, H, W), when nothing needs a gradient: the output is the only full-size tensor."""
    channel = block.channel.mask_of(*_squeeze(x))[0]
    out, avg, largest = _apply_channels(x, channel.to(x.dtype)[:, :, None, None])
    spatial = block.spatial.mask_of(avg, largest)[0]
    return out.mul_(spatial.to(x.dtype)[:, None])
