"""What the machine can do, and what each kind of attention costs on it: time and memory, in turn in one process."""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable

import torch

import timm_cbam2  # noqa: F401  (registers the models)
from timm_cbam2.evidence.benchmark.networks import Setup, build, make_step, variants_of
from timm_cbam2.evidence.benchmark.timing import bandwidth, machine, quartiles, time_in_turn

from . import Place

__all__ = ["box", "speed"]

EAGER = ("plain", "se", "eca", "cbam", "cbam2", "cbam2_triton")
COMPILED = ("plain_compiled", "se_compiled", "cbam2_compiled")


def box(place: Place) -> None:
    """Versions, and the two ceilings that times are compared with: bytes and multiply-adds a second."""
    found = machine(place.device)
    if place.cuda:
        found["memory_gb"] = round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1)
        found["copy_gb_per_second"] = {name: round(value / 1e9) for name, value in bandwidth(place.device).items()}
    side = 256 if place.quick else 8192
    a, b = (torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    times = time_in_turn({"product": lambda: a @ b}, 3 if place.quick else 20, place.device)["product"]
    found["bf16_tflops"] = round(2 * side**3 / statistics.median(times) / 1e12, 2)
    place.say(box=found)


def speed(place: Place) -> None:
    """Medians over rounds; one row a variant, as soon as a network in a precision is measured."""
    if place.quick:
        jobs = [("test_resnet_cbam2", "bf16", False), ("test_convnext_cbam2", "fp16", False)]
        size = dict(batch_size=2, img_size=32)
    else:
        models = ("resnet50_cbam2", "convnext_tiny_cbam2")
        jobs = [(model, dtype, False) for dtype in ("bf16", "fp16") for model in models]
        # Compiling takes a minute and more: what is eager comes first.
        jobs += [(model, "bf16", True) for model in models]
        size = dict(batch_size=256, img_size=224)
    for model, dtype, compiled in jobs:
        for training in (False, True):
            if place.left < 10:
                place.say(left=[model, dtype, "compiled" if compiled else "eager"])
                continue
            setup = Setup(model, dtype=dtype, device=place.device, **size)
            names = (*EAGER[:1], *COMPILED) if compiled else EAGER
            with place.going_on(**setup.as_dict(), training=training, variants=names):
                _measure(place, setup, training, names)


def _measure(place: Place, setup: Setup, training: bool, names: tuple[str, ...]) -> None:
    there = variants_of(setup, compiled=True)  # Triton's is not on a CPU, nor where it is refused
    chosen = [v for v in there if v.key in names]
    steps: dict[str, Callable[[], Any]] = {}
    memory: dict[str, float | None] = {}
    for variant in chosen:
        network = build(setup, variant)
        steps[variant.key] = make_step(setup, variant, network, training)
        memory[variant.key] = _memory(place, network, steps[variant.key])
    start = time.perf_counter()
    for step in steps.values():  # compiles, and says how long a round takes
        step()
    if place.cuda:
        torch.cuda.synchronize()
    each = time.perf_counter() - start
    rounds = 2 if place.quick else max(5, min(25, int(min(place.left / 4, 25) / max(each, 1e-3))))
    times = time_in_turn(steps, rounds, place.device)
    for variant in chosen:
        low, middle, high = quartiles(times[variant.key])
        ratio = statistics.median(a / b for a, b in zip(times[variant.key], times[variant.baseline]))
        place.say(
            **setup.as_dict(),
            training=training,
            variant=variant.key,
            seconds=middle,
            quartiles=[low, high],
            over_plain=round(ratio, 4),
            images_per_second=round(setup.batch_size / middle, 1),
            memory_mb=memory[variant.key],
            rounds=rounds,
        )


def _memory(place: Place, network: torch.nn.Module, step: Callable[[], Any]) -> float | None:
    """The most that a step needs on the GPU, the network included, in MB of 2**20 bytes."""
    if not place.cuda:
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    own = [*network.parameters(), *network.buffers(), *(p.grad for p in network.parameters() if p.grad is not None)]
    held = sum(tensor.numel() * tensor.element_size() for tensor in own)
    return round((torch.cuda.max_memory_allocated() - before + held) / 2**20, 1)
