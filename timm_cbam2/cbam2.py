"""CBAM2: channel attention, then spatial attention, each mixed by a router that looks at every sample.

It follows CBAM (`CBAM: Convolutional Block Attention Module`, https://arxiv.org/abs/1807.06521) and adds
  * a router that mixes the average and the maximum squeeze per sample instead of adding them,
  * a learnable temperature in front of each gate, as in Dynamic Convolution, https://arxiv.org/abs/1912.03458,
  * spatial branches of several kernel sizes over average, maximum and coordinate maps (CoordConv,
    https://arxiv.org/abs/1807.03247), mixed per sample by a second router.
"""

import contextlib
import inspect
import sys
from typing import Any, Dict, Final, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import make_divisible, register_notrace_module

from .fused_cbam2 import can_fuse, fused, fused_without_grad
from .options_cbam2 import check_options, complete_options
from .parts_cbam2 import (
    Branch,
    Fc,
    Router,
    Temperature,
    apply_gate,
    compute_dtype,
    coordinate_maps,
    no_autocast,
    reset_convs,
)

__all__ = ["Cbam2", "CbamAttention", "ChannelAttn", "SpatialAttn", "is_cbam2", "record_attention", "resolve_options"]


class CbamAttention(NamedTuple):
    """What one CBAM2 block decided, for a batch of B samples with C channels and K spatial branches."""

    channel_mask: torch.Tensor  # (B, C, 1, 1)
    fusion_weights: Optional[torch.Tensor]  # (B, 2), average and maximum; None unless fusion="router"
    spatial_mask: torch.Tensor  # (B, 1, H, W)
    router_weights: torch.Tensor  # (B, K), one per branch, the dilated branch last


