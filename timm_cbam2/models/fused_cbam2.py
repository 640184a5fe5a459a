"""The whole CBAM2 block, and what a residual block does around it, as one autograd function.

Written literally the end of a residual branch (BatchNorm, attention, layer-scale, shortcut, activation) makes a dozen
passes over full-size tensors and autograd keeps many of them. This keeps one and a few small tensors. The passes are
differentiated by the formulas in `passes_cbam2`, the small networks between them as `small_networks_cbam2` says, or by
whoever does the whole block at once.
"""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .decisions_cbam2 import Measure, measured_by, measures
from .fusible_cbam2 import Named
from .parts_cbam2 import no_autocast
from .passes_cbam2 import Affine, End, Small, passes_for, registered
from .small_networks_cbam2 import networks_for

__all__ = ["fused", "fused_without_grad", "needs_gradient", "train_affine"]


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
    found: Mapping[str, Measure] = {}  # what norms of decisions measure by

    def own(self, parameters: Sequence[torch.Tensor], of_spatial: bool) -> Dict[str, torch.Tensor]:
        """Those of one part, by name."""
        mine = slice(self.channel_parameters, None) if of_spatial else slice(self.channel_parameters)
        return dict(zip(self.names[mine], parameters[mine]))


def _forward(call: _Call, passes: Any, end: End, parameters: Sequence, with_grad: bool = True) -> Tuple[Any, ...]:
    """The output, the small tensors, and what the backward goes by: who did all of it at once, or the networks."""
    whole = passes.whole(call.block, call.names, call.channel_parameters)
    if whole is not None:
        return (*whole.forward(passes, parameters, end, call.drop), whole, None)
    channel, spatial = networks = networks_for(call.block, passes, call.names, with_grad)
    squeezes = passes.squeeze()
    ca = channel.forward(call.own(parameters, False), squeezes)
    learned = call.block.spatial.learned
    weight = () if learned is None else (learned.conv.weight.detach().flatten(1).to(ca.dtype),)
    maps = passes.maps(ca, *weight)
    sa = spatial.forward(call.own(parameters, True), maps)
    sa = sa if call.drop is None else sa * call.drop.to(sa.dtype)[:, None, None]
    return passes.finish(ca, sa, end), Small(squeezes, ca, maps, sa), None, networks


def _train_passes(norm: nn.Module, z: torch.Tensor, learned: bool) -> Tuple[Any, torch.Tensor, torch.Tensor]:
    """The passes over norm(z) in training, and the batch's mean and 1 / standard deviation for their backward."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    weight, bias, buffers = norm.weight, norm.bias, (norm.running_mean, norm.running_var)
    normalises = getattr(registered(z.device.type), "normalises", None)
    if normalises is not None and normalises(z):
        mean, var = torch.batch_norm_update_stats(z, *buffers, norm.momentum)
        invstd = (var.double() + norm.eps).sqrt_().reciprocal_().to(var.dtype)  # rounded as torch rounds
        return passes_for(z, train_affine(weight, bias, mean, invstd), learned=learned), mean, invstd
    y, mean, invstd = torch.native_batch_norm(z, weight, bias, *buffers, True, norm.momentum, norm.eps)
    return passes_for(y, owned=True, learned=learned), mean, invstd


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
            passes, mean, invstd = _train_passes(call.norm, x, learned)
        end = End(shortcut, gamma, call.relu, call.drop is not None)
        out, ctx.small, ctx.whole, ctx.networks = _forward(call, passes, end, rest)
        ctx.call, ctx.again = call, passes.again
        kept = out if call.relu else None  # no gradient asks for the shortcut itself
        ctx.save_for_backward(x, gamma, weight, bias, mean, invstd, kept, *rest)
        return out

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        with no_autocast(g):  # as in the forward pass: some call backward within autocast
            return _Cbam2Function.backward_of(ctx, g)

    @staticmethod
    def backward_of(ctx: Any, g: torch.Tensor) -> Tuple[Any, ...]:
        x, gamma, weight, bias, mean, invstd, out, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(g):
            return (None, *_recompute(ctx, g, out, [x, gamma, weight, bias, *parameters]))
        affine = None if mean is None else train_affine(weight, bias, mean, invstd)
        passes = ctx.again(x, affine)  # as in the forward pass, whatever was switched on or off since
        if ctx.whole is not None:
            return (None, *_whole_backward(ctx, g, passes, gamma, out, parameters))
        g_sa = passes.start_backward(g, ctx.small, gamma, out)
        if ctx.call.drop is not None:
            g_sa.mul_(ctx.call.drop.to(g_sa.dtype)[:, None, None])
        g_maps, spatial_grads = _small_backward(ctx, True, parameters, g_sa)
        g_ca, spatial_grads = _channel_gradient(ctx, parameters, g_maps, passes, spatial_grads)
        g_squeezes, channel_grads = _small_backward(ctx, False, parameters, g_ca)
        g_gamma = passes.gamma_gradient() if ctx.needs_input_grad[3] else None
        g_x = g_weight = g_bias = None
        if ctx.needs_input_grad[1] or affine is not None:
            g_x, g_weight, g_bias = passes.input_gradient(g_squeezes[:, 0], g_squeezes[:, 1])
        g_shortcut = passes.g if ctx.needs_input_grad[2] else None
        return (None, g_x, g_shortcut, g_gamma, g_weight, g_bias, *channel_grads, *spatial_grads)


def _whole_backward(
    ctx: Any, g: torch.Tensor, passes: Any, gamma: Any, out: Any, parameters: Sequence
) -> List[Optional[torch.Tensor]]:
    """The gradients of all inputs but the first, by who did the forward pass at once."""
    needs, call = ctx.needs_input_grad[1:], ctx.call
    kept = out, gamma, call.drop
    ends, grads = ctx.whole.backward(passes, g, ctx.small, kept, parameters, needs[0])
    g_shortcut, g_x, *of_norms = ends
    return [grad if need else None for need, grad in zip(needs, (g_x, g_shortcut, *of_norms, *grads))]


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


def _small_backward(ctx: Any, of_spatial: bool, parameters: Sequence, g: torch.Tensor) -> Tuple[torch.Tensor, List]:
    """Of one of the small networks: the gradient of its squeezes, and those of its parameters, None where none is
    needed."""
    call = ctx.call
    own, prefix = call.own(parameters, of_spatial), "spatial." if of_spatial else "channel."
    found = {name[len(prefix) :]: measure for name, measure in call.found.items() if name.startswith(prefix)}
    g_in, grads = ctx.networks[of_spatial].backward(own, found, g)
    needs = ctx.needs_input_grad[6 + (call.channel_parameters if of_spatial else 0) :]
    needs = [need and name != LEARNED for name, need in zip(own, needs)]  # that one is found by a pass
    return g_in, [grads[name].to(p.dtype) if need else None for (name, p), need in zip(own.items(), needs)]


class _Plain(nn.Module):
    """The plain path of a block, without the hooks on it: they have run."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.forward(x, return_attention=True)[0]


