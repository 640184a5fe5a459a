"""The whole CBAM2 block, and what a residual block does around it, as one autograd function.

Written literally the end of a residual branch (BatchNorm, attention, layer-scale, shortcut, activation) makes a dozen
passes over full-size tensors and autograd keeps many of them. This keeps one and a few small tensors. The small
networks between the passes are differentiated by autograd as they are, and the passes by the formulas in
`passes_cbam2`.
"""

from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from .decisions_cbam2 import DecisionNorm, Measure, measured_by, measures
from .parts_cbam2 import has_hooks, no_autocast
from .passes_cbam2 import Affine, End, Small, passes_for
from .small_backward_cbam2 import channel_backward, spatial_backward
from .small_cbam2 import channel_mask, channel_weights, kept_spatial_weights, spatial_mask, spatial_weights

__all__ = ["can_fuse", "fused", "fused_without_grad", "needs_gradient", "train_affine"]


def can_fuse(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether `fused` serves this call; whatever it cannot serve takes the plain path, which autograd knows in full."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and not block.is_plain
        and (block.spatial.learned is None or not is_parametrized(block.spatial.learned.conv))
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, grad, jvp
        and not _has_any_global_hook()
        and forward_ad._current_level < 0
        and all(_is_bare(module, module is block) for module in block.modules())
    )


def _is_bare(module: nn.Module, is_block: bool) -> bool:
    """Whether nothing watches `module` or its weights, which are its own."""
    if not is_block and has_hooks(module):
        return False  # the parts are never called as such
    if any(p._backward_hooks for p in module._parameters.values() if p is not None):
        return False  # the inner graphs would call them once more
    if isinstance(module, _BatchNorm) and (type(module) is not DecisionNorm or module.running_mean is None):
        return False  # SyncBatchNorm looks at other processes' batches too
    # In replicas of DataParallel and under FSDP1 weights are plain attributes, whose gradient would be lost.
    return not isinstance(module, (nn.Conv2d, _BatchNorm)) or "weight" in module._parameters or is_parametrized(module)


NO_END = End()
LEARNED = "learned.conv.weight"


class _Call(NamedTuple):
    """What one call has beside the tensors that get gradients."""

    block: nn.Module
    relu: bool = False
    drop: Optional[torch.Tensor] = None  # (B,), what stochastic depth multiplies each sample's branch by
    norm: Optional[nn.Module] = None  # a BatchNorm that x has yet to pass
    names: Tuple[str, ...] = ()  # of the parameters of the channel part, then of the spatial part
    channel_parameters: int = 0
    by_hand: bool = False  # the small networks need no graph
    found: Mapping[str, Measure] = {}  # what norms of decisions measure by


class _Graphs(NamedTuple):
    """The squeezes and the masks made of them, as autograd knows them."""

    squeezes: torch.Tensor  # (B, 2, C)
    ca: torch.Tensor  # (B, C)
    maps: torch.Tensor  # (B, 2 + P, H, W)
    sa: torch.Tensor  # (B, H, W)


def _channel(call: _Call, squeezes: torch.Tensor) -> torch.Tensor:
    part = call.block.channel
    return channel_mask(part, channel_weights(part, squeezes.dtype), squeezes)


def _spatial(call: _Call, maps: torch.Tensor, convolve: Any) -> torch.Tensor:
    part = call.block.spatial
    weigh = kept_spatial_weights if not (torch.is_grad_enabled() or call.by_hand) else spatial_weights
    height, width = maps.shape[2:]
    sa = spatial_mask(part, weigh(part, height, width, maps.dtype), maps, convolve)
    return sa if call.drop is None else sa * call.drop.to(sa.dtype)[:, None, None]


def _forward(call: _Call, passes: Any, end: End, with_grad: bool) -> Tuple[torch.Tensor, Small, Optional[_Graphs]]:
    """The output, the small tensors, and their graphs where they are needed and were not left for the backward."""
    squeezes = passes.squeeze()
    with torch.set_grad_enabled(with_grad):
        ca = _channel(call, squeezes.requires_grad_(with_grad))
    learned = call.block.spatial.learned
    weight = () if learned is None else (learned.conv.weight.detach().flatten(1).to(ca.dtype),)
    maps = passes.maps(ca.detach(), *weight)
    with torch.set_grad_enabled(with_grad):
        sa = _spatial(call, maps.requires_grad_(with_grad), passes.convolve)
    small = Small(squeezes.detach(), ca.detach(), maps.detach(), sa.detach())
    return passes.finish(small.ca, small.sa, end), small, _Graphs(squeezes, ca, maps, sa)


