"""A whole block by the compiled kernel: one call forward and one backward, where torch takes three hundred."""

from __future__ import annotations

import functools
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ..models.dense_cbam2 import branch_shapes, kept_windows
from ..models.passes_cbam2 import End, Small

__all__ = ["KernelBlock"]

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


class _Part:
    """What the kernel is told of the channel or the spatial part, looked up once a call."""

    def __init__(self, part: nn.Module) -> None:
        inner = part._modules  # attributes of a module take ten times as long to find
        router = inner.get("router")
        self.part, self.temperature = part, inner["temperature"]
        # In the kernel's order.
        self.norms = [None if router is None else router._modules.get("norm"), inner.get("norm")]

    def weights(self, slots: Slots, temperature: int, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        given = [None if at is None else parameters[at] for at in slots]
        if not self.temperature.learnable:
            given[temperature] = self.temperature.value
        return given

    def told(self, batch: int) -> tuple[list[Tensor | None], list[int], list[float]]:
        """Statistics of the norms, and the numbers and real numbers that the kernel is told."""
        running: list[Tensor | None] = []
        numbers = [GATES.index(self.part.gate), self.part.center, self.temperature.learnable]
        reals = [self.temperature.eps]
        for norm in self.norms:
            kept = {} if norm is None else norm._buffers
            running += kept.get("running_mean"), kept.get("running_var")
            numbers.append(norm is not None and norm.training and batch > 1)
            reals += (0.0, 0.0) if norm is None else (norm.momentum, norm.eps)
        return running, numbers, reals


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


class KernelBlock:
    """A pass through a block that the kernel serves."""

    def __init__(self, kernel: Any, block: nn.Module, names: tuple[str, ...], count: int) -> None:
        """`names` of the parameters that both directions are given; the first `count` are the channel part's."""
        self.kernel, self.names = kernel, names
        self.spatial = block._modules["spatial"]
        self.parts = [_Part(block._modules["channel"]), _Part(self.spatial)]
        self.norms = [norm for part in self.parts for norm in part.norms if norm is not None]
        self.shapes = [number for shape in branch_shapes(self.spatial) for number in shape]
        self.slots = _slots(names, count, len(self.shapes) // 2)

    def serves(self, dtype: torch.dtype) -> bool:
        """Whether the kernel knows this block, computed in `dtype`: without learned maps, with weights that are made of
        no others and norms that keep their statistics as they usually do."""
        usual = all(norm.keeps_usual_statistics(dtype) for norm in self.norms)
        return usual and self.spatial.learned is None and not _parametrised(self.names)

    def _weights(self, parameters: Sequence[Tensor]) -> list[list[Tensor | None]]:
        places = CHANNEL.index(TEMPERATURE), SPATIAL.index(TEMPERATURE)
        return [part.weights(*where, parameters) for part, *where in zip(self.parts, self.slots, places)]

    def _told(self, x: Tensor, dtype: torch.dtype) -> tuple:
        """What the kernel is told beside the weights."""
        spatial = self.spatial
        height, width = x.shape[2:]
        windows = kept_windows(height, width, spatial.footprint, x.device, dtype) if spatial.coords else ()
        (running_c, numbers_c, reals_c), (running_s, numbers_s, reals_s) = (part.told(len(x)) for part in self.parts)
        numbers = [*numbers_c, *numbers_s, spatial.footprint, spatial.moments]
        return running_c, running_s, numbers, [*reals_c, *reals_s], self.shapes, list(windows)

    def infer(self, passes: Any, parameters: Sequence[Tensor], end: End) -> Tensor:
        """The output alone, when no path is dropped."""
        x, out, shortcut = passes.ends(end)
        given = (*self._weights(parameters), *self._told(x, passes.dtype))
        if len(x) > 1 and any(norm.training for norm in self.norms):  # they look at the batch
            self.kernel.block(x, *passes.norm, shortcut, end.gamma, None, end.relu, out, *given)
        else:
            self.kernel.infer(x, *passes.norm, shortcut, end.gamma, end.relu, out, *given)
        return out

    def forward(self, passes: Any, parameters: Sequence[Tensor], end: End, drop: Tensor | None) -> tuple[Tensor, Small]:
        """The output for the x of `passes`, and the small tensors."""
        x, out, shortcut = passes.ends(end)
        told = self._told(x, passes.dtype)
        weights = self._weights(parameters)
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
        given = (*self._weights(parameters), *self.told)
        tensors = [*small, *self.kept]
        all_found = self.kernel.block_backward(
            passes.laid_out(g), out, passes.x, passes.trained_norm, gamma, drop, tensors, needed, *given
        )
        grads: list[Tensor | None] = [None] * len(parameters)
        for at, grad in zip((*self.slots[0], *self.slots[1]), all_found[5:], strict=True):
            if at is not None:
                grads[at] = grad  # autograd gives it the parameter's type
        return all_found[:5], grads
