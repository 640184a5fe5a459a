"""The small networks of a CBAM2 block as few operations: from squeezes to masks, for the fused paths.

They compute what `ChannelAttn.mask_of` and `SpatialAttn.mask_of` do, in dense shapes. What depends on the weights alone
(kernels, what the coordinates add, temperatures) is a `…Weights` made beforehand: anew within autograd, once while
nothing is trained.
"""

import weakref
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .dense_cbam2 import dense_kernels, own_kernels, place_of
from .parts_cbam2 import apply_gate, coordinates

__all__ = [
    "channel_mask",
    "channel_weights",
    "kept_spatial_weights",
    "mixes_samples",
    "of_maps",
    "spatial_mask",
    "spatial_weights",
]

KEPT_SIZES = 8  # of one block, for images whose size varies
Router = Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, Optional[torch.Tensor]]


class ChannelWeights(NamedTuple):
    fc1: torch.Tensor  # (R, C)
    fc1_bias: Optional[torch.Tensor]
    fc2: torch.Tensor  # (C, R)
    fc2_bias: Optional[torch.Tensor]
    router: Optional[Router]
    mix: Optional[torch.Tensor]  # (2, 1)
    temperature: torch.Tensor  # (1,)


class SpatialWeights(NamedTuple):
    kernel: torch.Tensor  # (K, M·f·f), of average, maximum and learned maps
    place: Optional[torch.Tensor]  # (K, H·W), what the coordinates add
    router: Router
    temperature: torch.Tensor  # (1,)


