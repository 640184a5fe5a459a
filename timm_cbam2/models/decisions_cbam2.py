"""What may stand before a decision of CBAM2: norms over the batch, learned maps, a router for every position."""

import contextlib
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = [
    "QUIET",
    "DecisionNorm",
    "LearnedMaps",
    "Measure",
    "Norm",
    "PositionRouter",
    "as_dtype",
    "measured_by",
    "measures",
    "statistics_kept",
]

# What is normalised before a decision is multiplied by this at first: at full strength routers would answer by chance,
# and masks be sharp, before there is anything to see; zero would keep the gradient from what is below.
QUIET = 0.1
# What a norm measured by in one pass: its running mean and variance as they were, or None for the batch itself.
Measure = Optional[Tuple[torch.Tensor, torch.Tensor]]


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in `dtype`; where it is so already exports are free of a conversion and of a check of it."""
    return x if x.dtype == dtype else x.to(dtype)


class DecisionNorm(nn.BatchNorm1d):
    """BatchNorm of numbers (B, N), or of maps (B, N, H, W) over positions too, in their own dtype.

    A single number of each kind has no spread: while training, too, it is measured by what was seen before.
    """

    gain: float = 1.0

    def __init__(self, count: int, gain: float = 1.0, device=None, dtype=None) -> None:
        """
        Args:
            count: N.
            gain: What the normalised numbers are multiplied by at first.
            device: Device of the parameters.
            dtype: Data type of the parameters.
        """
        super().__init__(count, device=device, dtype=dtype)
        self.gain = gain
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the gain that was asked for, and to statistics of nothing seen."""
        super().reset_parameters()
        nn.init.constant_(self.weight, self.gain)

    def reset_running_stats(self) -> None:
        """As torch's, by way of `nn.init`, which transformers keeps from what was read from a file."""
        if self.track_running_stats:
            nn.init.zeros_(self.running_mean)
            nn.init.ones_(self.running_var)
            nn.init.zeros_(self.num_batches_tracked)

    def keeps_usual_statistics(self, dtype: torch.dtype) -> bool:
        """Whether it keeps moving averages of numbers of this type, as BatchNorm does unless told otherwise."""
        return self.track_running_stats and self.momentum is not None and self.running_mean.dtype == dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        assert mean is not None and var is not None  # for TorchScript
        from_batch = False
        if self.training and x.numel() > x.shape[1]:  # not by `and`, which of an unknown batch size is no bool
            from_batch = True
        own_mean, own_var = as_dtype(mean, x.dtype), as_dtype(var, x.dtype)
        if from_batch and not self.track_running_stats:
            own_mean, own_var = own_mean.clone(), own_var.clone()
        momentum = self.momentum
        if momentum is None:  # a cumulative average
            momentum = 0.0
            if from_batch and self.track_running_stats:
                count = self.num_batches_tracked
                assert count is not None
                count.add_(1)
                momentum = 1.0 / float(count)
        weight, bias = as_dtype(weight, x.dtype), as_dtype(bias, x.dtype)
        y = F.batch_norm(x, own_mean, own_var, weight, bias, from_batch, momentum, self.eps)
        if from_batch and self.track_running_stats and x.dtype != mean.dtype:
            mean.copy_(own_mean)
            var.copy_(own_var)
        return y


@contextlib.contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Meanwhile norms of `module` in training mode look at the batch and leave their running statistics as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def measures(block: nn.Module, batch: int, places: int) -> Dict[str, Measure]:
    """What the norms of a `Cbam2` will measure by, by their names in it, for maps of so many samples and positions."""
    channel, spatial = block.channel, block.spatial
    norms = {"channel.norm": channel.norm, "spatial.router.norm": spatial.router.norm}
    if channel.router is not None:
        norms["channel.router.norm"] = channel.router.norm
    if spatial.learned is not None:
        norms["spatial.learned.norm"] = spatial.learned.norm
    found: Dict[str, Measure] = {}
    for name, norm in norms.items():
        if norm is not None:
            count = batch * (places if name == "spatial.learned.norm" else 1)
            by_batch = norm.training and count > 1
            found[name] = None if by_batch else (norm.running_mean.clone(), norm.running_var.clone())
    return found


