"""The whole CBAM2 block as one autograd function that keeps its input and a few small tensors.

Written literally the block makes about eight passes over full-size tensors and autograd keeps most of them. Here the
small networks between the passes are differentiated by autograd as they are, and the passes by the formulas in
`passes_cbam2`.
"""

import functools
from typing import Any, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrize import is_parametrized

from .parts_cbam2 import coordinate_windows, has_hooks
from .passes_cbam2 import passes_for

__all__ = ["can_fuse", "fused", "fused_without_grad"]


def can_fuse(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether `fused` serves this call; whatever it cannot serve takes the plain path, which autograd knows in full."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and not block.is_plain
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, grad, jvp
        and forward_ad._current_level < 0
        and all(_is_bare(module, module is block) for module in block.modules())
    )


def _is_bare(module: nn.Module, is_block: bool) -> bool:
    """Whether nothing watches `module` or its weights, which are its own."""
    if not is_block and has_hooks(module):
        return False  # the parts are never called as such
    if any(p._backward_hooks for p in module._parameters.values() if p is not None):
        return False  # the inner graphs would call them once more
    # In replicas of DataParallel and under FSDP1 weights are plain attributes, whose gradient would be lost.
    return not isinstance(module, nn.Conv2d) or "weight" in module._parameters or is_parametrized(module)


class _Small(NamedTuple):
    """The small tensors of one forward pass, each in `compute_dtype`."""

    s_avg: torch.Tensor  # (B, C)
    s_max: torch.Tensor
    ca: torch.Tensor
    avg: torch.Tensor  # (B, H, W)
    largest: torch.Tensor
    sa: torch.Tensor


def _spatial_mask(block: nn.Module, maps: Sequence[torch.Tensor], shared: Any, convolve: Any) -> torch.Tensor:
    if convolve is not None or (maps[0].device.type == "cpu" and torch.backends.mkldnn.is_available()):
        return block.spatial.mask_of_mixed(*maps, *shared, convolve)
    return block.spatial.mask_of(torch.stack(list(maps), 1), *shared)[0]


@functools.lru_cache(64)
def _kept_windows(*size: Any, inference: bool) -> Any:  # a tensor of inference mode cannot serve autograd
    with torch.no_grad():
        return coordinate_windows(*size)


def _windows(spatial: nn.Module, maps: torch.Tensor) -> Any:
    """About sixty small operations on constants, kept between passes."""
    if not spatial.coords:
        return None
    size = (*maps.shape[1:], spatial.footprint, maps.device, maps.dtype)
    return _kept_windows(*size, inference=torch.is_inference_mode_enabled())


def _forward(block: nn.Module, passes: Any, with_grad: bool) -> Tuple[torch.Tensor, Any, Any]:
    """The output; the four squeezes; and the two masks (B, C) and (B, H, W), with their graphs if asked for."""
    squeezes = passes.squeeze()
    with torch.set_grad_enabled(with_grad):
        squeezes = [s.requires_grad_(with_grad) for s in squeezes]
        channel = block.channel.mask_of(*squeezes)[0]
    ca = channel.detach()
    maps = passes.maps(ca)
    with torch.set_grad_enabled(with_grad):
        maps = [m.requires_grad_(with_grad) for m in maps]
        shared = block.spatial.prepare(*maps[0].shape[1:], maps[0].dtype, _windows(block.spatial, maps[0]))
        spatial = _spatial_mask(block, maps, shared, passes.convolve)
    return passes.apply(ca, spatial.detach()), (*squeezes, *maps), (channel, spatial)


class _Cbam2Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        passes = passes_for(x)
        out, squeezes, masks = _forward(block, passes, with_grad=True)
        ctx.block, ctx.graphs, ctx.passes_for = block, (squeezes, *masks), passes.again
        ctx.small = _Small(*(t.detach() for t in (*squeezes[:2], masks[0], *squeezes[2:], masks[1])))
        ctx.save_for_backward(x, *parameters)
        return out

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g):
            return _recompute(ctx, g, x, parameters)
        squeezes, channel, spatial = ctx.graphs
        passes = ctx.passes_for(x)  # as in the forward pass, whatever was switched on or off since
        g_sa = passes.start_backward(g, ctx.small)
        g_avg, g_max, *spatial_grads = _differentiate(ctx, spatial, squeezes[2:], parameters, g_sa)
        g_ca = passes.channel_gradient(g_avg, g_max)
        g_savg, g_smax, *channel_grads = _differentiate(ctx, channel, squeezes[:2], parameters, g_ca)
        g_x = passes.input_gradient(g_savg, g_smax) if ctx.needs_input_grad[1] else None
        both = [a if b is None else b for a, b in zip(spatial_grads, channel_grads)]
        return (None, g_x, *both)


def _differentiate(ctx: Any, output: torch.Tensor, squeezes: Sequence, parameters: Any, g: torch.Tensor) -> Tuple:
    """Gradients of one of the small networks: of its two squeezes, then of every parameter, None where it has none."""
    needed = [p for p, needs in zip(parameters, ctx.needs_input_grad[2:]) if needs]
    found = torch.autograd.grad(output, [*squeezes, *needed], g, retain_graph=True, allow_unused=True)
    rest = iter(found[2:])
    zeros = [torch.zeros_like(s) if f is None else f for s, f in zip(squeezes, found)]
    return (*zeros, *(next(rest) if needs else None for needs in ctx.needs_input_grad[2:]))


class _Plain(nn.Module):
    """The plain path of a block, without the hooks on it: they have run."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.forward(x, return_attention=True)[0]


def _recompute(ctx: Any, g: torch.Tensor, x: torch.Tensor, parameters: Any) -> Tuple[Any, ...]:
    """The backward that can itself be differentiated, or vectorised: through the plain path."""
    plain = _Plain(ctx.block)
    names = [name for name, _ in plain.named_parameters()]
    with torch.enable_grad():
        out = torch.func.functional_call(plain, dict(zip(names, parameters)), (x,))
    inputs = [t for t, needs in zip((x, *parameters), ctx.needs_input_grad[1:]) if needs]
    found = iter(torch.autograd.grad(out, inputs, g, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return (None, *(next(found) if needs else None for needs in ctx.needs_input_grad[1:]))


def fused(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block's output for x (B, C, H, W), with the lean backward."""
    return _Cbam2Function.apply(block, x, *block.parameters())


def fused_without_grad(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The block's output for x (B, C, H, W), when nothing needs a gradient: the output is the only full-size tensor."""
    with torch.no_grad():
        return _forward(block, passes_for(x), with_grad=False)[0]