def _dense(conv: nn.Conv2d, dtype: torch.dtype) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The weight of a 1x1 convolution as a matrix, and its bias."""
    weight, bias = conv.weight, conv.bias
    return weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype)


def _route(router: Router, norm: Optional[nn.Module], x: torch.Tensor) -> torch.Tensor:
    fc1, bias1, fc2, bias2 = router
    z = F.linear(F.linear(x, fc1, bias1).relu_(), fc2, bias2)
    return (z if norm is None else norm(z)).softmax(-1)


def channel_weights(part: nn.Module, dtype: torch.dtype) -> ChannelWeights:
    """Of a `ChannelAttn`."""
    fc1, fc1_bias = _dense(part.fc1, dtype)
    fc2, fc2_bias = _dense(part.fc2, dtype)
    if part.is_sum and fc2_bias is not None:
        fc2_bias = 2 * fc2_bias  # both squeezes carry it
    router = None if part.router is None else (*_dense(part.router.fc1, dtype), *_dense(part.router.fc2, dtype))
    logits = part.fusion_logits
    mix = None if logits is None else logits.to(dtype).softmax(0)[:, None]
    return ChannelWeights(fc1, fc1_bias, fc2, fc2_bias, router, mix, part.temperature(dtype))


def channel_mask(part: nn.Module, weights: ChannelWeights, squeezes: torch.Tensor) -> torch.Tensor:
    """The mask (B, C) from the average and the maximum over positions, (B, 2, C)."""
    batch, _, channels = squeezes.shape
    if part.norm is not None:
        squeezes = part.norm(squeezes.view(batch, 2 * channels)).view(batch, 2, channels)
    hidden = F.linear(squeezes.view(2 * batch, channels), weights.fc1, weights.fc1_bias).relu_().view(batch, 2, -1)
    if weights.router is not None:
        mix = _route(weights.router, part.router.norm, squeezes.view(batch, 2 * channels))
        hidden = torch.bmm(mix[:, None], hidden)[:, 0]
    else:
        hidden = (hidden if weights.mix is None else hidden * weights.mix).sum(1)
    z = F.linear(hidden, weights.fc2, weights.fc2_bias)
    if part.center:
        z = z - z.mean(1, keepdim=True)
    return apply_gate(z / weights.temperature, part.gate)


def of_maps(part: nn.Module, stored: torch.Tensor) -> torch.Tensor:
    """What belongs to average, maximum and learned maps, of something stored for the coordinates too: (K, S, …)."""
    if not part.coords:
        return stored
    return stored[:, :2] if part.learned is None else torch.cat([stored[:, :2], stored[:, 4:]], 1)


def spatial_weights(part: nn.Module, height: int, width: int, dtype: torch.dtype) -> SpatialWeights:
    """Of a `SpatialAttn`, for maps of one size."""
    kernel = dense_kernels(part, own_kernels(part), dtype)[0]  # (K, S, f, f)
    place = place_of(part, kernel, height, width) if part.coords else None
    fc1, bias = _dense(part.router.fc1, dtype)
    if part.coords and not part.moments:
        fc1 = of_maps(part, fc1)  # the mean of a symmetric coordinate is 0
    router = (fc1, bias, *_dense(part.router.fc2, dtype))
    return SpatialWeights(of_maps(part, kernel).flatten(1), place, router, part.temperature(dtype))


_kept: "weakref.WeakKeyDictionary[nn.Module, Tuple[Any, Dict[Any, SpatialWeights]]]" = weakref.WeakKeyDictionary()


def _state(tensors: List[torch.Tensor]) -> Any:
    """What tells whether weights have changed: on a CPU they themselves, elsewhere, where looking would wait for the
    device, where they lie and how often they were written."""
    if tensors[0].device.type == "cpu" and all(t.dtype == tensors[0].dtype for t in tensors):
        return torch._utils._flatten_dense_tensors(tensors)
    return [(t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]


def kept_spatial_weights(part: nn.Module, height: int, width: int, dtype: torch.dtype) -> SpatialWeights:
    """The same without a graph, kept for as long as the weights stay what they are."""
    convs = [part.conv] if part.conv is not None else [c for b in part.branches for c in (b.dw, b.pw)]
    temperature = part.temperature.raw if part.temperature.learnable else part.temperature.value
    tensors = [c.weight for c in convs] + [part.router.fc1.weight, part.router.fc2.weight, temperature]
    tensors += [b for b in (part.router.fc1.bias, part.router.fc2.bias) if b is not None]
    if tensors[0].device.type == "meta":
        return spatial_weights(part, height, width, dtype)
    state = _state(tensors)
    before, by_size = _kept.get(part, (None, {}))
    same = isinstance(state, torch.Tensor) == isinstance(before, torch.Tensor)
    if not (same and (torch.equal(state, before) if isinstance(state, torch.Tensor) else state == before)):
        by_size = {}
        _kept[part] = state, by_size
    size = (height, width, dtype, tensors[0].device)
    found = by_size.get(size)
    if found is None:
        while len(by_size) >= KEPT_SIZES:
            by_size.pop(next(iter(by_size)), None)
        found = by_size[size] = spatial_weights(part, height, width, dtype)
    return found


def _route_maps(part: nn.Module, router: Router, maps: torch.Tensor) -> torch.Tensor:
    height, width = maps.shape[2:]
    pooled = maps.mean((2, 3))  # (B, M)
    if part.moments:
        across = maps[:, 0].mean(1) @ coordinates(width, maps.device, maps.dtype)
        down = maps[:, 0].mean(2) @ coordinates(height, maps.device, maps.dtype)
        pooled = torch.cat([pooled[:, :2], torch.stack([across / width, down / height], 1), pooled[:, 2:]], 1)
    return _route(router, part.router.norm, pooled)


def mixes_samples(maps: torch.Tensor, convolve: Any) -> bool:
    """Whether the kernels of each sample are mixed before convolving."""
    return convolve is not None or (maps.device.type == "cpu" and torch.backends.mkldnn.is_available())


def spatial_mask(
    part: nn.Module, weights: SpatialWeights, maps: torch.Tensor, convolve: Optional[Callable] = None
) -> torch.Tensor:
    """The mask (B, H, W) from average, maximum and learned maps, those not yet normalised, (B, M, H, W).

    On a CPU the kernels of each sample are mixed before convolving. `convolve` takes maps (B, M, H, W) and kernels
    (B, M, f, f); without it the samples become the channels of one depthwise convolution, which a CPU runs several
    times faster, and its backward most of all, than a convolution from M to K channels.
    """
    if part.learned is not None:
        maps = torch.cat([maps[:, :2], part.learned.norm(maps[:, 2:].contiguous())], 1)
    batch, count, height, width = maps.shape
    taps = part.footprint
    mix = _route_maps(part, weights.router, maps)  # (B, K)
    if not mixes_samples(maps, convolve):
        z = F.conv2d(maps, weights.kernel.view(-1, count, taps, taps), padding=taps // 2).flatten(2)  # (B, K, H·W)
        z = torch.bmm(mix[:, None], z if weights.place is None else z + weights.place).view(batch, height, width)
    else:
        kernels = mix @ weights.kernel
        if convolve is not None:
            z = convolve(maps, kernels.view(batch, count, taps, taps))
        else:
            maps = maps.view(1, count * batch, height, width)
            if torch.is_grad_enabled():
                maps = maps.contiguous(memory_format=torch.channels_last)  # for the backward's sake
            z = F.conv2d(maps, kernels.view(count * batch, 1, taps, taps), padding=taps // 2, groups=count * batch)
            z = z.view(batch, count, height, width).sum(1)
        if weights.place is not None:
            z = torch.addmm(z.flatten(1), mix, weights.place).view_as(z)
    if part.center:
        z = z - z.mean((1, 2), keepdim=True)
    return apply_gate(z / weights.temperature, part.gate)
