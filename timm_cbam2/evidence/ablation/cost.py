"""What spatial branches cost: depthwise then pointwise, as stored and folded, against full k×k convolutions."""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Callable, Optional

import torch
import typer
from torch import Tensor, nn

from ...errors import UserError
from ...models.cbam2 import SpatialAttn
from ...models.small_cbam2 import spatial_mask, spatial_weights

__all__ = ["cost", "measure"]

MAPS = 4  # average, maximum and two coordinates
KERNELS = ((3, 1), (5, 1), (7, 1), (3, 3))  # size and dilation of the registered models' branches


class _Branches(nn.Module):
    """Branches one after the other, each from the four maps to one channel."""

    def __init__(self, make: Callable[[int, int], nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(make(k, d) for k, d in KERNELS)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat([branch(maps) for branch in self.branches], 1)  # (B, K, H, W)


def _conv(out: int, k: int, d: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(MAPS, out, k, padding=d * (k - 1) // 2, dilation=d, groups=groups, bias=False)


def _pointwise() -> nn.Conv2d:
    return nn.Conv2d(MAPS, 1, 1, bias=False)


class _Folded(nn.Module):
    """All branches as one dense convolution, the coordinate half once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        attention = SpatialAttn(kernel_sizes=[k for k, d in KERNELS if d == 1], dilated=KERNELS[-1])
        self.branches, self.footprint = attention.branches, attention.footprint

    def forward(self, maps: Tensor) -> Tensor:
        kernel = torch.stack([branch.kernel(self.footprint, maps.dtype) for branch in self.branches])
        seen, grid = maps[:, :2], maps[:1, 2:]  # the coordinates are the same for every image
        convolve, pad = nn.functional.conv2d, self.footprint // 2
        return convolve(seen, kernel[:, :2], padding=pad) + convolve(grid, kernel[:, 2:], padding=pad)


class _InTheBlock(nn.Module):
    """As the block runs them on a CPU: a router mixes the kernels of each image, one convolution, then the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SpatialAttn(kernel_sizes=[k for k, d in KERNELS if d == 1], dilated=KERNELS[-1])

    def forward(self, maps: Tensor) -> Tensor:
        weights = spatial_weights(self.attention, *maps.shape[2:], maps.dtype)
        return spatial_mask(self.attention, weights, maps[:, :2].contiguous())  # (B, H, W)


def _kinds() -> dict[str, nn.Module]:
    return {
        "depthwise, then pointwise to 1 (as stored)": _Branches(
            lambda k, d: nn.Sequential(_conv(MAPS, k, d, groups=MAPS), _pointwise())
        ),
        "the same, folded into one dense convolution": _Folded(),
        "the same in the block, with its router and gate": _InTheBlock(),
        "full k×k to 1": _Branches(lambda k, d: _conv(1, k, d)),
        "full k×k to 4, then pointwise to 1": _Branches(lambda k, d: nn.Sequential(_conv(MAPS, k, d), _pointwise())),
    }


def _macs(kind: nn.Module, side: int) -> int:
    """Multiply-accumulates per image."""
    if isinstance(kind, _Folded):  # the coordinate half is done once per batch, the kernels are made once per batch
        return len(KERNELS) * 2 * kind.footprint**2 * side * side
    if isinstance(kind, _InTheBlock):  # mixing the kernels and the coordinate half, then convolving
        taps, choices = kind.attention.footprint**2, len(KERNELS)
        router = sum(p.numel() for n, p in kind.attention.router.named_parameters() if n.endswith("weight"))
        return router + choices * (2 * taps + side * side) + 2 * taps * side * side
    return sum(p.numel() for p in kind.parameters()) * side * side


def measure(batch: int, side: int, repeat: int) -> list[dict[str, Any]]:
    """Parameters, MACs per image, and median seconds forward and forward + backward, for each way of computing.

    The ways take turns within each repetition, so that whatever else the machine does falls on all of them alike.
    """
    kinds = _kinds()
    maps = torch.randn(batch, MAPS, side, side, requires_grad=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for number in range(repeat + 2):
        for name, kind in kinds.items():
            start = time.perf_counter()
            out = kind(maps)
            middle = time.perf_counter()
            out.sum().backward()
            if number >= 2:  # the first two warm up
                times[name].append((middle - start, time.perf_counter() - start))
    return [
        {
            "kind": name,
            "parameters": sum(p.numel() for p in kind.parameters()),
            "macs": _macs(kind, side),
            "forward": median(t for t, _ in times[name]),
            "step": median(t for _, t in times[name]),
        }
        for name, kind in kinds.items()
    ]


def cost(
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    side: Annotated[int, typer.Option(min=1, help="Height and width of the maps.")] = 32,
    repeat: Annotated[int, typer.Option(min=1, help="Timed repetitions.")] = 30,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Also write every number, as JSON.")] = None,
) -> None:
    """Measure what the spatial branches cost against full k×k convolutions, as a Markdown table.

    Raises:
        UserError: the output cannot be written.
    """
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    print(f"branches 3x3, 5x5, 7x7 and 3x3 dilated 3, from 4 maps; {batch_size} x {side} x {side}, fp32, {threads}\n")
    print("| branches | parameters | MACs per image | forward, ms | forward + backward, ms |")
    print("| --- | ---: | ---: | ---: | ---: |")
    rows = measure(batch_size, side, repeat)
    for row in rows:
        print(
            f"| {row['kind']} | {row['parameters']} | {row['macs']:,} | {1e3 * row['forward']:.2f} "
            f"| {1e3 * row['step']:.2f} |"
        )
    if output is not None:
        setup = {"batch_size": batch_size, "side": side, "repeat": repeat, "threads": torch.get_num_threads()}
        setup |= {"dtype": "fp32", "torch": torch.__version__, "rows": rows}
        try:
            output.write_text(json.dumps(setup, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
