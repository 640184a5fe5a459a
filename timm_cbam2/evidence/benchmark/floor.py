"""How far attention is from what memory allows: bytes it must move over measured bandwidth, for every layer shape.

Let n be the bytes of the block's input x (B, C, H, W); masks and squeezes are small beside it and left out.

`least` is what no code can do without: inference reads x and writes the result, 2n. A training step does so, and its
backward reads x and the gradient and writes another, 3n: 5n in all. It needs a cache that holds what is read until it
is read again, at least a whole sample, since the channel mask depends on all of it.

`passes` is what it takes without such a cache, where each step that depends on all of a sample reads it anew.
SE reads x for its squeeze, reads x and writes the result, 3n; its backward reads x and the gradient g for the mask's
gradient, then reads g and writes the gradient of x, 4n: 7n in all. CBAM2 reads x for the first squeeze, again for the
maps over channels, which depend on the channel mask, and again to write the result, 4n; its backward reads x and g for
the spatial mask's gradient, again for the channel mask's, then reads g and writes the gradient of x, 6n (with the
places of the maxima kept): 10n in all.

Blocks are timed alone, on random numbers, fp32 or in the dtype that autocast would hand them, in turn; gradients
included, so that a training step is a forward and a backward pass of the block.
"""

from __future__ import annotations

from statistics import median
from typing import Any, Callable

import timm
import torch
from timm.layers import create_attn
from torch import Tensor, nn

from ...kernels.cpu import cpu_kernel
from ...models.cbam2 import Cbam2
from .networks import DTYPES, Setup, randomise
from .timing import bandwidth, time_in_turn

__all__ = ["floor", "floor_table", "layer_shapes"]

LEAST = {"inference": 2, "training": 5}
PASSES = {"inference": {"se": 3, "cbam2": 4}, "training": {"se": 7, "cbam2": 10}}
LABELS = {"se": "SE", "cbam2": "CBAM2", "cbam2_kernel": "CBAM2, CPU kernel"}


def layer_shapes(model: str, img_size: int) -> dict[tuple[int, int, int], int]:
    """How many CBAM2 blocks of `model` have an input of each shape (C, H, W)."""
    network = timm.create_model(model).to("meta").eval()
    found: dict[tuple[int, int, int], int] = {}

    def see(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        shape = tuple(args[0].shape[1:])
        found[shape] = found.get(shape, 0) + 1

    for module in network.modules():
        if isinstance(module, Cbam2):
            module.register_forward_pre_hook(see)
    with torch.no_grad():
        network(torch.empty(1, network.pretrained_cfg["input_size"][0], img_size, img_size, device="meta"))
    return found


def _step(block: nn.Module, x: Tensor, training: bool) -> Callable[[], Any]:
    if not training:

        def inference() -> Tensor:
            with torch.no_grad():
                return block(x)

        return inference

    leaf = x.detach().requires_grad_()
    g = torch.randn_like(x)

    def train() -> None:
        leaf.grad = None
        block.zero_grad(set_to_none=True)
        block(leaf).backward(g)

    return train


def floor(
    setup: Setup, kinds: list[str], rounds: int, kernel: bool = False, tick: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Time SE and CBAM2 alone on every layer shape of the setup's model, beside the two floors above.

    Args:
        setup: model, batch, size, dtype and device.
        kinds: of "inference" and "training".
        rounds: that are counted.
        kernel: also CBAM2 by its compiled CPU kernel.
        tick: called after each round.

    Returns:
        {"bandwidth": {"copy", "fresh"} in bytes per second, "rows": one per shape}; a row has `shape` (B, C, H, W),
        `blocks`, `bytes` of the input, and by kind and layer the median `seconds` and the floors `least` and `passes`
        in seconds.
    """
    speed = bandwidth(setup.device)
    dtype = DTYPES[setup.dtype] or torch.float32
    rows = []
    for (channels, height, width), blocks in layer_shapes(setup.model, setup.img_size).items():
        torch.manual_seed(setup.seed)
        layers = {"se": create_attn("se", channels), "cbam2": Cbam2(channels, gate="unit_sigmoid")}
        if kernel:
            layers["cbam2_kernel"] = layers["cbam2"]
        x = torch.randn(setup.batch_size, channels, height, width, device=setup.device)
        x = x.to(dtype, memory_format=torch.channels_last)
        row: dict[str, Any] = {"shape": list(x.shape), "blocks": blocks, "bytes": x.numel() * x.element_size()}
        for layer in layers.values():
            randomise(layer.to(setup.device))
        for kind in kinds:
            steps = {
                name: _within(_step(layer, x, kind == "training"), setup.device, dtype, name == "cbam2_kernel")
                for name, layer in layers.items()
            }
            times = time_in_turn(steps, rounds, setup.device, tick)
            row[kind] = {
                name: {
                    "seconds": median(times[name]),
                    "least": LEAST[kind] * row["bytes"] / speed["copy"],
                    "passes": PASSES[kind][name.removesuffix("_kernel")] * row["bytes"] / speed["copy"],
                }
                for name in layers
            }
        rows.append(row)
    return {"bandwidth": speed, "rows": rows}


def _within(step: Callable[[], Any], device: str, dtype: torch.dtype, kernel: bool) -> Callable[[], Any]:
    def run() -> Any:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32), cpu_kernel(kernel):
            return step()

    return run


def floor_table(found: dict[str, Any], kind: str) -> list[list[str]]:
    """A head, a line per layer shape and the sum over all blocks: milliseconds, and times over the two floors."""
    head = ["input of the block", "blocks", "MB"]
    names = [name for name in LABELS if name in found["rows"][0][kind]]
    for name in names:
        head += [f"{LABELS[name]}, ms", "× least", "× passes"]
    lines = []
    total = {name: dict.fromkeys(("seconds", "least", "passes"), 0.0) for name in names}
    for row in found["rows"]:
        line = [" x ".join(map(str, row["shape"])), str(row["blocks"]), f"{row['bytes'] / 2**20:.1f}"]
        for name in names:
            line += _cells(row[kind][name])
            for key, value in row[kind][name].items():
                total[name][key] += row["blocks"] * value
        lines.append(line)
    blocks = sum(row["blocks"] for row in found["rows"])
    lines.append(["all blocks", str(blocks), "", *(cell for name in names for cell in _cells(total[name]))])
    return [head, *lines]


def _cells(values: dict[str, float]) -> list[str]:
    seconds = values["seconds"]
    return [f"{1e3 * seconds:.2f}", f"{seconds / values['least']:.2f}", f"{seconds / values['passes']:.2f}"]
