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
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.layers import register_notrace_module

from .channel_cbam2 import ChannelAttn
from .compiled_cbam2 import Source, apply_masks, is_compiled, maps_of, squeezes_of
from .decisions_cbam2 import statistics_kept
from .fused_cbam2 import fused, fused_without_grad, needs_gradient
from .fusible_cbam2 import may_fuse, named_weights
from .options_cbam2 import complete_options
from .parts_cbam2 import as_dtype, as_one_node, has_hooks, is_traced, no_autocast
from .residual_cbam2 import branch_end
from .spatial_cbam2 import SpatialAttn

__all__ = ["Cbam2", "CbamAttention", "ChannelAttn", "SpatialAttn", "is_cbam2", "record_attention", "resolve_options"]


class CbamAttention(NamedTuple):
    """What one CBAM2 block decided, for a batch of B samples with C channels and K spatial branches."""

    channel_mask: torch.Tensor  # (B, C, 1, 1)
    fusion_weights: Optional[torch.Tensor]  # (B, 2), average and maximum; None unless fusion="router"
    spatial_mask: torch.Tensor  # (B, 1, H, W)
    router_weights: torch.Tensor  # (B, K), one per branch, the dilated last; (B, K, H, W) with router_pool="none"


# Where a network differs from `Cbam2` alone: for ever, a saved one that does not tell an option; and one made anew,
# whose decisions see what differs between images, so that none is the same for all. That is measured over the batch,
# which a network without BatchNorm, a ConvNeXt, must not depend on.
SAVED_DEFAULTS: Dict[str, Any] = {"gate": "unit_sigmoid"}
LIVE = ("center_spatial", "squeeze_norm", "router_norm")
REGISTERED_DEFAULTS: Dict[str, Any] = {**SAVED_DEFAULTS, **dict.fromkeys(LIVE, True)}


def made_with(on: bool) -> str:
    """How to ask for a network with these three on, or off as 0.1 made them."""
    return f"cbam2=dict({', '.join(f'{option}={on}' for option in LIVE)})"