@contextlib.contextmanager
def measured_by(block: nn.Module, found: Mapping[str, Measure]) -> Iterator[Dict[str, torch.Tensor]]:
    """Meanwhile the norms of `block` measure by what they once did, and keep nothing; gives buffers to call it with."""
    norms = {name: block.get_submodule(name) for name in found}
    before = {name: (norm.training, norm.track_running_stats) for name, norm in norms.items()}
    buffers = {}
    for name, norm in norms.items():
        measure = found[name]
        norm.training, norm.track_running_stats = measure is None, measure is not None
        if measure is not None:
            buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"] = measure
    try:
        yield buffers
    finally:
        for name, norm in norms.items():
            norm.training, norm.track_running_stats = before[name]


class Norm:
    """One pass through a `DecisionNorm`, or through None for none, with a backward by hand."""

    def __init__(self, norm: Optional[nn.Module], name: str, x: torch.Tensor) -> None:
        self.norm, self.name, self.x = norm, name, x
        self.of_batch: Any = None  # its mean and 1 / standard deviation, where they measured
        if norm is None:
            self.y = x
        elif norm.training and x.numel() > x.shape[1] and norm.keeps_usual_statistics(x.dtype):
            kept = norm.running_mean, norm.running_var
            own = as_dtype(norm.weight, x.dtype), as_dtype(norm.bias, x.dtype)
            self.y, *self.of_batch = torch.native_batch_norm(x, *own, *kept, True, norm.momentum, norm.eps)
        else:
            self.y = norm(x)

    def backward(
        self,
        own: Mapping[str, torch.Tensor],
        found: Mapping[str, Measure],
        g: torch.Tensor,
        grads: Dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The gradient of x from that of y, where the norm measured as `found` says."""
        if self.norm is None:
            return g
        x, eps = self.x, self.norm.eps
        weight, bias = own[f"{self.name}.weight"].to(x.dtype), own[f"{self.name}.bias"].to(x.dtype)
        measure = found[self.name]
        by = (None, None) if measure is None else tuple(t.to(x.dtype) for t in measure)
        of_batch = self.of_batch
        if measure is not None or of_batch is None:
            of_batch = torch.native_batch_norm(x, weight, bias, *by, measure is None, 0.0, eps)[1:]
        g, *grads_own = torch.ops.aten.native_batch_norm_backward(
            g.contiguous(), x, weight, *by, *of_batch, measure is None, eps, [True] * 3
        )
        grads[f"{self.name}.weight"], grads[f"{self.name}.bias"] = grads_own
        return g


class LearnedMaps(nn.Module):
    """Maps that are learned weighted sums of the channels, normalised over the batch: what average and maximum over
    channels cannot tell, for instance where a kind of object is."""

    def __init__(self, channels: int, maps: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(channels, maps, 1, bias=False, **dd)
        self.norm = DecisionNorm(maps, **dd)

    def forward(self, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Features (B, C, H, W) to maps (B, P, H, W) in `dtype`."""
        return self.norm(F.conv2d(as_dtype(y, dtype), as_dtype(self.conv.weight, dtype)))


class PositionRouter(nn.Module):
    """A 3x3 convolution over the maps whose softmax mixes `choices` things at every position."""

    def __init__(self, maps: int, choices: int, norm: bool, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(maps, choices, 3, padding=1, bias=not norm, **dd)
        self.norm = DecisionNorm(choices, QUIET, **dd) if norm else None

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (B, S, H, W) to weights (B, choices, H, W)."""
        bias = self.conv.bias
        if bias is not None:
            bias = as_dtype(bias, maps.dtype)
        z = F.conv2d(maps, as_dtype(self.conv.weight, maps.dtype), bias, padding=1)
        if self.norm is not None:
            z = self.norm(z)
        return z.softmax(1)
