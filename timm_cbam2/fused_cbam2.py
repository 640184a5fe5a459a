"""The whole CBAM2 block as one autograd function that keeps its input and a few small tensors.

Written literally the block makes about eight passes over full-size tensors and autograd keeps most of them. With the
masks ca (B, C) and sa (B, H·W), out = x·ca·sa, and the gradient g of the output,

    g_sa = Σ_c g·x·ca                       g_y = g·sa + g_avg/C + g_max at the maximum over channels
    g_ca = Σ_hw g_y·x                       g_x = g_y·ca + g_savg/HW + g_smax at the maximum over positions

where the gradients of the squeezes come from the small networks, which autograd differentiates as they are. Equal
maxima share their gradient, as in autograd's own `amax`. On a CPU all this runs over a few samples at a time, so that
memory is read and written once where each step alone would do it again.
"""

from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
from torch.autograd import forward_ad

from .parts_cbam2 import compute_dtype

__all__ = ["can_fuse", "fused", "fused_without_grad"]

CHUNK_BYTES = 2**22  # of one full-size tensor: a few of them fit the cache that a CPU's cores share


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


def _chunks(x: torch.Tensor) -> List[slice]:
    batch = x.shape[0]
    step = batch
    if x.device.type == "cpu":
        step = max(1, CHUNK_BYTES * batch // max(x.numel() * x.element_size(), 1))
    return [slice(start, start + step) for start in range(0, batch, step)]


class _Small(NamedTuple):
    """The small tensors of one forward pass, each in `compute_dtype`."""

    s_avg: torch.Tensor  # (B, C)
    s_max: torch.Tensor
    ca: torch.Tensor
    avg: torch.Tensor  # (B, H, W)
    largest: torch.Tensor
    sa: torch.Tensor


def _spatial_mask(block: nn.Module, avg: torch.Tensor, largest: torch.Tensor, shared: Any) -> torch.Tensor:
    if avg.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return block.spatial.mask_of_mixed(avg, largest, *shared)
    return block.spatial.mask_of(avg, largest, *shared)[0]


def _squeeze(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """The average and the maximum over positions, (B, C) each."""
    dtype = compute_dtype(x)
    pairs = [(x[c].mean((2, 3), dtype=dtype), x[c].amax((2, 3)).to(dtype)) for c in _chunks(x)]
    s_avg, s_max = zip(*pairs) if len(pairs) > 1 else pairs[0]
    return (torch.cat(s_avg), torch.cat(s_max)) if len(pairs) > 1 else (s_avg, s_max)


def _apply_channels(x: torch.Tensor, ca: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = x·ca, and its average and maximum over channels, (B, H, W) each."""
    dtype = compute_dtype(x)
    mask = ca.to(x.dtype)[:, :, None, None]
    y = torch.empty_like(x)
    pairs = []
    for c in _chunks(x):
        part = torch.mul(x[c], mask[c], out=y[c])
        pairs.append((part.mean(1, dtype=dtype), part.amax(1).to(dtype)))
    if len(pairs) == 1:
        return y, *pairs[0]
    avg, largest = zip(*pairs)
    return y, torch.cat(avg), torch.cat(largest)


def _forward(block: nn.Module, x: torch.Tensor, with_grad: bool) -> Tuple[torch.Tensor, Any, Any]:
    """The output; the four squeezes; and the two masks (B, C) and (B, H, W), with their graphs if asked for."""
    squeezes = _squeeze(x)
    with torch.set_grad_enabled(with_grad):
        squeezes = [s.requires_grad_(with_grad) for s in squeezes]
        channel = block.channel.mask_of(*squeezes)[0]
    out, *maps = _apply_channels(x, channel.detach())
    with torch.set_grad_enabled(with_grad):
        maps = [m.requires_grad_(with_grad) for m in maps]
        shared = block.spatial.prepare(x.shape[2], x.shape[3], maps[0].dtype)
        spatial = _spatial_mask(block, *maps, shared)
    out.mul_(spatial.detach().to(x.dtype)[:, None])
    return out, (*squeezes, *maps), (channel, spatial)


def _share(g: torch.Tensor, values: torch.Tensor, largest: torch.Tensor, dim: Any) -> Tuple[torch.Tensor, torch.Tensor]:
    """Where `values` reach their maximum, as 1 and 0 in their place, and g shared evenly among equal ones."""
    at = torch.eq(values, largest, out=values)
    return at, g / at.sum(dim, keepdim=True)


class _Cbam2Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        out, squeezes, masks = _forward(block, x, with_grad=True)
        ctx.block, ctx.graphs = block, (squeezes, *masks)
        ctx.small = _Small(*(t.detach() for t in (*squeezes[:2], masks[0], *squeezes[2:], masks[1])))
        ctx.save_for_backward(x, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _recompute(ctx, g, x, parameters)
        squeezes, channel, spatial = ctx.graphs
        s_max, largest = ctx.small.s_max[:, :, None, None], ctx.small.largest[:, None]
        ca, sa = ctx.small.ca.to(x.dtype)[:, :, None, None], ctx.small.sa.to(x.dtype)[:, None]
        dtype = compute_dtype(x)
        chunks = _chunks(x)
        scratch = torch.empty_like(x[chunks[0]], dtype=dtype)

        g_spatial = torch.empty_like(ctx.small.avg)  # (B, H, W)
        for c in chunks:
            part = x[c]
            if dtype == x.dtype:
                y = torch.mul(part, ca[c], out=scratch[: len(part)]).mul_(g[c])
            else:
                y = (part * ca[c]).mul_(g[c])
            torch.sum(y, 1, dtype=dtype, out=g_spatial[c])
        g_avg, g_largest, *spatial_grads = _differentiate(ctx, spatial, squeezes[2:], parameters, g_spatial)
        g_avg, g_largest = g_avg[:, None] / x.shape[1], g_largest[:, None]

        g_x = torch.empty_like(x)
        g_channel = torch.empty_like(ctx.small.s_avg)  # (B, C)
        for c in chunks:
            part, y = x[c], scratch[: len(x[c])]
            if dtype == x.dtype:
                g_y = torch.mul(g[c], sa[c], out=g_x[c])
                torch.mul(part, ca[c], out=y)
            else:
                g_y = (g[c] * sa[c]).to(dtype)
                y.copy_(part * ca[c])
            at, share = _share(g_largest[c], y, largest[c], 1)
            g_y.add_(g_avg[c]).addcmul_(at, share)
            torch.sum(torch.mul(g_y, part, out=y), (2, 3), out=g_channel[c])
            if dtype != x.dtype:
                g_x[c] = g_y
        g_savg, g_smax, *channel_grads = _differentiate(ctx, channel, squeezes[:2], parameters, g_channel)
        g_savg, g_smax = g_savg[:, :, None, None] / x[0, 0].numel(), g_smax[:, :, None, None]

        if ctx.needs_input_grad[1]:
            for c in chunks:
                part, g_y = x[c], g_x[c].to(dtype)
                at = torch.eq(part, s_max[c].to(x.dtype), out=scratch[: len(part)])
                share = g_smax[c] / at.sum((2, 3), keepdim=True)
                g_y.mul_(ca[c]).add_(g_savg[c]).addcmul_(at, share)
                if dtype != x.dtype:
                    g_x[c] = g_y
        both = [a if b is None else b for a, b in zip(spatial_grads, channel_grads)]
        return (None, g_x if ctx.needs_input_grad[1] else None, *both)


def _differentiate(ctx: Any, output: torch.Tensor, squeezes: Sequence, parameters: Any, g: torch.Tensor) -> Tuple:
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
    with torch.no_grad():
        return _forward(block, x, with_grad=False)[0]
