"""A whole block by the compiled kernel: one call forward and one backward, where torch takes three hundred."""

from __future__ import annotations

import functools
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.decisions_cbam2 import Measure
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

Found = Mapping[str, Measure]
Slots = tuple[int | None, ...]


def _norms(part: nn.Module) -> dict[str, nn.Module | None]:
    """In the kernel's order."""
    return {"router.norm": None if part.router is None else part.router.norm, "norm": getattr(part, "norm", None)}


def _all_norms(block: nn.Module) -> list[nn.Module]:
    return [norm for part in (block.channel, block.spatial) for norm in _norms(part).values() if norm is not None]


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


def _how(part: nn.Module, name: str, batch: int, found: Found | None) -> tuple[list[Any], list[int], list[float]]:
    """Statistics of the part's norms, and the numbers and real numbers that the kernel is told; how the norms measured
    where `found` says so, else how they do now."""
    running: list[Tensor | None] = []
    numbers = [GATES.index(part.gate), part.center, part.temperature.learnable]
    reals = [part.temperature.eps]
    for own, norm in _norms(part).items():
        measure: Sequence[Tensor | None] | None = (None, None)
        if norm is not None and found is not None:
            measure = found[f"{name}.{own}"]
        elif norm is not None:
            measure = norm.running_mean, norm.running_var
        by_batch = norm is not None and (measure is None if found is not None else norm.training and batch > 1)
        running += measure or (None, None)
        numbers.append(by_batch)
        momentum = norm.momentum if norm is not None and found is None else 0.0  # which a backward has no use for
        reals += (momentum, 0.0 if norm is None else norm.eps)
    return running, numbers, reals


class KernelBlock:
    """A pass through a block that the kernel serves."""

    def __init__(self, kernel: Any, block: nn.Module, names: tuple[str, ...], count: int) -> None:
        """`names` of the parameters that both directions are given; the first `count` are the channel part's."""
        self.kernel, self.block = kernel, block
        self.slots = _slots(names, count, len(block.spatial.branches))

    def _given(self, x: Tensor, parameters: Sequence[Tensor], found: Found | None, dtype: torch.dtype) -> tuple:
        channel, spatial = self.block.channel, self.block.spatial
        height, width = x.shape[2:]
        windows = kept_windows(height, width, spatial.footprint, x.device, dtype) if spatial.coords else ()
        running_c, numbers_c, reals_c = _how(channel, "channel", len(x), found)
        running_s, numbers_s, reals_s = _how(spatial, "spatial", len(x), found)
        return (
            _weights(channel, self.slots[0], CHANNEL.index(TEMPERATURE), parameters),
            _weights(spatial, self.slots[1], SPATIAL.index(TEMPERATURE), parameters),
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
        given = self._given(x, parameters, None, passes.dtype)
        if len(x) > 1 and any(norm.training for norm in _all_norms(self.block)):  # they look at the batch
            self.kernel.block(x, *passes.norm, shortcut, end.gamma, None, end.relu, out, *given)
        else:
            self.kernel.infer(x, *passes.norm, shortcut, end.gamma, end.relu, out, *given)
        return out

    def forward(self, passes: Any, parameters: Sequence[Tensor], end: End, drop: Tensor | None) -> tuple[Tensor, Small]:
        """The output for the x of `passes`, and the small tensors."""
        x, out, shortcut = passes.ends(end)
        given = self._given(x, parameters, None, passes.dtype)
        found = self.kernel.block(x, *passes.norm, shortcut, end.gamma, drop, end.relu, out, *given)
        self.kept = found[SMALL:]
        return out, Small(*found[:SMALL])

    def backward(
        self,
        passes: Any,
        g: Tensor,
        small: Small,
        kept: tuple[Tensor | None, Tensor | None, Tensor | None],
        found: Found,
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
            found: What the norms measured by.
            parameters: As given to `forward`.
            needed: Whether the gradient of x is.
        """
        out, gamma, drop = kept
        given = self._given(passes.x, parameters, found, passes.dtype)
        tensors = [*small, *self.kept]
        all_found = self.kernel.block_backward(
            passes.laid_out(g), out, passes.x, passes.trained_norm, gamma, drop, tensors, needed, *given
        )
        grads: list[Tensor | None] = [None] * len(parameters)
        for at, grad in zip((*self.slots[0], *self.slots[1]), all_found[5:], strict=True):
            if at is not None:
                grads[at] = grad  # autograd gives it the parameter's type
        return all_found[:5], grads
