"""The small networks of a CBAM2 block as few operations: from squeezes to masks, for the fused paths.

They compute what `ChannelAttn.mask_of` and `SpatialAttn.mask_of` do, in dense shapes. What depends on the weights alone
(kernels, what the coordinates add, temperatures) is a `…Weights` made beforehand: anew within autograd, once while
nothing is trained.
"""

import functools
import weakref
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from .parts_cbam2 import apply_gate, coordinates

__all__ = [
    "channel_mask",
    "channel_weights",
    "coordinate_rows",
    "coordinate_windows",
    "dense_kernels",
    "dense_kernels_backward",
    "kept_spatial_weights",
    "kept_windows",
    "mixes_samples",
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
    kernel: torch.Tensor  # (K, 2·f·f), of the average and the maximum
    place: Optional[torch.Tensor]  # (K, H·W), what the coordinates add
    router: Router
    temperature: torch.Tensor  # (1,)


def _dense(conv: nn.Conv2d, dtype: torch.dtype) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The weight of a 1x1 convolution as a matrix, and its bias."""
    weight, bias = conv.weight, conv.bias
    return weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype)


def _route(router: Router, x: torch.Tensor) -> torch.Tensor:
    fc1, bias1, fc2, bias2 = router
    return F.linear(F.linear(x, fc1, bias1).relu_(), fc2, bias2).softmax(-1)


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
    hidden = F.linear(squeezes.view(2 * batch, channels), weights.fc1, weights.fc1_bias).relu_().view(batch, 2, -1)
    if weights.router is not None:
        mix = _route(weights.router, squeezes.view(batch, 2 * channels))
        hidden = torch.bmm(mix[:, None], hidden)[:, 0]
    else:
        hidden = (hidden if weights.mix is None else hidden * weights.mix).sum(1)
    z = F.linear(hidden, weights.fc2, weights.fc2_bias)
    if part.center:
        z = z - z.mean(1, keepdim=True)
    return apply_gate(z / weights.temperature, part.gate)


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
    places = _tap_places(_shapes(part), part.footprint, weights[0].device, torch.is_inference_mode_enabled())[0]
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
    inverse = _tap_places(_shapes(part), part.footprint, g.device, torch.is_inference_mode_enabled())[1]
    by_tap = (g * scale[:, :, None]).transpose(0, 1).flatten(1).index_select(1, inverse)  # (S, taps)
    by_branch = by_tap.split([size * size for size, _ in _shapes(part)], 1)
    g_scale = (g * spread).sum(2)
    grads = {}
    for i, taps in enumerate(by_branch):
        for name, grad in ((f"branches.{i}.dw.weight", taps), (f"branches.{i}.pw.weight", g_scale[i])):
            grads[name] = grad.reshape(own[name].shape)
    return grads


def _shapes(part: nn.Module) -> Tuple[Tuple[int, int], ...]:
    return tuple((branch.dw.kernel_size[0], branch.dilation) for branch in part.branches)


def _own(part: nn.Module) -> Dict[str, torch.Tensor]:
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


def spatial_weights(part: nn.Module, height: int, width: int, dtype: torch.dtype) -> SpatialWeights:
    """Of a `SpatialAttn`, for maps of one size."""
    kernel, place = dense_kernels(part, _own(part), dtype)[0], None  # (K, S, f, f)
    if part.coords:
        windows = kept_windows(height, width, part.footprint, kernel.device, dtype)
        place = (coordinate_rows(kernel[:, 2:], windows) @ windows[2].t()).view(len(kernel), height * width)
    fc1, bias = _dense(part.router.fc1, dtype)
    if part.coords and not part.moments:
        fc1 = fc1[:, :2]  # the mean of a symmetric coordinate is 0
    router = (fc1, bias, *_dense(part.router.fc2, dtype))
    return SpatialWeights(kernel[:, :2].flatten(1), place, router, part.temperature(dtype))


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
    pooled = maps.mean((2, 3))  # (B, 2)
    if part.moments:
        across = maps[:, 0].mean(1) @ coordinates(width, maps.device, maps.dtype)
        down = maps[:, 0].mean(2) @ coordinates(height, maps.device, maps.dtype)
        pooled = torch.cat([pooled, torch.stack([across / width, down / height], 1)], 1)
    return _route(router, pooled)


def mixes_samples(maps: torch.Tensor, convolve: Any) -> bool:
    """Whether the kernels of each sample are mixed before convolving."""
    return convolve is not None or (maps.device.type == "cpu" and torch.backends.mkldnn.is_available())


def spatial_mask(
    part: nn.Module, weights: SpatialWeights, maps: torch.Tensor, convolve: Optional[Callable] = None
) -> torch.Tensor:
    """The mask (B, H, W) from the average and the maximum over channels, (B, 2, H, W).

    On a CPU the kernels of each sample are mixed before convolving. `convolve` takes maps (B, 2, H, W) and kernels
    (B, 2, f, f); without it the samples become the channels of one depthwise convolution, which a CPU runs several
    times faster, and its backward most of all, than a convolution from 2 to K channels.
    """
    batch, _, height, width = maps.shape
    taps = part.footprint
    mix = _route_maps(part, weights.router, maps)  # (B, K)
    if not mixes_samples(maps, convolve):
        z = F.conv2d(maps, weights.kernel.view(-1, 2, taps, taps), padding=taps // 2).flatten(2)  # (B, K, H·W)
        z = torch.bmm(mix[:, None], z if weights.place is None else z + weights.place).view(batch, height, width)
    else:
        kernels = mix @ weights.kernel
        if convolve is not None:
            z = convolve(maps, kernels.view(batch, 2, taps, taps))
        else:
            maps = maps.view(1, 2 * batch, height, width)
            if torch.is_grad_enabled():
                maps = maps.contiguous(memory_format=torch.channels_last)  # for the backward's sake
            z = F.conv2d(maps, kernels.view(2 * batch, 1, taps, taps), padding=taps // 2, groups=2 * batch)
            z = z.view(batch, 2, height, width).sum(1)
        if weights.place is not None:
            z = z + (mix @ weights.place).view(batch, height, width)
    if part.center:
        z = z - z.mean((1, 2), keepdim=True)
    return apply_gate(z / weights.temperature, part.gate)
