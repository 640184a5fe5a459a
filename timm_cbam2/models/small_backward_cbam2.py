"""The backward of the small networks of a CBAM2 block, by hand: a fifth of the operations that autograd would make.

Each function computes its network anew from its squeezes, and gives the gradient of them and of the weights. Weights
are those of the forward pass, by name, which need not be the ones that the module has by now.
"""

from typing import Any, Dict, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .decisions_cbam2 import Measure
from .dense_cbam2 import dense_kernels, dense_kernels_backward, place_backward, place_of
from .parts_cbam2 import coordinates
from .small_cbam2 import mixes_samples, of_maps

__all__ = ["channel_backward", "spatial_backward"]

Grads = Dict[str, torch.Tensor]
Own = Mapping[str, torch.Tensor]
Found = Mapping[str, Measure]


def _matrix(own: Own, name: str, dtype: torch.dtype) -> torch.Tensor:
    return own[f"{name}.weight"].flatten(1).to(dtype)


def _bias(own: Own, name: str, dtype: torch.dtype) -> Optional[torch.Tensor]:
    bias = own.get(f"{name}.bias")
    return None if bias is None else bias.to(dtype)


def _dense_backward(own: Own, grads: Grads, name: str, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """Of y = x @ weight.T + bias: the gradient of x."""
    grads[f"{name}.weight"] = (g.t() @ x).view_as(own[f"{name}.weight"])
    if f"{name}.bias" in own:
        grads[f"{name}.bias"] = g.sum(0)
    return g @ _matrix(own, name, g.dtype)


class _Norm:
    """A `DecisionNorm`, or None for none, measuring as `found` says."""

    def __init__(self, norm: Optional[nn.Module], own: Own, found: Found, name: str, x: torch.Tensor) -> None:
        self.norm, self.name, self.x, self.y = norm, name, x, x
        if norm is None:
            return
        weight, bias = own[f"{name}.weight"].to(x.dtype), own[f"{name}.bias"].to(x.dtype)
        measure = found[name]
        by = (None, None) if measure is None else tuple(t.to(x.dtype) for t in measure)
        self.y, *of_batch = torch.native_batch_norm(x, weight, bias, *by, measure is None, 0.0, norm.eps)
        self.given = (weight, *by, *of_batch, measure is None, norm.eps, [True] * 3)

    def backward(self, g: torch.Tensor, grads: Grads) -> torch.Tensor:
        """The gradient of x from that of y."""
        if self.norm is None:
            return g
        g, *own = torch.ops.aten.native_batch_norm_backward(g.contiguous(), self.x, *self.given)
        grads[f"{self.name}.weight"], grads[f"{self.name}.bias"] = own
        return g


class _Router:
    def __init__(self, router: nn.Module, own: Own, found: Found, x: torch.Tensor) -> None:
        self.own, self.x = own, x
        dtype = x.dtype
        self.hidden = F.linear(x, _matrix(own, "router.fc1", dtype), _bias(own, "router.fc1", dtype)).relu_()
        z = F.linear(self.hidden, _matrix(own, "router.fc2", dtype), _bias(own, "router.fc2", dtype))
        self.norm = _Norm(router.norm, own, found, "router.norm", z)
        self.weights = self.norm.y.softmax(-1)

    def backward(self, g: torch.Tensor, grads: Grads) -> torch.Tensor:
        """The gradient of x from that of the weights."""
        g = self.norm.backward(torch._softmax_backward_data(g, self.weights, -1, g.dtype), grads)
        g = _dense_backward(self.own, grads, "router.fc2", self.hidden, g)
        g = torch.ops.aten.threshold_backward(g, self.hidden, 0)
        return _dense_backward(self.own, grads, "router.fc1", self.x, g)


def _temperature(part: nn.Module, own: Own, dtype: torch.dtype) -> torch.Tensor:
    if not part.temperature.learnable:
        return part.temperature.value.to(dtype)
    return F.softplus(own["temperature.raw"].to(dtype)) + part.temperature.eps


def _gate_backward(part: nn.Module, own: Own, z: torch.Tensor, g: torch.Tensor, grads: Grads) -> torch.Tensor:
    """The gradient of z from that of gate((z − its mean) / temperature)."""
    temperature = _temperature(part, own, z.dtype)
    over = tuple(range(1, z.dim()))
    if part.center:
        z = z - z.mean(over, keepdim=True)
    u = z / temperature
    if part.gate == "hard_sigmoid":
        g = torch.ops.aten.hardsigmoid_backward(g, u)
    else:
        g = torch.ops.aten.sigmoid_backward(g, torch.sigmoid(u))
        g = 2 * g if part.gate == "unit_sigmoid" else g
    g = g / temperature
    if part.temperature.learnable:
        raw = own["temperature.raw"].to(z.dtype)
        # softplus, from 20 on the identity, as torch has it
        grads["temperature.raw"] = -(g * u).sum() * torch.where(raw > 20, torch.ones_like(raw), raw.sigmoid())
    return g - g.mean(over, keepdim=True) if part.center else g


def channel_backward(
    part: nn.Module, own: Own, found: Found, squeezes: torch.Tensor, g: torch.Tensor
) -> Tuple[torch.Tensor, Grads]:
    """Of a `ChannelAttn`.

    Args:
        part: The layer.
        own: Its parameters by name.
        found: What its norms measured by.
        squeezes: (B, 2, C).
        g: (B, C), the gradient of the mask.

    Returns:
        The gradient of the squeezes, and those of the parameters by name.
    """
    grads: Grads = {}
    batch, _, channels = squeezes.shape
    dtype = squeezes.dtype
    norm = _Norm(part.norm, own, found, "norm", squeezes.view(batch, 2 * channels))
    flat = norm.y.view(2 * batch, channels)
    hidden = F.linear(flat, _matrix(own, "fc1", dtype), _bias(own, "fc1", dtype)).relu_()
    both = hidden.view(batch, 2, -1)
    router = None if part.router is None else _Router(part.router, own, found, norm.y)
    if router is not None:
        mix = router.weights
    elif part.fusion_logits is not None:
        shares = own["fusion_logits"].to(dtype).softmax(0)
        mix = shares.expand(batch, 2)
    else:
        mix = flat.new_ones(batch, 2)
    mixed = torch.bmm(mix[:, None], both)[:, 0]
    bias = _bias(own, "fc2", dtype)
    scale = 2 if part.is_sum else 1  # both squeezes carry the bias
    z = F.linear(mixed, _matrix(own, "fc2", dtype), None if bias is None else scale * bias)
    g_mixed = _dense_backward(own, grads, "fc2", mixed, _gate_backward(part, own, z, g, grads))
    if bias is not None and scale != 1:
        grads["fc2.bias"] = scale * grads["fc2.bias"]
    g_hidden = (mix[:, :, None] * g_mixed[:, None]).view_as(hidden)
    g_flat = _dense_backward(own, grads, "fc1", flat, torch.ops.aten.threshold_backward(g_hidden, hidden, 0))
    g_squeezes = g_flat.view(batch, 2 * channels)
    if not part.is_sum:
        g_mix = torch.bmm(both, g_mixed[:, :, None])[:, :, 0]
        if router is not None:
            g_squeezes = g_squeezes + router.backward(g_mix, grads)
        else:
            grads["fusion_logits"] = torch._softmax_backward_data(g_mix.sum(0), shares, 0, dtype)
    return norm.backward(g_squeezes, grads).view(batch, 2, channels), grads


class _Pooled:
    """The maps as the router sees them."""

    def __init__(self, part: nn.Module, maps: torch.Tensor) -> None:
        self.part, self.places = part, maps.shape[2] * maps.shape[3]
        self.x = maps.mean((2, 3))
        if part.moments:
            height, width = maps.shape[2:]
            self.across = coordinates(width, maps.device, maps.dtype)
            self.down = coordinates(height, maps.device, maps.dtype)
            x = maps[:, 0].mean(1) @ self.across / width
            moments = torch.stack([x, maps[:, 0].mean(2) @ self.down / height], 1)
        elif part.coords:
            moments = self.x.new_zeros(len(maps), 2)  # the mean of a symmetric coordinate is 0
        if part.coords:
            self.x = torch.cat([self.x[:, :2], moments, self.x[:, 2:]], 1)

    def backward(self, g: torch.Tensor, g_maps: torch.Tensor) -> torch.Tensor:
        """g_maps (B, M, H, W) and what comes by way of the router, g being the gradient of x."""
        g = g[:, :, None, None] / self.places
        g_maps = g_maps + of_maps(self.part, g)
        if self.part.moments:
            g_maps[:, 0] += g[:, 2] * self.across + g[:, 3] * self.down[:, None]
        return g_maps


def spatial_backward(
    part: nn.Module,
    own: Own,
    found: Found,
    maps: torch.Tensor,
    g: torch.Tensor,
    drop: Optional[torch.Tensor],
    kernel: Any,
) -> Tuple[torch.Tensor, Grads]:
    """Of a `SpatialAttn`, but for what makes the learned maps of the features.

    Args:
        part: The layer.
        own: Its parameters by name.
        found: What its norms measured by.
        maps: (B, M, H, W).
        g: (B, H, W), the gradient of the mask times `drop`.
        drop: (B,), or None for ones.
        kernel: Compiled convolutions, or None for torch's.

    Returns:
        The gradient of the maps, and those of the parameters by name.
    """
    grads: Grads = {}
    norm = None
    if part.learned is not None:
        norm = _Norm(part.learned.norm, own, found, "learned.norm", maps[:, 2:].contiguous())
        maps = torch.cat([maps[:, :2], norm.y], 1)
    g = g if drop is None else g * drop.to(maps.dtype)[:, None, None]
    pooled = _Pooled(part, maps)
    router = _Router(part.router, own, found, pooled.x)
    g_maps, g_mix = _mask_backward(part, own, maps, router.weights, g, kernel, grads)
    g_maps = pooled.backward(router.backward(g_mix, grads), g_maps)
    if norm is not None:
        g_maps = torch.cat([g_maps[:, :2], norm.backward(g_maps[:, 2:], grads)], 1)
    return g_maps, grads


def _mask_backward(
    part: nn.Module, own: Own, maps: torch.Tensor, mix: torch.Tensor, g: torch.Tensor, kernel: Any, grads: Grads
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The gradients of the maps (B, M, H, W) and of the branches' weights (B, K) from that of the mask."""
    batch, count, height, width = maps.shape
    taps = part.footprint
    dense, kept = dense_kernels(part, own, maps.dtype)  # (K, S, f, f)
    seen, choices = of_maps(part, dense).flatten(1), dense.shape[0]
    place = place_of(part, dense, height, width) if part.coords else None
    if mixes_samples(maps, kernel):
        z, convolution = _convolve_mixed(maps, mix @ seen, taps, kernel)
        if place is not None:
            z = z + (mix @ place).view(batch, height, width)
        g_z = _gate_backward(part, own, z, g, grads)
        g_maps, g_kernels = convolution(g_z)
        g_mix, g_seen = g_kernels @ seen.t(), mix.t() @ g_kernels
        flat = g_z.flatten(1)
        if place is not None:
            g_mix = g_mix + flat @ place.t()
        g_place = mix.t() @ flat
    else:
        by_branch = F.conv2d(maps, seen.view(choices, count, taps, taps), padding=taps // 2).flatten(2)
        by_branch = by_branch if place is None else by_branch + place
        z = torch.bmm(mix[:, None], by_branch).view(batch, height, width)
        flat = _gate_backward(part, own, z, g, grads).flatten(1)
        g_mix = torch.bmm(by_branch, flat[:, :, None])[:, :, 0]
        g_branch = mix[:, :, None] * flat[:, None]
        g_place = g_branch.sum(0)
        g_maps, g_seen = _convolution_backward(
            g_branch.view(batch, choices, height, width), maps, seen.view(choices, count, taps, taps), 1
        )
    g_dense = g_seen.view(choices, count, taps, taps)
    if part.coords:
        g_coords = place_backward(part, g_place, height, width)
        g_dense = torch.cat([g_dense[:, :2], g_coords, g_dense[:, 2:]], 1)
    grads.update(dense_kernels_backward(part, own, kept, g_dense))
    return g_maps, g_mix


def _convolution_backward(g: torch.Tensor, maps: torch.Tensor, weight: torch.Tensor, groups: int) -> Any:
    margin = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        g, maps, weight, None, [1, 1], [margin] * 2, [1, 1], False, [0, 0], groups, [True, True, False]
    )[:2]


def _convolve_mixed(maps: torch.Tensor, kernels: torch.Tensor, taps: int, kernel: Any) -> Any:
    """Each sample's maps with its own kernel, (B, H, W), and the function from its gradient to theirs."""
    batch, count, height, width = maps.shape
    if kernel is not None:
        kernels = kernels.view(batch, count, taps, taps)

        def compiled(g: torch.Tensor) -> Any:
            g_maps, g_kernels = kernel.convolve_backward(g.contiguous(), maps, kernels)
            return g_maps, g_kernels.flatten(1)

        return kernel.convolve(maps, kernels), compiled
    rows = maps.view(1, count * batch, height, width).contiguous(memory_format=torch.channels_last)
    weight = kernels.view(count * batch, 1, taps, taps)

    def backward(g: torch.Tensor) -> Any:
        g = g[:, None].expand(batch, count, height, width).reshape(1, count * batch, height, width)
        g_maps, g_kernels = _convolution_backward(
            g.contiguous(memory_format=torch.channels_last), rows, weight, count * batch
        )
        return g_maps.reshape(batch, count, height, width), g_kernels.reshape(batch, -1)

    z = F.conv2d(rows, weight, padding=taps // 2, groups=count * batch)
    return z.reshape(batch, count, height, width).sum(1), backward
