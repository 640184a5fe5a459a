"""What a trained network's decisions are worth and where its masks look, over validation images."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.tasks import Samples
from ...models.cbam2 import is_cbam2, record_attention
from ...seeing.health import NEAR, RANGE
from ..ablation.masks import averaged
from .training import predict, to_input

__all__ = ["grad_cam_share", "inside_minus_outside", "measure", "mutual_information", "pointing"]

BATCH = 250
STILL = 0.02  # standard deviation between images, as a share of the gate's range, below which a decision is the same
LEADS = 0.95  # a mean weight above this: one choice takes all


@torch.no_grad()
def _record(network: nn.Module, images: Tensor) -> dict[str, dict[str, Tensor]]:
    """Every decision of every block over all images: for each block by name the parts that it has."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    with record_attention(network) as records:
        for part in images.split(BATCH):
            network(to_input(part))
            for name, record in records.items():
                block = found.setdefault(name, {})
                kinds = {
                    "channel": record.channel_mask,
                    "spatial": record.spatial_mask,
                    "fusion": record.fusion_weights,
                    "branches": record.router_weights,
                }
                for kind, value in kinds.items():
                    if value is not None:
                        block.setdefault(kind, []).append(value.float())
    return {name: {kind: torch.cat(values) for kind, values in block.items()} for name, block in found.items()}


@contextmanager
def _fixed_weights(network: nn.Module, means: dict[str, dict[str, Tensor]], kind: str) -> Iterator[None]:
    """Meanwhile routers answer with their mean over the data."""
    part = {"fusion": "channel", "branches": "spatial"}[kind]
    with ExitStack() as stack:
        for name, block in network.named_modules():
            if is_cbam2(block) and kind in means.get(name, {}):
                mean, router = means[name][kind], getattr(block, part).router
                handle = router.register_forward_hook(lambda module, args, w, m=mean: m.expand_as(w).to(w.dtype))
                stack.callback(handle.remove)
        yield


@contextmanager
def _fixed(network: nn.Module, means: dict[str, dict[str, Tensor]], kind: str) -> Iterator[None]:
    with averaged(network, means, (kind,)) if kind in ("channel", "spatial") else _fixed_weights(network, means, kind):
        yield


def worth(network: nn.Module, images: Tensor, labels: Tensor, seen: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Points of accuracy lost when one kind of decision is replaced by its mean over the images, everywhere at once."""
    right = (predict(network, images) == labels).double().mean().item()
    means = {n: {kind: value.mean(0, keepdim=True) for kind, value in block.items()} for n, block in seen.items()}
    lost = {}
    for kind in {kind for block in seen.values() for kind in block}:
        with _fixed(network, means, kind):
            lost[kind] = 100 * (right - (predict(network, images) == labels).double().mean().item())
    return lost


def _spread(values: Tensor) -> float:
    """Standard deviation between images: root mean square over elements for masks."""
    return values.double().var(0, correction=0).mean().sqrt().item()


def liveness(block: nn.Module, kind: str, values: Tensor) -> dict[str, Any]:
    """How much decisions (N, …) differ between images, and whether they are dead."""
    spread = _spread(values)
    if kind in ("channel", "spatial"):
        top, bound = RANGE[getattr(block, kind).gate], getattr(block, "bound", 0.0)
        low = top / (1 + np.exp(bound)) if bound else 0.0  # a bounded gate has nearer ends
        share = (values - low) / (top - 2 * low)
        away = (share < NEAR) | (share > 1 - NEAR)
        still = share.double().std(0, correction=0) < STILL
        ends = away.double().mean(0)
        dead = ((ends > 0.99) & still).double().mean().item()
        return {"spread": spread, "saturated": ends.mean().item(), "dead": dead, "mean": values.mean().item()}
    means = values.double().mean([0, *range(2, values.dim())])
    between = values.double().flatten(2).mean(2) if values.dim() > 2 else values.double()
    largest = between.std(0, correction=0).max().item()
    return {
        "spread": largest,
        "within": values.double().flatten(2).std(2, correction=0).mean().item() if values.dim() > 2 else 0.0,
        "mean": means.tolist(),
        "dead": float(means.max().item() > LEADS and largest < STILL),
    }


def _inside(boxes: np.ndarray, size: tuple[int, int], side: int) -> Tensor:
    """The share of each cell of a map that lies in the box, (N, H, W)."""

    def cover(first: np.ndarray, last: np.ndarray, count: int) -> Tensor:
        edges = np.arange(count + 1) * side / count
        low, high = np.maximum(edges[:-1], first[:, None]), np.minimum(edges[1:], last[:, None])
        return torch.from_numpy(np.clip(high - low, 0, None) * count / side)

    rows, columns = cover(boxes[:, 0], boxes[:, 2], size[0]), cover(boxes[:, 1], boxes[:, 3], size[1])
    return rows[:, :, None] * columns[:, None]


def inside_minus_outside(masks: Tensor, samples: Samples) -> tuple[float, float]:
    """The mean over images of the mask (N, H, W) in the box less that elsewhere; and what the mean mask alone gives."""
    inside = _inside(samples.boxes, masks.shape[1:], samples.images.shape[-1])

    def contrast(m: Tensor) -> float:
        within = (m * inside).sum((1, 2)) / inside.sum((1, 2))
        outside = (m * (1 - inside)).sum((1, 2)) / (1 - inside).sum((1, 2))
        return (within - outside).mean().item()

    masks = masks.double()
    return contrast(masks), contrast(masks.mean(0, keepdim=True).expand_as(masks))


def pointing(maps: Tensor, samples: Samples) -> float:
    """The share of images whose strongest position of the map (N, H, W) has its middle in the box.

    Where several are equally strong, as in a gate at its end, it is the share of those: the first would tell of order.
    """
    count, height, width = maps.shape
    flat = maps.flatten(1)
    strongest = (flat == flat.amax(1, keepdim=True)).double().numpy()  # (N, H·W)
    side = samples.images.shape[-1]
    where = np.arange(height * width)
    y, x = (where // width + 0.5) * side / height, (where % width + 0.5) * side / width
    top, left, bottom, right = (edge[:, None] for edge in samples.boxes.T)
    inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)
    return float(((strongest * inside).sum(1) / strongest.sum(1)).mean())


def box_share(samples: Samples) -> float:
    """The boxes' share of the picture: what pointing anywhere would give."""
    top, left, bottom, right = samples.boxes.T
    return float(((bottom - top) * (right - left)).mean() / samples.images.shape[-1] ** 2)


def grad_cam_share(network: nn.Module, images: Tensor, samples: Samples) -> tuple[float, float]:
    """Grad-CAM of the class the network gives, at the last stage: share of images that it points in the box, and the
    inside less outside of maps scaled to a maximum of 2, to be compared with a mask's range."""
    kept: list[Tensor] = []
    if hasattr(network, "stages"):
        stage = network.stages[-1]
    else:
        stage = [s for s in (network.layer1, network.layer2, network.layer3, network.layer4) if len(s)][-1]
    handle = stage.register_forward_hook(lambda module, args, output: kept.append(output))
    maps = []
    try:
        for part in images.split(BATCH):
            kept.clear()
            logits = network(to_input(part))
            (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), kept[0])
            maps.append(F.relu((gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1)).detach())
    finally:
        handle.remove()
    cam = torch.cat(maps)
    scaled = 2 * cam / cam.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return pointing(cam, samples), inside_minus_outside(scaled, samples)[0]


