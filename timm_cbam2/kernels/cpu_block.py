"""A whole block by the compiled kernel: one call forward and one backward, where torch takes three hundred."""

from __future__ import annotations

import functools
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ..models.dense_cbam2 import branch_shapes, kept_windows
from ..models.passes_cbam2 import End, Small

__all__ = ["KernelBlock", "serves"]

GATES = ("sigmoid", "unit_sigmoid", "hard_sigmoid")  # by their number in the kernel
ROUTER = ("router.fc1.weight", "router.fc1.bias", "router.fc2.weight", "router.fc2.bias")
ROUTER += ("router.norm.weight", "router.norm.bias")
TEMPERATURE = "temperature.raw"
# Weights of both parts in the kernel's order; behind the spatial ones come those of the branches.
CHANNEL = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", *ROUTER, "fusion_logits", TEMPERATURE)
CHANNEL += ("norm.weight", "norm.bias")
SPATIAL = (*ROUTER, TEMPERATURE)
SMALL = len(Small._fields)  # what the kernel keeps follows these
UNKNOWN: list[Tensor | None] = [None] * 4  # statistics of both norms of a part

Slots = tuple[int | None, ...]


def _norms(part: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """In the kernel's order."""
    return None if part.router is None else part.router.norm, getattr(part, "norm", None)


def _all_norms(block: nn.Module) -> list[nn.Module]:
    return [norm for part in (block.channel, block.spatial) for norm in _norms(part) if norm is not None]


def serves(block: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> bool:
    """Whether the kernel knows this block, computed in `dtype`: without learned maps, with weights that are made of
    no others and norms that keep their statistics as they usually do."""
    usual = all(norm.keeps_usual_statistics(dtype) for norm in _all_norms(block))
    return usual and block.spatial.learned is None and not _parametrised(names)


@functools.lru_cache(64)
def _parametrised(names: tuple[str, ...]) -> bool:
    return any("parametrizations" in name for name in names)


@functools.lru_cache(64)
def _slots(names: tuple[str, ...], count: int, branches: int) -> tuple[Slots, Slots]:
    """Where among a block's parameters each weight is that the kernel takes; `count` are the channel part's."""
    wanted = [f"branches.{i}.{kind}.weight" for i in range(branches) for kind in ("dw", "pw")] or ["conv.weight"]
    channel = {name: at for at, name in enumerate(names[:count])}
    spatial = {name: at for at, name in enumerate(names[count:], count)}
    return tuple(map(channel.get, CHANNEL)), tuple(map(spatial.get, (*SPATIAL, *wanted)))


def _weights(part: nn.Module, slots: Slots, temperature: int, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    given = [None if at is None else parameters[at] for at in slots]
    if not part.temperature.learnable:
        given[temperature] = part.temperature.value
    return given


def _how(part: nn.Module, batch: int) -> tuple[list[Any], list[int], list[float]]:
    """Statistics of the part's norms, and the numbers and real numbers that the kernel is told."""
    running: list[Tensor | None] = []
    numbers = [GATES.index(part.gate), part.center, part.temperature.learnable]
    reals = [part.temperature.eps]
    for norm in _norms(part):
        running += (None, None) if norm is None else (norm.running_mean, norm.running_var)
        numbers.append(norm is not None and norm.training and batch > 1)
        reals += (0.0, 0.0) if norm is None else (norm.momentum, norm.eps)
    return running, numbers, reals


class KernelBlock:
    """A pass through a block that the kernel serves."""

    def __init__(self, kernel: Any, block: nn.Module, names: tuple[str, ...], count: int) -> None:
        """`names` of the parameters that both directions are given; the first `count` are the channel part's."""
        self.kernel, self.block = kernel, block
        self.slots = _slots(names, count, len(block.spatial.branches))

    def _given_weights(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        channel = _weights(self.block.channel, self.slots[0], CHANNEL.index(TEMPERATURE), parameters)
        return channel, _weights(self.block.spatial, self.slots[1], SPATIAL.index(TEMPERATURE), parameters)

    def _told(self, x: Tensor, dtype: torch.dtype) -> tuple:
        """What the kernel is told beside the weights."""
        channel, spatial = self.block.channel, self.block.spatial
        height, width = x.shape[2:]
        windows = kept_windows(height, width, spatial.footprint, x.device, dtype) if spatial.coords else ()
        running_c, numbers_c, reals_c = _how(channel, len(x))
        running_s, numbers_s, reals_s = _how(spatial, len(x))
        return (
            running_c,
            running_s,
            [*numbers_c, *numbers_s, spatial.footprint, spatial.moments],
            [*reals_c, *reals_s],
            [number for shape in branch_shapes(spatial) for number in shape],
            list(windows),
        )

    def infer(self, passes: Any, parameters: Sequence[Tensor], end: End) -> Tensor:
        """The output alone, when no path is dropped."""
        x, out, shortcut = passes.ends(end)
        given = (*self._given_weights(parameters), *self._told(x, passes.dtype))
        if len(x) > 1 and any(norm.training for norm in _all_norms(self.block)):  # they look at the batch
            self.kernel.block(x, *passes.norm, shortcut, end.gamma, None, end.relu, out, *given)
        else:
            self.kernel.infer(x, *passes.norm, shortcut, end.gamma, end.relu, out, *given)
        return out

    def forward(self, passes: Any, parameters: Sequence[Tensor], end: End, drop: Tensor | None) -> tuple[Tensor, Small]:
        """The output for the x of `passes`, and the small tensors."""
        x, out, shortcut = passes.ends(end)
        told = self._told(x, passes.dtype)
        weights = self._given_weights(parameters)
        found = self.kernel.block(x, *passes.norm, shortcut, end.gamma, drop, end.relu, out, *weights, *told)
        # The backward takes from what is kept how norms measured, not from statistics that have moved on since.
        self.kept, self.told = found[SMALL:], (UNKNOWN, UNKNOWN, *told[2:])
        return out, Small(*found[:SMALL])

    def backward(
        self,
        passes: Any,
        g: Tensor,
        small: Small,
        kept: tuple[Tensor | None, Tensor | None, Tensor | None],
        parameters: Sequence[Tensor],
        needed: bool,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The gradients of the shortcut, x, layer-scale, weight and bias of the BatchNorm, empty where there is none;
        and those of the parameters.

        Args:
            passes: Over the x of the forward pass.
            g: The gradient of the output.
            small: As `forward` gave it.
            kept: The output where an activation followed, layer-scale, the factors of stochastic depth.
            parameters: As given to `forward`.
            needed: Whether the gradient of x is.
        """
        out, gamma, drop = kept
        given = (*self._given_weights(parameters), *self.told)
        tensors = [*small, *self.kept]
        all_found = self.kernel.block_backward(
            passes.laid_out(g), out, passes.x, passes.trained_norm, gamma, drop, tensors, needed, *given
        )
        grads: list[Tensor | None] = [None] * len(parameters)
        for at, grad in zip((*self.slots[0], *self.slots[1]), all_found[5:], strict=True):
            if at is not None:
                grads[at] = grad  # autograd gives it the parameter's type
        return all_found[:5], grads
