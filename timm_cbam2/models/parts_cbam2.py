"""The small parts of a CBAM2 block: gates, temperatures, routers, branches and coordinate maps."""

import contextlib
import math
from typing import Any, Final, List

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .decisions_cbam2 import QUIET, DecisionNorm, as_dtype
from .options_cbam2 import TEMPERATURE_EPS

__all__ = [
    "Branch",
    "Fc",
    "Router",
    "Temperature",
    "apply_gate",
    "as_dtype",
    "as_one_node",
    "compute_dtype",
    "coordinates",
    "has_hooks",
    "mean_in",
    "is_traced",
    "no_autocast",
    "reset_convs",
]


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """fp16 and bf16 squeeze, route and gate in fp32: sums over H·W and products with 1e4 leave fp16's range."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.compiler.assume_constant_result  # dynamo of torch 2.8 knows no such question
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def no_autocast(x: torch.Tensor):
    """Autocast would take the small products back to half precision; where it is off, exports stay free of it."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def is_traced(x: Any) -> bool:
    """Whether torch.fx is tracing: x stands for a tensor that is not there yet."""
    return isinstance(x, torch.fx.Proxy)


def as_one_node(module: nn.Module, x: Any) -> Any:
    """The call of `module` as one node of the graph that torch.fx is tracing: its shapes depend on the input."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def mean_in(x: torch.Tensor, dims: List[int], dtype: torch.dtype, keepdim: bool = False) -> torch.Tensor:
    """The mean over `dims`, computed in `dtype`; where x has it, exporters that know no such argument see none."""
    return x.mean(dims, keepdim) if x.dtype == dtype else x.mean(dims, keepdim, dtype=dtype)


def apply_gate(z: torch.Tensor, gate: str) -> torch.Tensor:
    if gate == "hard_sigmoid":
        return F.hardsigmoid(z)
    if gate == "unit_sigmoid":
        return 2 * torch.sigmoid(z)
    return torch.sigmoid(z)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs when `module` is called as such, for instance the pruning or the norm of its weight."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Fc(nn.Conv2d):
    """A 1x1 convolution in the checkpoint, a matrix product on (B, C_in) in the input's dtype when it runs."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool, device=None, dtype=None) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        if bias is not None:
            bias = as_dtype(bias, x.dtype)
        return F.linear(x, as_dtype(self.weight.flatten(1), x.dtype), bias)  # (B, C_out)


class Router(nn.Module):
    """A two-layer perceptron whose softmax mixes `choices` things per sample."""

    def __init__(
        self, in_features: int, hidden: int, choices: int, device=None, dtype=None, norm: bool = False
    ) -> None:
        super().__init__()
        self.fc1 = Fc(in_features, hidden, True, device, dtype)
        self.fc2 = Fc(hidden, choices, not norm, device, dtype)  # the norm has a bias and would take this one off
        self.norm = DecisionNorm(choices, QUIET, device, dtype) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.fc2(F.relu(self.fc1(x)))
        if self.norm is not None:
            z = self.norm(z)
        return z.softmax(-1)  # (B, choices)


class Temperature(nn.Module):
    """The positive number that divides a gate's input: learnable as softplus(raw) + eps, or a fixed buffer."""

    learnable: Final[bool]
    eps: Final[float] = TEMPERATURE_EPS

    def __init__(self, value: float = 1.0, learnable: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if value > torch.finfo(dtype).max:
            raise ValueError(f"CBAM2 option temperature={value!r} is not allowed; give one that {dtype} holds.")
        self.initial_value = float(value)
        self.learnable = learnable
        if learnable:
            self.raw = nn.Parameter(torch.empty(1, device=device, dtype=dtype))  # FSDP refuses 0-d parameters
        else:
            self.register_buffer("value", torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Return to the temperature that was asked for."""
        if self.learnable:
            target = self.initial_value - self.eps
            # The inverse of softplus; expm1 keeps small targets and expm1(-t) cannot overflow for large ones.
            nn.init.constant_(self.raw, target + math.log(-math.expm1(-target)))
        else:
            nn.init.constant_(self.value, self.initial_value)

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        if self.learnable:
            return F.softplus(as_dtype(self.raw, dtype)) + self.eps  # (1,)
        return as_dtype(self.value, dtype)


def reset_convs(module: nn.Module) -> None:
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, _BatchNorm, Temperature)):
            child.reset_parameters()


def coordinates(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The positions along one axis, symmetric in [-1, 1]: (count,).

    Built from arange alone, which keeps sizes symbolic in torch.export, torch.compile and traces; linspace or a number
    made from `count` would fix them.
    """
    steps = torch.arange(count, device=device, dtype=dtype)
    last = steps[-1:]
    return (2 * steps - last) / last.clamp(min=1)


class Branch(nn.Module):
    """A depthwise k×k convolution, then a pointwise one to one channel: stored so, mostly run as one dense kernel."""

    def __init__(self, maps: int, kernel_size: int, dilation: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dilation = dilation
        self.footprint = dilation * (kernel_size - 1) + 1
        self.dw = nn.Conv2d(
            maps, maps, kernel_size, padding=self.footprint // 2, dilation=dilation, groups=maps, bias=False, **dd
        )
        self.pw = nn.Conv2d(maps, 1, 1, bias=False, **dd)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.pw(self.dw(maps))  # (B, S, H, W) to (B, 1, H, W)

    def kernel(self, footprint: int, dtype: torch.dtype) -> torch.Tensor:
        """The equal dense kernel (S, footprint, footprint), zeros between dilated taps and around it."""
        pointwise = as_dtype(self.pw.weight, dtype).transpose(0, 1)
        taps = (pointwise * as_dtype(self.dw.weight, dtype)).squeeze(1)  # (S, k, k)
        if self.dilation > 1:
            between = self.dilation - 1
            taps = F.pad(taps[:, :, None, :, None], [0, between, 0, 0, 0, between])  # (S, k, dilation, k, dilation)
            taps = taps.flatten(3).flatten(1, 2)[:, : self.footprint, : self.footprint]
        margin = (footprint - self.footprint) // 2
        return F.pad(taps, [margin, margin, margin, margin])
