"""Is the attention alive? What routers and gates do on validation images, in numbers and, where they fail, in words."""

from __future__ import annotations

import math
from typing import Any, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.cbam2 import CbamAttention, is_cbam2, record_attention

__all__ = ["branch_names", "measure"]

NEAR = 0.02  # a mask value this near to its gate's ends, as a share of the range, passes hardly any gradient
RANGE = {"sigmoid": 1.0, "hard_sigmoid": 1.0, "unit_sigmoid": 2.0}
COLLAPSED, SATURATED = 0.05, 0.5  # entropy below, share above which there is a warning
UNIFORM = 0.9995, 0.002  # entropy above and spread below which there is one


@torch.no_grad()
def _temperature(part: nn.Module) -> float:
    """That of a gate. Where processes divide the model, one of them holds it, and torch 2.8 has no softplus of that."""
    own = part.temperature.state_dict()
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in own.items()}
    return round(torch.func.functional_call(part.temperature, whole, torch.float32).item(), 5)


def measure(network: nn.Module, images: Tensor) -> dict[str, Any] | None:
    """Numbers for every CBAM2 block of `network`, from one forward pass; it is left in the mode it was in.

    Args:
        network: any model, not wrapped for several processes.
        images: (B, C, H, W), normalised, on the model's device.

    Returns:
        {"blocks": {name: {...}}, "warnings": [text, ...]}, None for a model without CBAM2. Per block: `fusion` and
        `branches` are mean weights over the images, `…_spread` the largest standard deviation over them, `…_entropy`
        the entropy of an image's weights from 0 (one takes all) to 1 (all equal), `…_within` of routing by position
        the standard deviation over positions, `…_saturated` the share of mask values at an end of the gate's range,
        `…_dead` that of those at one for every image, `temperatures` those of the channel and the spatial gate.
    """
    modules = {name.replace("_orig_mod.", ""): m for name, m in network.named_modules() if is_cbam2(m)}
    if not modules:
        return None
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with record_attention(network) as records:
            network(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    blocks = {name: _block(modules[name], seen) for name, seen in records.items()}
    return {"blocks": blocks, "warnings": [text for name, block in blocks.items() for text in _warnings(name, block)]}


def branch_names(block: nn.Module) -> list[str]:
    """What each router weight is for, such as "5x5".

    A reparameterized block has one stored convolution in place of its branches: there they are told by which taps of
    their kernel are not zero, and one whose kernel is all zeros is "branch 2", say.
    """
    merged = getattr(block.spatial, "conv", None)
    if merged is not None:
        return [_kernel_name(kernel, f"branch {i}") for i, kernel in enumerate(merged.weight.detach(), 1)]
    return [_branch_name(branch.dw.kernel_size[0], branch.dilation) for branch in block.spatial.branches]


def _branch_name(side: int, dilation: int) -> str:
    return f"{side}x{side}" + (f" dilated {dilation}" if dilation > 1 else "")


def _kernel_name(kernel: Tensor, otherwise: str) -> str:
    """The name of the branch that a kernel (S, f, f) was, padded and with zeros between dilated taps."""
    rows = kernel.any(0).any(1).nonzero().flatten().tolist()
    if not rows:
        return otherwise
    return _branch_name(len(rows), rows[1] - rows[0] if len(rows) > 1 else 1)


def _block(block: nn.Module, seen: CbamAttention) -> dict[str, Any]:
    fusion: dict[str, Any] = {"fusion": None, "fusion_spread": None, "fusion_entropy": None}
    weights = seen.fusion_weights
    if weights is None and block.channel.fusion_logits is not None:
        weights = block.channel.fusion_logits.softmax(0)[None]
    if weights is not None:
        fusion = _weights("fusion", weights)
    return {
        **fusion,
        **_weights("branches", seen.router_weights),
        "branch_names": branch_names(block),
        **_saturated("channel", seen.channel_mask, block.channel.gate),
        **_saturated("spatial", seen.spatial_mask, block.spatial.gate),
        "temperatures": [_temperature(part) for part in (block.channel, block.spatial)],
    }


def _weights(name: str, weights: Tensor) -> dict[str, Any]:
    """Mean, spread over images and entropy of weights (B, K), or (B, K, H, W), that sum to 1 over K."""
    weights = weights.double().cpu()
    count = weights.shape[1]
    within = {}
    if weights.dim() == 4:
        within = {f"{name}_within": round(weights.flatten(2).std(2, correction=0).mean(0).max().item(), 5)}
    entropy = -torch.special.xlogy(weights, weights).sum(1).mean().item() / math.log(count) if count > 1 else 1.0
    weights = weights.flatten(2).mean(2) if weights.dim() == 4 else weights
    return {
        **within,
        name: [round(value, 5) for value in weights.mean(0).tolist()],
        f"{name}_spread": round(weights.std(0, correction=0).max().item(), 5),
        f"{name}_entropy": round(min(max(entropy, 0.0), 1.0), 5),
    }


def _saturated(name: str, mask: Tensor, gate: str) -> dict[str, float]:
    """The share of mask values at an end of the gate, and of those elements that are at one for every image."""
    share = mask.float() / RANGE[gate]
    low, high = share < NEAR, share > 1 - NEAR
    return {
        f"{name}_saturated": round((low | high).float().mean().item(), 5),
        f"{name}_dead": round((low.all(0) | high.all(0)).float().mean().item(), 5),
    }


def _warnings(name: str, block: dict[str, Any]) -> Sequence[str]:
    texts = []
    for key, what, names in (
        ("fusion", "squeeze", ["average", "maximum"]),
        ("branches", "branch", block["branch_names"]),
    ):
        means = block[key]
        if means is None or len(means) < 2:
            continue
        if block[f"{key}_entropy"] < COLLAPSED:
            top = max(range(len(means)), key=means.__getitem__)
            if means[top] > 0.95:
                texts.append(
                    f"{name}: the {what} '{names[top]}' takes {100 * means[top]:.0f} % for every image (collapse)"
                )
        elif block[f"{key}_entropy"] > UNIFORM[0] and block[f"{key}_spread"] < UNIFORM[1]:
            texts.append(f"{name}: every {what} weighs the same for every image, its router decides nothing (uniform)")
    for what in ("channel", "spatial"):
        share = block[f"{what}_dead"]
        if share > SATURATED:
            texts.append(
                f"{name}: {100 * share:.0f} % of the {what} mask is at an end of its gate for every image (saturated)"
            )
    for value, what in zip(block["temperatures"], ("channel", "spatial")):
        if not 0.1 < value < 10:
            texts.append(f"{name}: the {what} temperature is {value:.3g}, far from where it began")
    return texts
