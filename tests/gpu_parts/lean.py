"""Many small trainings at once on one GPU: a loop of its own, since launching kernels is what such networks cost.

Images stay on the GPU as bytes and are cropped and mirrored there; the networks of all seeds of a variant are trained
side by side, and on a GPU one CUDA graph holds the forward and backward passes of all of them, each on its own stream.
Optimizer, schedule, loss and what may be frozen are those of `timm-cbam2 finetune`, and so is the augmentation; order
and crops come from other random numbers, and the last, smaller batch of an epoch is left out. So results are equal to
those of finetune in distribution only: the part `ablation` says whether the accuracies agree within their intervals.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from timm_cbam2.training.optimise import freeze, keep_frozen, make_loss, make_optimizer, make_schedule

__all__ = ["Crops", "Fleet", "Pictures"]

WARM_UP = 3  # passes before a graph is captured
CHUNK = 5000  # images that are cropped at a time


@dataclass(frozen=True)
class Crops:
    """Pad by `pad` pixels in `mode` (see `torch.nn.functional.pad`), crop anywhere, mirror every second image."""

    pad: int
    mode: str = "reflect"
    mirror: bool = True


class Pictures:
    """Bytes (N, C, H, W) with labels (N,), and what they become: (x - mean) / std of bytes, by channel (C,)."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float]):
        self.images, self.labels = images, labels
        # On the device beforehand: a CUDA graph takes nothing from the CPU.
        self.mean, self.std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))

    def select(self, indices: Any) -> Pictures:
        mean, std = (v.flatten().tolist() for v in (self.mean, self.std))
        return Pictures(self.images[indices], self.labels[indices], mean, std)

    def input(self, images: Tensor) -> Tensor:
        """What a network is given for bytes (B, C, H, W)."""
        x = (images.float() - self.mean) / self.std
        return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