def resolve_options(
    options: Optional[Mapping[str, Any]] = None, saved: bool = False, batch_norm: bool = True
) -> Dict[str, Any]:
    """Complete and check the CBAM2 options of a network.

    An absent option takes the default of `Cbam2`, except `gate`, which is "unit_sigmoid" in every network, and, in a
    new one with BatchNorm, `center_spatial`, `squeeze_norm` and `router_norm`, which are on.

    Args:
        options: Keyword arguments of `Cbam2` (without `channels`, `device`, `dtype`); None means none.
        saved: They come from a saved configuration: what is absent there means for ever what it meant when the file
            was written, whatever networks are registered with by now.
        batch_norm: The network has BatchNorm, as ResNets have and ConvNeXts have not.

    Returns:
        Every option with its value, lists turned into tuples.

    Raises:
        ValueError: For an unknown option or a value that is not allowed.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(Cbam2).parameters.items()}
    for name in ("channels", "device", "dtype"):
        del defaults[name]
    own = REGISTERED_DEFAULTS if batch_norm and not saved else SAVED_DEFAULTS
    return complete_options(options, {**defaults, **own})


@register_notrace_module  # one node in torch.fx: its shapes depend on the input
class Cbam2(nn.Module):
    """Channel attention, then spatial attention (see this module's docstring for the papers)."""

    is_plain = False  # has an option that only the plain path knows; of blocks pickled before there was any

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
        *,
        center: bool = False,
        center_spatial: bool = False,
        squeeze_norm: bool = False,
        router_norm: bool = False,
        learned_maps: int = 0,
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
            center: See `ChannelAttn` and `SpatialAttn`.
            center_spatial: See `SpatialAttn`, as for learned_maps; on in registered models, like the next two.
            squeeze_norm: See `ChannelAttn`.
            router_norm: Of both routers, see `ChannelAttn` and `SpatialAttn`.

        Raises:
            ValueError: For an option that is not allowed.
        """
        super().__init__()
        shared: Dict[str, Any] = dict(temperature=temperature, learnable_temperature=learnable_temperature, gate=gate)
        shared |= dict(router_channels=router_channels, router_norm=router_norm, center=center)
        shared |= dict(device=device, dtype=dtype)
        own: Dict[str, Any] = dict(fusion=fusion, mlp_bias=mlp_bias, squeeze_norm=squeeze_norm)
        self.channel = ChannelAttn(channels, rd_ratio, rd_channels, rd_divisor, **own, **shared)
        own = dict(kernel_sizes=kernel_sizes, dilated=dilated, coords=coords, router_pool=router_pool)
        own |= dict(center_spatial=center_spatial, learned_maps=learned_maps, in_channels=channels)
        self.spatial = SpatialAttn(**own, **shared)
        self.is_plain = router_pool == "none"

    def reset_parameters(self) -> None:
        """Initialise anew; with gate="unit_sigmoid" the block is then exactly the identity."""
        self.channel.reset_parameters()
        self.spatial.reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        if strict and f"{prefix}spatial.router.fc2.bias" in state_dict and self.spatial.router.norm is not None:
            told = f"saved without router_norm, as by 0.1, whose networks are made with {made_with(False)}"
            if not any(told in error for error in errors):  # one block says it for all
                errors.append(f"{prefix[:-1] or 'Cbam2'}: {told}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def forward(
        self,
        x: torch.Tensor,
        return_attention: bool = False,
        shortcut: Optional[torch.Tensor] = None,
        act: Any = None,
    ) -> torch.Tensor:
        """
        Args:
            x: Features (B, C, H, W), any memory format, which the output keeps.
            return_attention: Return (y, CbamAttention) instead of y; both are differentiable.
            shortcut: Features (B, C, H, W) of a residual block, added in the pass that multiplies by the last mask.
            act: Activation after that, such as `nn.ReLU()`, called unless it is a ReLU; None for none.

        Returns:
            y: Features (B, C, H, W) in x's dtype, act(shortcut + attention of x).

        Raises:
            ValueError: When x has another shape, or holds no floating-point numbers.
        """
        if torch.jit.is_scripting():
            y = self.spatial(self.channel(x))
            return y if shortcut is None else y + shortcut
        if is_traced(x):
            if x.tracer.root is self:  # then shortcut and act are stand-ins too
                return self.spatial(self.channel(x))
            return _end(as_one_node(self, x), shortcut, act)
        if not x.is_floating_point():
            raise ValueError(f"Features of dtype {x.dtype} have no masks; give x as floating-point numbers.")
        channels = self.channel.fc1.in_channels
        if not torch.jit.is_tracing() and (x.dim() != 4 or x.shape[1] != channels):
            raise ValueError(f"Features of shape {tuple(x.shape)} do not fit; give x as (B, {channels}, H, W).")
        if not return_attention:
            if is_compiled() and self.compiles():
                return _end(self.of_source(Source(x)), shortcut, act)
            named = named_weights(self) if may_fuse(self, x) else None
            if named is None:
                return _end(self.spatial(self.channel(x)), shortcut, act)
            if shortcut is not None:
                return branch_end(self, x, shortcut, act=act)
            return _end((fused if needs_gradient(self, x) else fused_without_grad)(self, x, named), None, act)
        y, channel_mask, fusion_weights = self.channel(x, return_attention=True)
        out, spatial_mask, router_weights = self.spatial(y, return_attention=True)
        return _end(out, shortcut, act), CbamAttention(channel_mask, fusion_weights, spatial_mask, router_weights)

    def compiles(self) -> bool:
        """Whether `of_source` does what `forward` does."""
        return self.spatial.learned is None and not (has_hooks(self.channel) or has_hooks(self.spatial))

    def of_source(self, source: Source, gamma: Optional[torch.Tensor] = None) -> torch.Tensor:
        """`forward` for torch.compile, times gamma (C,), of the same dtype: both masks at once, and a norm before."""
        dtype = source.z.dtype
        with no_autocast(source.z):
            mask, _ = self.channel.mask_of(*squeezes_of(source))
            ca = as_dtype(mask, dtype)[:, :, None, None]
            sa, _ = self.spatial.decide(maps_of(source, ca), dtype)
            return apply_masks(source, ca if gamma is None else ca * gamma.view(1, -1, 1, 1), sa)


def _end(y: torch.Tensor, shortcut: Optional[torch.Tensor], act: Any) -> torch.Tensor:
    y = y if shortcut is None else y + shortcut
    return y if act is None else act(y)


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
            with torch.no_grad(), statistics_kept(block):
                records[name] = block.forward(x.detach(), True)[1]

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