def resolve_options(options: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """Complete and check the CBAM2 options of a network.

    An absent option takes the default of `Cbam2`, except `gate`, which is "unit_sigmoid" in every registered network.

    Args:
        options: Keyword arguments of `Cbam2` (without `channels`, `device`, `dtype`); None means none.

    Returns:
        Every option with its value, lists turned into tuples.

    Raises:
        ValueError: For an unknown option or a value that is not allowed.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(Cbam2).parameters.items()}
    for name in ("channels", "device", "dtype"):
        del defaults[name]
    return complete_options(options, {**defaults, "gate": "unit_sigmoid"})


class ChannelAttn(nn.Module):
    """Channel attention: one mask value per sample and channel, from a mix of average and maximum squeezes."""

    is_sum: Final[bool]

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1.0 / 16,
        rd_channels: Optional[int] = None,
        rd_divisor: int = 8,
        fusion: str = "router",
        router_channels: int = 16,
        temperature: float = 1.0,
        learnable_temperature: bool = True,
        gate: str = "sigmoid",
        mlp_bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            channels: Number of input channels.
            rd_ratio: Hidden channels of the shared perceptron as a share of `channels`.
            rd_channels: Hidden channels given directly, overrides `rd_ratio`.
            rd_divisor: Hidden channels are rounded to a multiple of this.
            fusion: "router" mixes the two squeezes per sample, "static" by one learned mix, "sum" adds them (CBAM).
            router_channels: Hidden channels of the router.
            temperature: Starting value of the number that divides the gate's input.
            learnable_temperature: Train the temperature; otherwise it is a saved buffer.
            gate: "sigmoid", "hard_sigmoid" or "unit_sigmoid" (2·sigmoid, 1 at 0: a fresh layer is the identity).
            mlp_bias: Give the shared perceptron biases.
            device: Device of the parameters.
            dtype: Data type of the parameters.

        Raises:
            ValueError: For an option that is not allowed.
        """
        check_options(locals())
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        rd_channels = rd_channels or make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.0)
        self.gate = gate
        self.is_sum = fusion == "sum"
        self.fc1 = Fc(channels, rd_channels, mlp_bias, **dd)
        self.fc2 = Fc(rd_channels, channels, mlp_bias, **dd)
        self.router = Router(2 * channels, router_channels, 2, **dd) if fusion == "router" else None
        self.register_parameter("fusion_logits", nn.Parameter(torch.empty(2, **dd)) if fusion == "static" else None)
        self.temperature = Temperature(temperature, learnable_temperature, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew; with "unit_sigmoid" the result is the identity."""
        reset_convs(self)
        if self.fusion_logits is not None:
            nn.init.zeros_(self.fusion_logits)
        if self.gate == "unit_sigmoid":
            nn.init.zeros_(self.fc2.weight)
            if self.fc2.bias is not None:
                nn.init.zeros_(self.fc2.bias)

    def mask_of(self, s_avg: torch.Tensor, s_max: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The mask (B, C), and the fusion weights (B, 2) or None, of the two squeezes (B, C)."""
        dtype = s_avg.dtype
        hidden_avg, hidden_max = F.relu(self.fc1(torch.cat([s_avg, s_max]))).chunk(2)  # (B, R) each
        weights: Optional[torch.Tensor] = None
        # fc2 is linear and the weights sum to 1, so mixing before it equals mixing after it at half the cost.
        if self.router is not None:
            weights = self.router(torch.cat([s_avg, s_max], 1))  # (B, 2)
            hidden = weights[:, :1] * hidden_avg + weights[:, 1:] * hidden_max
        elif self.fusion_logits is not None:
            mix = self.fusion_logits.to(dtype).softmax(0)  # (2,)
            hidden = mix[0] * hidden_avg + mix[1] * hidden_max
        else:
            hidden = hidden_avg + hidden_max
        z = self.fc2(hidden)  # (B, C)
        bias = self.fc2.bias
        if self.is_sum and bias is not None:
            z = z + bias.to(dtype)  # both squeezes carry it
        return apply_gate(z / self.temperature(dtype), self.gate), weights

    def attend(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The mask (B, C, 1, 1) in x's dtype, and the fusion weights (B, 2) or None, of x (B, C, H, W)."""
        dtype = compute_dtype(x)
        mask, weights = self.mask_of(x.mean((2, 3), dtype=dtype), x.amax((2, 3)).to(dtype))
        return mask.to(x.dtype)[:, :, None, None], weights

    def forward(self, x: torch.Tensor, return_attention: bool = False) -> torch.Tensor:
        """
        Args:
            x: Features (B, C, H, W).
            return_attention: Return (y, mask (B, C, 1, 1), fusion weights (B, 2) or None) instead of y.
        """
        if torch.jit.is_scripting():
            return x * self.attend(x)[0]
        with no_autocast(x):
            mask, weights = self.attend(x)
            y = x * mask
        return (y, mask, weights) if return_attention else y


class SpatialAttn(nn.Module):
    """Spatial attention: one mask value per sample and position, from branches that a router mixes per sample."""

    moments: Final[bool]
    coords: Final[bool]

    def __init__(
        self,
        router_channels: int = 16,
        kernel_sizes: Sequence[int] = (3, 5, 7),
        dilated: Optional[Sequence[int]] = (3, 3),
        coords: bool = True,
        router_pool: str = "avg",
        temperature: float = 1.0,
        learnable_temperature: bool = True,
        gate: str = "sigmoid",
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            router_channels: Hidden channels of the router.
            kernel_sizes: One branch for each; an even size is raised to the next odd one.
            dilated: (kernel size, dilation) of one more branch, the last; None for none.
            coords: Give the branches coordinate maps beside the average and the maximum over channels.
            router_pool: "avg" shows the router the mean of each map, "moments" also where the average is large.
            temperature: Starting value of the number that divides the gate's input.
            learnable_temperature: Train the temperature; otherwise it is a saved buffer.
            gate: "sigmoid", "hard_sigmoid" or "unit_sigmoid" (2·sigmoid, 1 at 0: a fresh layer is the identity).
            device: Device of the parameters.
            dtype: Data type of the parameters.

        Raises:
            ValueError: For an option that is not allowed.
        """
        check_options(locals())
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gate = gate
        self.coords = coords
        self.moments = router_pool == "moments"
        maps = 4 if coords else 2
        shapes = [(k, 1) for k in kernel_sizes] + ([tuple(dilated)] if dilated else [])
        self.branches = nn.ModuleList(Branch(maps, k + 1 - k % 2, dilation, **dd) for k, dilation in shapes)
        self.footprint = max(branch.footprint for branch in self.branches)
        self.router = Router(maps, router_channels, len(shapes), **dd)
        self.temperature = Temperature(temperature, learnable_temperature, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew; with "unit_sigmoid" the result is the identity."""
        reset_convs(self)
        if self.gate == "unit_sigmoid":
            for branch in self.branches:
                nn.init.zeros_(branch.pw.weight)

    def mask_of(self, avg: torch.Tensor, largest: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The mask (B, H, W) and the router weights (B, K) of the average and maximum over channels (B, H, W)."""
        dtype = avg.dtype
        batch, height, width = avg.shape
        maps = torch.stack([avg, largest], 1)  # (B, 2, H, W)
        pooled = maps.mean((2, 3))  # (B, 2)
        kernels = []
        for branch in self.branches:
            kernels.append(branch.kernel(self.footprint, dtype))
        kernel = torch.stack(kernels)  # (K, S, footprint, footprint)
        z = F.conv2d(maps, kernel[:, :2], padding=self.footprint // 2)  # (B, K, H, W)
        if self.coords:
            grid = coordinate_maps(height, width, avg.device, dtype)  # (2, H, W)
            # The coordinate half depends on size and weights only: once for the whole batch.
            z = z + F.conv2d(grid[None], kernel[:, 2:], padding=self.footprint // 2)
            if self.moments:
                place = maps[:, 0].flatten(1) @ grid.flatten(1).t() / (height * width)  # (B, 2)
            else:
                place = grid.mean((1, 2)).expand(batch, 2)
            pooled = torch.cat([pooled, place], 1)  # (B, S)
        weights = self.router(pooled)  # (B, K)
        z = torch.bmm(weights[:, None], z.flatten(2)).view(batch, height, width)
        return apply_gate(z / self.temperature(dtype), self.gate), weights

    def attend(self, y: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The mask (B, 1, H, W) in y's dtype and the router weights (B, K) of y (B, C, H, W)."""
        dtype = compute_dtype(y)
        mask, weights = self.mask_of(y.mean(1, dtype=dtype), y.amax(1).to(dtype))
        return mask.to(y.dtype)[:, None], weights

    def forward(self, y: torch.Tensor, return_attention: bool = False) -> torch.Tensor:
        """
        Args:
            y: Features (B, C, H, W).
            return_attention: Return (out, mask (B, 1, H, W), router weights (B, K)) instead of out.
        """
        if torch.jit.is_scripting():
            return y * self.attend(y)[0]
        with no_autocast(y):
            mask, weights = self.attend(y)
            out = y * mask
        return (out, mask, weights) if return_attention else out


@register_notrace_module  # one node in torch.fx: its shapes depend on the input
class Cbam2(nn.Module):
    """Channel attention, then spatial attention (see this module's docstring for the papers)."""

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1.0 / 16,
        rd_channels: Optional[int] = None,
        rd_divisor: int = 8,
        fusion: str = "router",
        router_channels: int = 16,
        kernel_sizes: Sequence[int] = (3, 5, 7),
        dilated: Optional[Sequence[int]] = (3, 3),
        coords: bool = True,
        router_pool: str = "avg",
        temperature: float = 1.0,
        learnable_temperature: bool = True,
        gate: str = "sigmoid",
        mlp_bias: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        """
        Args:
            channels: Number of input channels.
            rd_ratio: See `ChannelAttn`, as for rd_channels, rd_divisor, fusion and mlp_bias.
            router_channels: Hidden channels of both routers.
            kernel_sizes: See `SpatialAttn`, as for dilated, coords and router_pool.
            temperature: Starting value of both temperatures.
            learnable_temperature: Train both temperatures.
            gate: Gate of both masks.
            device: Device of the parameters.
            dtype: Data type of the parameters.

        Raises:
            ValueError: For an option that is not allowed.
        """
        super().__init__()
        shared = dict(
            router_channels=router_channels,
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            gate=gate,
            device=device,
            dtype=dtype,
        )
        self.channel = ChannelAttn(
            channels, rd_ratio, rd_channels, rd_divisor, fusion=fusion, mlp_bias=mlp_bias, **shared
        )
        self.spatial = SpatialAttn(
            kernel_sizes=kernel_sizes, dilated=dilated, coords=coords, router_pool=router_pool, **shared
        )

    def reset_parameters(self) -> None:
        """Initialise anew; with gate="unit_sigmoid" the block is then exactly the identity."""
        self.channel.reset_parameters()
        self.spatial.reset_parameters()

    def forward(self, x: torch.Tensor, return_attention: bool = False) -> torch.Tensor:
        """
        Args:
            x: Features (B, C, H, W), any memory format, which the output keeps.
            return_attention: Return (y, CbamAttention) instead of y; both are differentiable.

        Returns:
            y: Features (B, C, H, W) in x's dtype.
        """
        if torch.jit.is_scripting():
            return self.spatial(self.channel(x))
        if not return_attention:
            if not can_fuse(self, x):
                return self.spatial(self.channel(x))
            with no_autocast(x):
                if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters())):
                    return fused(self, x)
                return fused_without_grad(self, x)
        y, channel_mask, fusion_weights = self.channel(x, return_attention=True)
        out, spatial_mask, router_weights = self.spatial(y, return_attention=True)
        return out, CbamAttention(channel_mask, fusion_weights, spatial_mask, router_weights)


def is_cbam2(module: nn.Module) -> bool:
    """Whether `module` is a `Cbam2` block, also one whose class came from a model repository's copy of this file."""
    return isinstance(module, Cbam2) or (type(module).__name__ == "Cbam2" and hasattr(module, "spatial"))


@contextlib.contextmanager
def record_attention(model: nn.Module) -> Iterator[Dict[str, CbamAttention]]:
    """Collect what every CBAM2 block of `model` decides in the forward passes made inside the context.

    The forward itself is left as it is, whatever path computes it; a compiled model runs uncompiled meanwhile, since
    hooks added after compiling never fire.

    Args:
        model: Any module that contains `Cbam2` blocks.

    Yields:
        A dict that fills with one detached `CbamAttention` per block, by module name, in the order the blocks ran;
        a later pass replaces an earlier one's.

    Raises:
        ValueError: When the model has no CBAM2 block.
    """
    blocks = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in model.named_modules()
        if is_cbam2(module)
    }
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no Cbam2 block to record; create a model named '…_cbam2'.")
    records: Dict[str, CbamAttention] = {}

    def recorder(name: str):
        def hook(block: Cbam2, args: Tuple[torch.Tensor, ...], kwargs: Dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["x"]
            with torch.no_grad():
                records[name] = block.forward(x.detach(), return_attention=True)[1]

        return hook

    handles = [block.register_forward_hook(recorder(name), with_kwargs=True) for name, block in blocks.items()]
    # Nothing is compiled unless dynamo was imported, and importing it is slow.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    try:
        with eager:
            yield records
    finally:
        for handle in handles:
            handle.remove()