def mutual_information(weights: Tensor, factors: np.ndarray, seed: int = 0, rounds: int = 200) -> dict[str, float]:
    """Bits that weights (N, K) tell about a factor (N,), and the 95 % point of the same with factors shuffled.

    The weight that differs most between images is cut into eight parts of equal number.
    """
    column = weights[:, weights.double().var(0).argmax()].numpy()
    cuts = np.quantile(column, np.linspace(0, 1, 9)[1:-1])
    cell = np.searchsorted(cuts, column)

    def bits(f: np.ndarray) -> float:
        joint = np.zeros((8, int(f.max()) + 1))
        np.add.at(joint, (cell, f), 1)
        joint /= joint.sum()
        outer = joint.sum(1, keepdims=True) * joint.sum(0)
        filled = joint > 0
        return float((joint[filled] * np.log2(joint[filled] / outer[filled])).sum())

    random = np.random.default_rng(seed)
    null = [bits(random.permutation(factors)) for _ in range(rounds)]
    return {"bits": bits(factors), "null": float(np.quantile(null, 0.95))}


def measure(network: nn.Module, samples: Samples) -> dict[str, Any]:
    """All that a result holds beside its accuracy: see the functions of this module."""
    network.eval()
    images, labels = torch.from_numpy(samples.images), torch.from_numpy(samples.labels)
    found: dict[str, Any] = {}
    if samples.boxes is not None:
        share, contrast = grad_cam_share(network, images, samples)
        found |= {"box": box_share(samples), "grad_cam": {"pointing": share, "inside": contrast}}
    blocks = {name: module for name, module in network.named_modules() if is_cbam2(module)}
    if not blocks:
        return found
    seen = _record(network, images)
    found["worth"] = worth(network, images, labels, seen)
    found["blocks"] = {}
    for name, decisions in seen.items():
        row: dict[str, Any] = {kind: liveness(blocks[name], kind, values) for kind, values in decisions.items()}
        if samples.boxes is not None:
            masks = decisions["spatial"][:, 0]
            row["spatial"]["inside"], row["spatial"]["inside_of_mean"] = inside_minus_outside(masks, samples)
            row["spatial"]["pointing"] = pointing(masks, samples)
        for kind in ("fusion", "branches"):
            if kind in decisions and samples.factors.max() > 0:
                weights = decisions[kind]
                row[kind]["information"] = mutual_information(
                    weights.flatten(2).mean(2) if weights.dim() > 2 else weights, samples.factors
                )
        found["blocks"][name] = row
    return found