def _recompute(ctx: Any, g: torch.Tensor, out: Optional[torch.Tensor], inputs: List[Any]) -> List[Any]:
    """The backward that can itself be differentiated, or vectorised: through the plain path. The shortcut's gradient is
    g, 0 where the activation, if `out` of one is given, was flat."""
    call = ctx.call
    plain = _Plain(call.block)
    parts = (call.block.channel, call.block.spatial)
    own = {id(p): name for name, p in plain.named_parameters()}
    names = [own[id(p)] for part in parts for p in part.parameters()]
    with torch.enable_grad():
        if out is not None:
            g = torch.ops.aten.threshold_backward(g, out.detach(), 0)
        # Nodes of their own: one may have been made of another, whose gradient would come twice.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        x, gamma, weight, bias, *parameters = inputs
        if call.norm is not None:
            x = F.batch_norm(x, None, None, weight, bias, True, 0.0, call.norm.eps)
        with measured_by(call.block, call.found) as buffers:
            tensors = {**dict(zip(names, parameters)), **{f"block.{name}": b for name, b in buffers.items()}}
            branch = torch.func.functional_call(plain, tensors, (x,))
        if gamma is not None:
            branch = branch * gamma[:, None, None]
        if call.drop is not None:
            branch = branch * call.drop[:, None, None, None]
    of_x, of_shortcut, *others = ctx.needs_input_grad[1:]
    needs = [of_x, *others]
    needed = [t for t, need in zip(inputs, needs) if need]
    again = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(branch, needed, g, create_graph=again, allow_unused=True) if needed else ())
    g_x, *grads = [next(found) if need else None for need in needs]
    return [g_x, g if of_shortcut else None, *grads]


def needs_gradient(block: nn.Module, *inputs: Optional[torch.Tensor]) -> bool:
    """Whether autograd must know of a call of `block` with these inputs."""
    return torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in inputs) or any(p.requires_grad for p in block.parameters())
    )


def fused(
    block: nn.Module,
    x: torch.Tensor,
    named: Named,
    end: End = NO_END,
    drop: Optional[torch.Tensor] = None,
    norm: Optional[nn.Module] = None,
) -> torch.Tensor:
    """The block's output, with the lean backward.

    Args:
        block: A `Cbam2` for which `can_fuse`.
        x: (B, C, H, W).
        named: What `named_weights` gives of the block.
        end: What follows the masks.
        drop: (B,), what stochastic depth multiplies each sample's branch by.
        norm: A BatchNorm in training, which x has yet to pass.
    """
    found = measures(block, x.shape[0], x.shape[2] * x.shape[3])
    names, parameters, count = named
    call = _Call(block, end.relu, drop, norm, names, count, found)
    weights = (None, None) if norm is None else (norm.weight, norm.bias)
    with no_autocast(x):
        inputs = (x, end.shortcut, end.gamma, *weights, *parameters)
        return _Cbam2Function.apply(call, *inputs)


def fused_without_grad(
    block: nn.Module,
    x: torch.Tensor,
    named: Named,
    end: End = NO_END,
    affine: Optional[Affine] = None,
    owned: bool = False,
) -> torch.Tensor:
    """The block's output, when nothing needs a gradient and no path is dropped.

    Args:
        block: As for `fused`, like x, named and end.
        affine: What a BatchNorm in evaluation does, which x has yet to pass.
        owned: x is nobody else's and may be overwritten.
    """
    with torch.no_grad(), no_autocast(x):
        passes = passes_for(x, affine, owned, learned=block.spatial.learned is not None)
        names, parameters, count = named
        whole = passes.whole(block, names, count)
        if whole is not None:
            return whole.infer(passes, parameters, end)
        call = _Call(block, names=names, channel_parameters=count)
        return _forward(call, passes, end, parameters, with_grad=False)[0]
