"""What is known of one image: the answer, and what each block decided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models.cbam2 import CbamAttention

__all__ = ["BlockView", "Explanation"]


@dataclass(frozen=True)
class BlockView:
    """What one block decided for one image, and what it is made of."""

    name: str
    stage: str
    attention: CbamAttention  # of a batch of one
    branches: tuple[str, ...]  # what each router weight is for, such as "5x5"
    fusion: np.ndarray | None  # (2,) shares of average and maximum; None where they are added
    temperatures: tuple[float, float]  # of the channel and of the spatial gate
    neutral: float  # the mask value that changes nothing, or the middle of the gate's range

    @property
    def by_position(self) -> bool:
        """Whether the router decides at every position."""
        return self.attention.router_weights.dim() == 4

    @property
    def shares(self) -> np.ndarray:
        """(K,) what each branch weighs in this image, averaged over positions where the router decides at each."""
        weights = self.attention.router_weights[0].float().cpu().numpy()
        return weights.mean((1, 2)) if self.by_position else weights


@dataclass(frozen=True)
class Explanation:
    """One image as the model saw it, what the model answers, and what each of its blocks decided."""

    model: str
    pixels: np.ndarray  # (H, W, 3) in [0, 1], after the model's own resizing and cropping
    answers: list[tuple[str, float]]  # the five best classes and their probabilities
    blocks: list[BlockView]
    picture: np.ndarray | None = None  # the same cut of the image, (H', W', 3), nearer to the image's own resolution

    @property
    def shown(self) -> np.ndarray:
        """What masks are laid over."""
        return self.pixels if self.picture is None else self.picture

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, named `<block>/<field>`."""
        out = {"pixels": self.pixels, "probabilities": np.array([p for _, p in self.answers])}
        out["classes"] = np.array([name for name, _ in self.answers])
        for block in self.blocks:
            for field, value in block.attention._asdict().items():
                if value is not None:
                    out[f"{block.name}/{field}"] = value[0].float().cpu().numpy()
            out[f"{block.name}/temperatures"] = np.array(block.temperatures)
        return out