class Fleet:
    """Networks of one architecture that are trained alike, each by its seed.

    Args:
        networks: one for each seed, on the device of `train`.
        seeds: of order and crops.
        settings: all options of `finetune`, checked.
        train: images to train on.
        crops: how they are augmented, None for not at all.
    """

    def __init__(
        self,
        networks: list[nn.Module],
        seeds: list[int],
        settings: dict[str, Any],
        train: Pictures,
        crops: Crops | None,
    ):
        self.networks, self.seeds, self.settings, self.train, self.crops = networks, seeds, settings, train, crops
        self.device, self.cuda = train.images.device, train.images.is_cuda
        self.batch = min(settings["batch_size"], len(train.labels))
        self.steps = len(train.labels) // self.batch
        for network in networks:
            freeze(network, settings["train"])
        fused = {"opt_kwargs": {**settings["opt_kwargs"], "fused": True}} if settings["opt"] in ("adamw", "sgd") else {}
        self.optimizers = [make_optimizer(network, {**settings, **fused}) for network in networks]
        self.schedules = [make_schedule(optimizer, settings, self.steps) for optimizer in self.optimizers]
        self.criterion, _ = make_loss(settings, 1)
        self.x = [torch.zeros_like(train.images[: self.batch]) for _ in networks]
        self.y = [torch.zeros_like(train.labels[: self.batch]) for _ in networks]
        self.padded = train.images
        if crops is not None:
            pad = (crops.pad,) * 4
            self.padded = torch.cat(
                [nn.functional.pad(p.float(), pad, mode=crops.mode).byte() for p in train.images.split(1000)]
            )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.updates = 0

    def _generator(self, seed: int, epoch: int) -> torch.Generator:
        word = np.random.SeedSequence((seed, epoch)).generate_state(1)[0]
        return torch.Generator(self.device).manual_seed(int(word))

    def _augmented(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """The bytes (B, C, H, W) of the images `chosen` (B,), cropped and mirrored."""
        if self.crops is None:
            return self.train.images[chosen]
        height, width = self.train.images.shape[-2:]
        draw: Callable[..., Tensor] = lambda high: torch.randint(  # noqa: E731
            0, high, (len(chosen), 1), device=self.device, generator=generator
        )
        rows = draw(2 * self.crops.pad + 1) + torch.arange(height, device=self.device)  # (B, H)
        columns = draw(2 * self.crops.pad + 1) + torch.arange(width, device=self.device)
        if self.crops.mirror:
            columns = torch.where(draw(2) == 1, columns.flip(1), columns)
        return self.padded.permute(0, 2, 3, 1)[chosen[:, None, None], rows[:, :, None], columns[:, None]].permute(
            0, 3, 1, 2
        )

    def _pass(self, i: int) -> None:
        """Forward and backward of network `i` on the batch in its place."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["mixed_precision"] == "bf16"):
            logits = self.networks[i](self.train.input(self.x[i]))
        self.criterion(logits.float(), self.y[i]).backward()

    def _capture(self) -> None:
        """One graph of all passes; what they changed meanwhile is put back."""
        states = [{k: v.clone() for k, v in network.state_dict().items()} for network in self.networks]
        streams = [torch.cuda.Stream() for _ in self.networks]

        def side_by_side() -> None:
            current = torch.cuda.current_stream()
            for i, stream in enumerate(streams):
                stream.wait_stream(current)
                with torch.cuda.stream(stream):
                    self._pass(i)
            for stream in streams:
                current.wait_stream(stream)

        for _ in range(WARM_UP):
            side_by_side()
        torch.cuda.synchronize()
        self._forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            side_by_side()
        for network, state in zip(self.networks, states):
            network.load_state_dict(state)
        self.graph = graph

    def _forget(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def epoch(self, number: int) -> None:
        """Train all networks for an epoch, counted from 0."""
        for network in self.networks:
            network.train()
            keep_frozen(network)
        generators = [self._generator(seed, number) for seed in self.seeds]
        orders = [torch.randperm(len(self.train.labels), device=self.device, generator=g) for g in generators]
        # An epoch's crops at once: a step then launches two copies for a network.
        images = [
            torch.cat([self._augmented(part, generator) for part in order.split(CHUNK)])
            for order, generator in zip(orders, generators)
        ]
        labels = [self.train.labels[order] for order in orders]
        if self.cuda and self.graph is None:
            self._capture()
        for step in range(self.steps):
            batch = slice(step * self.batch, (step + 1) * self.batch)
            for i in range(len(self.networks)):
                self.x[i].copy_(images[i][batch])
                self.y[i].copy_(labels[i][batch])
            if self.graph is not None:
                self.graph.replay()  # writes the gradients anew
            else:
                self._forget()
                for i in range(len(self.networks)):
                    self._pass(i)
            for optimizer, schedule in zip(self.optimizers, self.schedules):
                schedule.step_update(self.updates)
                optimizer.step()
            self.updates += 1

    def train_all(self, left: Callable[[], float] = lambda: float("inf")) -> float | None:
        """Every epoch that the settings ask for; the seconds it took, None if `left()` said that it will not fit."""
        start = time.monotonic()
        for number in range(self.settings["epochs"]):
            self.epoch(number)
            if self.cuda:
                torch.cuda.synchronize()
            each = (time.monotonic() - start) / (number + 1)
            if each * (self.settings["epochs"] - number - 1) > left():
                return None
        return time.monotonic() - start

    @torch.no_grad()
    def accuracies(self, val: Pictures) -> list[float]:
        """Share of `val` that each network gets right."""
        found = []
        for network in self.networks:
            network.eval()
            hits = 0
            for images, labels in zip(val.images.split(1000), val.labels.split(1000)):
                half = self.settings["mixed_precision"] == "bf16"
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    hits += (network(val.input(images)).argmax(1) == labels).sum()
            found.append(int(hits) / len(val.labels))
        return found
