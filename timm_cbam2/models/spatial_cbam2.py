"""Spatial attention: what each position is multiplied by."""

from typing import Final, Optional, Sequence, Tuple, cast

import torch
import torch.nn as nn
import torch.nn.functional as F

from .decisions_cbam2 import LearnedMaps, PositionRouter
from .dense_cbam2 import coordinate_windows
from .options_cbam2 import check_options
from .parts_cbam2 import (
    Branch,
    Router,
    Temperature,
    apply_gate,
    as_dtype,
    as_one_node,
    compute_dtype,
    coordinates,
    has_hooks,
    is_traced,
    mean_in,
    no_autocast,
    reset_convs,
)

__all__ = ["SpatialAttn"]


class SpatialAttn(nn.Module):
    """Spatial attention: one mask value per sample and position, from branches that a router mixes per sample."""

    moments: Final[bool]
    coords: Final[bool]
    center: Final[bool]
    by_position: Final[bool]

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
        *,
        center: bool = False,
        center_spatial: bool = False,
        router_norm: bool = False,
        learned_maps: int = 0,
        in_channels: Optional[int] = None,
    ) -> None:
        """
        Args:
            router_channels: Hidden channels of the router.
            kernel_sizes: One branch for each; an even size is raised to the next odd one.
            dilated: (kernel size, dilation) of one more branch, the last; None for none.
            coords: Give the branches coordinate maps beside the average and the maximum over channels.
            router_pool: "avg" shows the router the mean of each map, "moments" also where the average is large; "none"
                decides at every position, from the maps around it.
            temperature: Starting value of the number that divides the gate's input.
            learnable_temperature: Train the temperature; otherwise it is a saved buffer.
            gate: "sigmoid", "hard_sigmoid" or "unit_sigmoid" (2·sigmoid, 1 at 0: a fresh layer is the identity).
            device: Device of the parameters.
            dtype: Data type of the parameters.
            center: Take the mean over positions off the gate's input.
            center_spatial: The same; in `Cbam2` for this part alone.
            router_norm: Normalise the router's logits over the batch, so that over the data no branch leads by itself;
                by a learnable gain that starts at a tenth.
            learned_maps: So many maps more, learned weighted sums of the channels, normalised over the batch.
            in_channels: Number of input channels, needed for `learned_maps`.

        Raises:
            ValueError: For an option that is not allowed.
        """
        check_options(locals())
        if learned_maps and in_channels is None:
            raise ValueError(f"learned_maps={learned_maps} is not allowed without in_channels; give their number.")
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gate, self.coords, self.center = gate, coords, center or center_spatial
        self.moments, self.by_position = router_pool == "moments", router_pool == "none"
        maps = (4 if coords else 2) + learned_maps
        shapes = [(k, 1) for k in kernel_sizes] + ([tuple(dilated)] if dilated else [])
        self.branches = nn.ModuleList(Branch(maps, k + 1 - k % 2, dilation, **dd) for k, dilation in shapes)
        self.conv: Optional[nn.Conv2d] = None  # the branches in one, after `reparameterize`
        self.footprint = max(branch.footprint for branch in self.branches)
        if self.by_position:
            self.router = PositionRouter(maps, len(shapes), router_norm, **dd)
        else:
            self.router = Router(maps, router_channels, len(shapes), norm=router_norm, **dd)
        self.learned = LearnedMaps(cast(int, in_channels), learned_maps, **dd) if learned_maps else None
        self.temperature = Temperature(temperature, learnable_temperature, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew; with "unit_sigmoid" the result is the identity."""
        reset_convs(self)
        if self.gate == "unit_sigmoid":
            for last in [branch.pw for branch in self.branches] + ([self.conv] if self.conv is not None else []):
                nn.init.zeros_(last.weight)

    def reparameterize(self) -> None:
        """Merge the branches into one stored convolution, in place, for inference; see `reparameterize_model` in timm.

        The state dict then holds `conv.weight` (K, S, f, f) in place of `branches`; nothing else changes.
        """
        if self.conv is not None:
            return
        weight = self.branches[0].pw.weight
        kernel = self.kernel(torch.float64 if weight.dtype == torch.float64 else torch.float32).detach()
        choices, maps = kernel.shape[:2]
        conv = nn.Conv2d(maps, choices, self.footprint, padding=self.footprint // 2, bias=False, device="meta")
        conv.weight = nn.Parameter(kernel.to(weight.dtype), requires_grad=weight.requires_grad)
        self.conv = conv.train(self.training)
        self.branches = nn.ModuleList()

    def kernel(self, dtype: torch.dtype) -> torch.Tensor:
        """All branches as one dense kernel (K, S, f, f) with the largest footprint f."""
        if self.conv is not None:
            return as_dtype(self.conv.weight, dtype)
        kernels = []
        for branch in self.branches:
            kernels.append(branch.kernel(self.footprint, dtype))
        return torch.stack(kernels)

    def prepare(self, height: int, width: int, dtype: torch.dtype) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """What does not depend on the input: the kernel (K, 2 + P, f, f) of the maps, and what the coordinates add
        (K, H, W), None without them."""
        kernel = self.kernel(dtype)
        place: Optional[torch.Tensor] = None
        if self.coords:
            across = coordinates(width, kernel.device, dtype).expand(height, width)
            down = coordinates(height, kernel.device, dtype)[:, None].expand(height, width)
            if not torch.jit.is_scripting() and torch.compiler.is_dynamo_compiling():
                place = self.place_by_axes(kernel, height, width)
            else:
                place = F.conv2d(torch.stack([across, down])[None], kernel[:, 2:4], padding=self.footprint // 2)[0]
            kernel = torch.cat([kernel[:, :2], kernel[:, 4:]], 1) if self.learned is not None else kernel[:, :2]
        return kernel, place

    @torch.jit.unused
    def place_by_axes(self, kernel: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the coordinates add (K, H, W), by matrix products, since each depends on one axis: inductor cannot order
        the strides of a convolution over maps of free height and width in a backward."""
        ones, down, columns = coordinate_windows(height, width, self.footprint, kernel.device, kernel.dtype)
        return torch.cat([ones @ kernel[:, 2], down @ kernel[:, 3]], 2) @ columns.t()

    def route(self, maps: torch.Tensor) -> torch.Tensor:
        """The router weights (B, K), or by position (B, K, H, W), of average, maximum and learned maps."""
        if self.by_position:
            return self.router(self.with_coordinates(maps))
        height, width = maps.shape[2:]
        pooled = maps.mean((2, 3))  # (B, 2 + P)
        learned = pooled[:, 2:]
        pooled = pooled[:, :2]
        if self.moments:
            across = maps[:, 0].mean(1) @ coordinates(width, maps.device, maps.dtype)
            down = maps[:, 0].mean(2) @ coordinates(height, maps.device, maps.dtype)
            pooled = torch.cat([pooled, torch.stack([across / width, down / height], 1)], 1)
        elif self.coords:
            pooled = F.pad(pooled, [0, 2])  # the mean of a symmetric coordinate is 0
        return self.router(pooled if self.learned is None else torch.cat([pooled, learned], 1))

    def with_coordinates(self, maps: torch.Tensor) -> torch.Tensor:
        """Average, maximum and learned maps (B, 2 + P, H, W) with the coordinates between them, as they are stored."""
        if not self.coords:
            return maps
        one = maps[:, :1]
        across = coordinates(maps.shape[3], maps.device, maps.dtype).expand_as(one)
        down = coordinates(maps.shape[2], maps.device, maps.dtype)[:, None].expand_as(one)
        return torch.cat([maps[:, :2], across, down, maps[:, 2:]], 1)

    def mask_of(
        self, maps: torch.Tensor, kernel: torch.Tensor, place: Optional[torch.Tensor]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The mask (B, H, W) and the router weights, see `route`, of all maps but coordinates (B, 2 + P, H, W).

        `kernel` and `place` are those of `prepare`.
        """
        z = F.conv2d(maps, kernel, padding=self.footprint // 2)  # (B, K, H, W)
        if place is not None:
            z = z + place
        return self.mix(z, self.route(maps))

    def mix(self, z: torch.Tensor, weights: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The mask (B, H, W) and the router weights, given those and what the branches give (B, K, H, W)."""
        by_position = weights if self.by_position else weights[:, :, None, None]
        z = (by_position * z).sum(1)  # no shapes that a converter would have to compute
        if self.center:
            z = z - z.mean((1, 2), keepdim=True)
        return apply_gate(z / self.temperature(z.dtype), self.gate), weights

    @torch.jit.unused
    def is_watched(self) -> bool:
        """Whether a branch, or a convolution of it, has hooks."""
        merged = [] if self.conv is None else [self.conv]
        return any(has_hooks(module) for module in (*self.branches.modules(), *merged))

    @torch.jit.unused
    def call_branches(self, maps: torch.Tensor) -> torch.Tensor:
        """What the branches give (B, K, H, W) of maps (B, 2 + P, H, W), each convolution being called for its hooks."""
        convs = list(self.branches) if self.conv is None else [self.conv]
        given = self.with_coordinates(maps).to(next(self.router.parameters()).dtype)
        return torch.cat([conv(given) for conv in convs], 1).to(maps.dtype)

    def attend(self, y: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The mask (B, 1, H, W) in y's dtype and the router weights (B, K), or (B, K, H, W), of y (B, C, H, W)."""
        dtype = compute_dtype(y)
        # Kept dimensions and `cat`, not `stack`: a view is what inductor cannot keep for a backward of free height and
        # width.
        maps = torch.cat([mean_in(y, [1], dtype, True), as_dtype(y.amax(1, keepdim=True), dtype)], 1)
        if self.learned is not None:
            maps = torch.cat([maps, self.learned(y, dtype)], 1)
        return self.decide(maps, y.dtype)

    def decide(self, maps: torch.Tensor, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """The mask (B, 1, H, W) in `dtype` and the router weights, see `attend`, of all maps but coordinates
        (B, 2 + P, H, W)."""
        if not torch.jit.is_scripting() and self.is_watched():
            mask, weights = self.mix(self.call_branches(maps), self.route(maps))
        else:
            mask, weights = self.mask_of(maps, *self.prepare(maps.shape[2], maps.shape[3], maps.dtype))
        return as_dtype(mask, dtype)[:, None], weights

    def forward(self, y: torch.Tensor, return_attention: bool = False) -> torch.Tensor:
        """
        Args:
            y: Features (B, C, H, W).
            return_attention: Return (out, mask (B, 1, H, W), router weights (B, K)) instead of out; those are
                (B, K, H, W) with router_pool="none".
        """
        if torch.jit.is_scripting():
            return y * self.attend(y)[0]
        if is_traced(y) and y.tracer.root is not self:
            return as_one_node(self, y)
        with no_autocast(y):
            mask, weights = self.attend(y)
            out = y * mask
        return (out, mask, weights) if return_attention else out
