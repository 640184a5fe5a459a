"""Blocks that were tried before options of `Cbam2` were made of the best: plain autograd, speed of no account."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.cbam2 import Cbam2, CbamAttention
from ...models.decisions_cbam2 import QUIET, DecisionNorm
from ...models.parts_cbam2 import apply_gate, compute_dtype, coordinates, no_autocast

__all__ = ["Trial"]


class _Router(nn.Module):
    """A router whose logits (B, K) or (B, K, H, W) BatchNorm balances: over the data no choice leads."""

    def __init__(self, logits: nn.Module, choices: int):
        super().__init__()
        self.logits = logits
        self.bn = nn.BatchNorm1d(choices)

    def forward(self, x: Tensor) -> Tensor:
        z = self.logits(x)
        return self.bn(z.flatten(2)).view_as(z).softmax(1) if z.dim() == 4 else self.bn(z).softmax(1)


class _DataCenter(nn.Module):
    """Takes the mean over the data off numbers (B, N), as BatchNorm does, and leaves their spread as it is."""

    def __init__(self, count: int, momentum: float = 0.1):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(count))

    def forward(self, z: Tensor) -> Tensor:
        if not self.training:
            return z - self.mean
        mean = z.mean(0)
        with torch.no_grad():
            self.mean.lerp_(mean.float(), self.momentum)
        return z - mean


def _logits(router: nn.Module) -> nn.Module:
    return nn.Sequential(router.fc1, nn.ReLU(), router.fc2)


def _hidden_layer(maps: int, hidden: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Conv2d(maps, hidden, 7, padding=3, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, 1, 7, padding=3, bias=False),
    )
    nn.init.zeros_(layers[-1].weight)
    return layers


class Trial(Cbam2):
    """One block with every idea behind a switch; at its start the identity.

    Args:
        channels: of the features.
        channel: "raw" as registered, "norm" (squeezes normalised over the batch), "layer" (each squeeze normalised
            over its channels, a tenth of it at first), "gate" (gate input normalised over the batch, gain 0 at
            first), "softmax" (channels share a sum), "center", "data" (gate input less its mean over the data), "off".
        fusion: "router", "norm" (logits normalised over the batch).
        std: the standard deviation as a third squeeze (added to the average's).
        spatial: "raw", "center", "standard" (zero mean and unit variance over an image's positions, gain 0 at first),
            "share" (mask divided by its mean over positions), "softmax", "off".
        extra: maps that a 1x1 convolution makes, normalised over the batch.
        maps: "raw" or "norm": average and maximum normalised over the batch.
        route: "raw", "norm", "pixel" (weights for each position, logits normalised), "even" (no router).
        bound: largest absolute gate input, by tanh; 0 for none.
        cool: temperature of the channel gate at first, another than the spatial gate's.
        quiet: squeezes normalised over the batch, a tenth of them at first, unless `channel` is "off".
        deep: a hidden layer of this many channels in the spatial network.
    """

    def __init__(
        self,
        channels: int,
        channel: str = "raw",
        fusion: str = "router",
        spatial: str = "raw",
        extra: int = 0,
        maps: str = "raw",
        route: str = "raw",
        bound: float = 0.0,
        deep: int = 0,
        std: bool = False,
        cool: float = 0.0,
        quiet: bool = False,
        **options: Any,
    ):
        super().__init__(channels, gate="unit_sigmoid", **options)
        self.kind = dict(channel=channel, fusion=fusion, spatial=spatial, maps=maps, route=route)
        self.bound, self.std = bound, std
        self.channel.forward, self.spatial.forward = self.forward_channel, self.forward_spatial
        choices = len(self.spatial.branches)
        self.quiet = DecisionNorm(2 * channels, QUIET) if quiet else None
        if channel == "norm":
            self.squeeze_bn = nn.BatchNorm1d(2 * channels, affine=False)
        if channel == "layer":
            self.squeeze_ln = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
            for norm in self.squeeze_ln:
                nn.init.constant_(norm.weight, QUIET)
        if channel == "gate":
            self.gate_bn = nn.BatchNorm1d(channels)
            nn.init.zeros_(self.gate_bn.weight)
            nn.init.kaiming_uniform_(self.channel.fc2.weight, a=5**0.5)
        if channel == "data":
            self.gate_center = _DataCenter(channels)
        if fusion == "norm":
            self.channel.router = _Router(_logits(self.channel.router), 2)
        if route == "norm":
            self.spatial.router = _Router(_logits(self.spatial.router), choices)
        elif route == "pixel":
            self.spatial.router = _Router(nn.Conv2d(4 + extra, choices, 3, padding=1, bias=False), choices)
        self.maps_bn = nn.BatchNorm2d(2, affine=False) if maps == "norm" else None
        self.project = nn.Conv2d(channels, extra, 1, bias=False) if extra else None
        self.project_bn = nn.BatchNorm2d(extra) if extra else None
        if extra:  # taps of the new maps, added to the branches' own
            self.extra = nn.ModuleList(
                nn.Conv2d(extra, 1, b.dw.kernel_size, padding=b.dw.padding, dilation=b.dilation, bias=False)
                for b in self.spatial.branches
            )
            if spatial != "standard":
                for conv in self.extra:
                    nn.init.zeros_(conv.weight)
        self.deep = _hidden_layer(2 + extra, deep) if deep else None
        if spatial == "standard":
            self.gain = nn.Parameter(torch.zeros(1))
            for branch in self.spatial.branches:
                branch.pw.reset_parameters()
        if cool:
            self.channel.temperature.initial_value = cool
            self.channel.temperature.reset_parameters()
        self.start = {key: value.clone() for key, value in self.state_dict().items()}

    def reset_parameters(self) -> None:
        """As it was made: timm initialises every convolution anew."""
        self.load_state_dict(self.start)

    def limit(self, z: Tensor) -> Tensor:
        return self.bound * torch.tanh(z / self.bound) if self.bound else z

    def forward_channel(self, x: Tensor, return_attention: bool = False) -> Any:
        kind, part = self.kind["channel"], self.channel
        if kind == "off":
            ones = x.new_ones(x.shape[0], x.shape[1], 1, 1)
            return (x, ones, None) if return_attention else x
        with no_autocast(x):
            dtype = compute_dtype(x)
            avg, largest = x.mean((2, 3), dtype=dtype), x.amax((2, 3)).to(dtype)
            if self.std:
                avg = avg + x.to(dtype).flatten(2).std(2, correction=0)
            both = torch.cat([avg, largest], 1)
            if self.quiet is not None:
                both = self.quiet(both)
                avg, largest = both.chunk(2, 1)
            if kind == "norm":
                both = self.squeeze_bn(both)
                avg, largest = both.chunk(2, 1)
            if kind == "layer":
                avg, largest = self.squeeze_ln[0](avg), self.squeeze_ln[1](largest)
                both = torch.cat([avg, largest], 1)
            a, m = F.relu(part.fc1(avg)), F.relu(part.fc1(largest))
            weights = part.router(both)
            z = part.fc2(weights[:, :1] * a + weights[:, 1:] * m)
            if kind == "gate":
                z = self.gate_bn(z)
            if kind == "data":
                z = self.gate_center(z)
            if kind in ("center", "softmax"):
                z = z - z.mean(1, keepdim=True)
            z = self.limit(z / part.temperature(dtype))
            if kind == "softmax":
                mask = z.softmax(1) * z.shape[1]
            else:
                mask = apply_gate(z, "unit_sigmoid")
            mask = mask.to(x.dtype)[:, :, None, None]
            y = x * mask
        return (y, mask, weights) if return_attention else y

    def forward_spatial(self, y: Tensor, return_attention: bool = False) -> Any:
        kind = self.kind["spatial"]
        if kind == "off":
            ones = y.new_ones(y.shape[0], 1, *y.shape[2:])
            weights = ones.new_ones(y.shape[0], 4) / 4
            return (y, ones, weights) if return_attention else y
        with no_autocast(y):
            dtype = compute_dtype(y)
            maps = torch.cat([y.mean(1, keepdim=True, dtype=dtype), y.amax(1, keepdim=True).to(dtype)], 1)
            if self.maps_bn is not None:
                maps = self.maps_bn(maps)
            new = None
            if self.project is not None:
                new = self.project_bn(F.conv2d(y.to(dtype), self.project.weight))
            z = self.branches_of(maps)
            if new is not None:
                z = z + torch.cat([conv(new) for conv in self.extra], 1)
            weights = self.route(maps, new)
            if weights.dim() == 2:
                z = (z * weights[:, :, None, None]).sum(1, keepdim=True)
            else:
                z = (z * weights).sum(1, keepdim=True)
            if self.deep is not None:
                z = z + self.deep(maps if new is None else torch.cat([maps, new], 1))
            mask = self.mask(z, kind).to(y.dtype)
            out = y * mask
        return (out, mask, weights) if return_attention else out

    def branches_of(self, maps: Tensor) -> Tensor:
        part = self.spatial
        kernel, place = part.prepare(*maps.shape[2:], maps.dtype)
        return F.conv2d(maps, kernel, padding=part.footprint // 2) + place

    def mask(self, z: Tensor, kind: str) -> Tensor:
        t = self.spatial.temperature(z.dtype)
        if kind != "raw":
            z = z - z.mean((2, 3), keepdim=True)
        if kind == "standard":
            z = self.gain * z / (z.var((2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        z = self.limit(z / t)
        if kind == "softmax":
            return z.flatten(2).softmax(2).view_as(z) * z[0, 0].numel()
        mask = apply_gate(z, "unit_sigmoid")
        return mask / mask.mean((2, 3), keepdim=True) if kind == "share" else mask

    def route(self, maps: Tensor, new: Tensor | None) -> Tensor:
        kind, part = self.kind["route"], self.spatial
        if kind == "even":
            count = len(part.branches)
            return maps.new_ones(maps.shape[0], count) / count
        if kind == "pixel":
            batch, _, height, width = maps.shape
            across = coordinates(width, maps.device, maps.dtype).expand(batch, 1, height, width)
            down = coordinates(height, maps.device, maps.dtype)[:, None].expand(batch, 1, height, width)
            seen = torch.cat([maps, across, down] + ([] if new is None else [new]), 1)
            return part.router(seen)
        return part.router(F.pad(maps.mean((2, 3)), [0, 2]))

    def forward(self, x: Tensor, return_attention: bool = False) -> Any:
        y, channel_mask, fusion = self.forward_channel(x, return_attention=True)
        out, spatial_mask, weights = self.forward_spatial(y, return_attention=True)
        return (out, CbamAttention(channel_mask, fusion, spatial_mask, weights)) if return_attention else out