def _train_norm(norm: nn.Module, z: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `norm(z)` in training: the result, and the statistics of the batch that its backward takes."""
    norm.num_batches_tracked.add_(1)
    buffers = norm.running_mean, norm.running_var
    return torch.native_batch_norm(z, norm.weight, norm.bias, *buffers, True, norm.momentum, norm.eps)


def train_affine(weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor) -> Affine:
    """What such a BatchNorm multiplies by and adds, rounded as torch rounds."""
    scale = invstd * weight
    return Affine(scale, torch.addcmul(bias, mean, scale, value=-1), weight, bias, mean, invstd)


class _Cbam2Function(torch.autograd.Function):
    """x, shortcut, gamma, then weight and bias of the BatchNorm, then the block's parameters."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: torch.Tensor, shortcut: Any, gamma: Any, weight: Any, bias: Any, *rest: Any):
        mean = invstd = None
        learned = call.block.spatial.learned is not None
        if call.norm is None:
            passes = passes_for(x, learned=learned)
        else:
            normalised, mean, invstd = _train_norm(call.norm, x)
            passes = passes_for(normalised, owned=True, learned=learned)
        end = End(shortcut, gamma, call.relu, call.drop is not None)
        out, small, graphs = _forward(call, passes, end, with_grad=not call.by_hand)
        ctx.call, ctx.small, ctx.graphs, ctx.again = call, small, graphs, passes.again
        kept = out if call.relu else None
        ctx.save_for_backward(x, shortcut, gamma, weight, bias, mean, invstd, kept, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        x, shortcut, gamma, weight, bias, mean, invstd, out, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g):
            return (None, *_recompute(ctx, g, [x, shortcut, gamma, weight, bias, *parameters]))
        affine = None if mean is None else train_affine(weight, bias, mean, invstd)
        passes = ctx.again(x, affine)  # as in the forward pass, whatever was switched on or off since
        g_sa = passes.start_backward(g, ctx.small, gamma, out)
        g_maps, spatial_grads = _small_backward(ctx, True, parameters, g_sa, passes)
        g_ca, spatial_grads = _channel_gradient(ctx, parameters, g_maps, passes, spatial_grads)
        g_squeezes, channel_grads = _small_backward(ctx, False, parameters, g_ca, passes)
        g_gamma = passes.gamma_gradient() if ctx.needs_input_grad[3] else None
        g_x = g_weight = g_bias = None
        if ctx.needs_input_grad[1] or affine is not None:
            g_x, g_weight, g_bias = passes.input_gradient(g_squeezes[:, 0], g_squeezes[:, 1])
        g_shortcut = passes.g if ctx.needs_input_grad[2] else None
        return (None, g_x, g_shortcut, g_gamma, g_weight, g_bias, *channel_grads, *spatial_grads)


def _channel_gradient(ctx: Any, parameters: Sequence, g_maps: torch.Tensor, passes: Any, grads: Sequence) -> Any:
    """The gradient of ca, and those of the spatial part's parameters with that of the weights of learned maps."""
    names = ctx.call.names[ctx.call.channel_parameters :]
    if LEARNED not in names:
        return passes.channel_gradient(g_maps[:, 0], g_maps[:, 1]), grads
    at = names.index(LEARNED)
    weight = parameters[ctx.call.channel_parameters + at]
    learned = weight.flatten(1).to(g_maps.dtype)
    g_ca = passes.channel_gradient(g_maps[:, 0], g_maps[:, 1], g_maps[:, 2:], learned)
    found = None
    if ctx.needs_input_grad[6 + ctx.call.channel_parameters + at]:
        found = passes.learned_gradient.view_as(weight).to(weight.dtype)
    return g_ca, [*grads[:at], found, *grads[at + 1 :]]


def _small_backward(ctx: Any, is_spatial: bool, parameters: Sequence, g: torch.Tensor, passes: Any) -> Tuple:
    """Of one of the small networks: the gradient of its squeezes, and those of its parameters, None where none is
    needed."""
    call, count = ctx.call, ctx.call.channel_parameters
    own = slice(count, None) if is_spatial else slice(count)
    mine, needs = parameters[own], ctx.needs_input_grad[6:][own]
    if not call.by_hand:
        squeezes, ca, maps, sa = ctx.graphs
        return _differentiate(sa if is_spatial else ca, maps if is_spatial else squeezes, mine, needs, g)
    named = dict(zip(call.names[own], mine))
    prefix = "spatial." if is_spatial else "channel."
    found = {name[len(prefix) :]: measure for name, measure in call.found.items() if name.startswith(prefix)}
    if is_spatial:
        g_in, grads = spatial_backward(call.block.spatial, named, found, ctx.small.maps, g, call.drop, passes.kernel)
    else:
        g_in, grads = channel_backward(call.block.channel, named, found, ctx.small.squeezes, g)
    needs = [need and name != LEARNED for name, need in zip(named, needs)]  # that one is found by a pass
    wanted = [grads[name].to(p.dtype) if need else None for (name, p), need in zip(named.items(), needs)]
    return g_in, wanted


def _differentiate(output: torch.Tensor, squeezes: torch.Tensor, parameters: Sequence, needs: Sequence, g: Any) -> Any:
    """The same by autograd, for weights that are made of others."""
    needed = [p for p, need in zip(parameters, needs) if need]
    found = torch.autograd.grad(output, [squeezes, *needed], g, retain_graph=True, allow_unused=True)
    rest = iter(found[1:])
    first = torch.zeros_like(squeezes) if found[0] is None else found[0]
    return first, [next(rest) if need else None for need in needs]


class _Plain(nn.Module):
    """The plain path of a block, without the hooks on it: they have run."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.forward(x, return_attention=True)[0]


def _recompute(ctx: Any, g: torch.Tensor, inputs: List[Any]) -> List[Any]:
    """The backward that can itself be differentiated, or vectorised: through the plain path."""
    call = ctx.call
    plain = _Plain(call.block)
    parts = (call.block.channel, call.block.spatial)
    own = {id(p): name for name, p in plain.named_parameters()}
    names = [own[id(p)] for part in parts for p in part.parameters()]
    with torch.enable_grad():
        # Nodes of their own: x may have been made of the shortcut, whose gradient would come twice.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        x, shortcut, gamma, weight, bias, *parameters = inputs
        if call.norm is not None:
            x = F.batch_norm(x, None, None, weight, bias, True, 0.0, call.norm.eps)
        with measured_by(call.block, call.found) as buffers:
            tensors = {**dict(zip(names, parameters)), **{f"block.{name}": b for name, b in buffers.items()}}
            out = torch.func.functional_call(plain, tensors, (x,))
        if gamma is not None:
            out = out * gamma[:, None, None]
        if call.drop is not None:
            out = out * call.drop[:, None, None, None]
        if shortcut is not None:
            out = out + shortcut
        if call.relu:
            out = out.relu()
    needs = ctx.needs_input_grad[1:]
    needed = [t for t, need in zip(inputs, needs) if need]
    found = iter(torch.autograd.grad(out, needed, g, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if need else None for need in needs]


def needs_gradient(block: nn.Module, *inputs: Optional[torch.Tensor]) -> bool:
    """Whether autograd must know of a call of `block` with these inputs."""
    return torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in inputs) or any(p.requires_grad for p in block.parameters())
    )


def fused(
    block: nn.Module,
    x: torch.Tensor,
    end: End = NO_END,
    drop: Optional[torch.Tensor] = None,
    norm: Optional[nn.Module] = None,
) -> torch.Tensor:
    """The block's output, with the lean backward.

    Args:
        block: A `Cbam2` for which `can_fuse`.
        x: (B, C, H, W).
        end: What follows the masks.
        drop: (B,), what stochastic depth multiplies each sample's branch by.
        norm: A BatchNorm in training, which x has yet to pass.
    """
    named = [list(part.named_parameters()) for part in (block.channel, block.spatial)]
    names = tuple(name for part in named for name, _ in part)
    by_hand = not any("parametrizations" in name for name in names)
    found = measures(block, x.shape[0], x.shape[2] * x.shape[3])
    call = _Call(block, end.relu, drop, norm, names, len(named[0]), by_hand, found)
    weights = (None, None) if norm is None else (norm.weight, norm.bias)
    with no_autocast(x):
        inputs = (x, end.shortcut, end.gamma, *weights, *(p for part in named for _, p in part))
        return _Cbam2Function.apply(call, *inputs)


def fused_without_grad(
    block: nn.Module, x: torch.Tensor, end: End = NO_END, affine: Optional[Affine] = None, owned: bool = False
) -> torch.Tensor:
    """The block's output, when nothing needs a gradient and no path is dropped.

    Args:
        block: As for `fused`, like x and end.
        affine: What a BatchNorm in evaluation does, which x has yet to pass.
        owned: x is nobody else's and may be overwritten.
    """
    with torch.no_grad(), no_autocast(x):
        passes = passes_for(x, affine, owned, learned=block.spatial.learned is not None)
        return _forward(_Call(block), passes, end, with_grad=False)[0]
