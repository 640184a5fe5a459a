"""Time and memory, measured so that they can be compared: in turn in one process, or each in a fresh one."""

from __future__ import annotations

import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import timm
import torch

from ...errors import UserError, one_line
from .networks import VARIANTS, Setup, Variant, build, make_step

__all__ = ["bandwidth", "machine", "peak_memory", "quartiles", "time_in_turn"]

WARM_UP = 2  # rounds that are not counted; the first compiles what is to be compiled
MEMORY_STEPS = 3  # after the first, memory is reused
COPY_BYTES = 2**28  # far beyond any cache


def time_in_turn(
    steps: Mapping[str, Callable[[], Any]], rounds: int, device: str, tick: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every step in every round.

    Each round runs each step once. Every second round reverses the order of the one before, and the next is rotated
    by one, so that no step is always first or always follows the same other: what the machine does meanwhile meets
    all alike, and times of one round can be compared in pairs.

    Args:
        steps: what to time, by name.
        rounds: that are counted.
        device: "cuda" is timed by events on the stream.
        tick: called after each round.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    clock = _cuda_seconds if device == "cuda" else _seconds
    gc.collect()
    gc.disable()
    try:
        for number in range(-WARM_UP, rounds):
            first = number // 2 % len(names)
            order = names[first:] + names[:first]
            for name in order if number % 2 == 0 else reversed(order):
                seconds = clock(steps[name])
                if number >= 0:
                    times[name].append(seconds)
            tick()
    finally:
        gc.enable()
    return times


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _cuda_seconds(step: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def bandwidth(device: str) -> dict[str, float]:
    """Bytes per second that a large copy reads and writes: into memory in use, and into memory just asked for.

    The second is what a result in a fresh tensor meets: on a CPU the system has to find and clear its pages first.
    """
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    times = time_in_turn({"copy": lambda: target.copy_(source), "fresh": lambda: source.clone()}, 8, device)
    return {name: 2 * COPY_BYTES / min(seconds) for name, seconds in times.items()}


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on and with."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    if hasattr(os, "getloadavg"):
        found["load_before"] = round(os.getloadavg()[0], 2)
    if device == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def peak_memory(setup: Setup, variant: Variant, training: bool) -> float:
    """The most memory, in MB (2**20 bytes), that a fresh process holds which does only this: on a CPU all of its
    resident memory, Python and torch included, on a GPU what torch has allocated there.

    Raises:
        UserError: the process failed.
    """
    job = json.dumps({"setup": setup.as_dict(), "variant": variant.key, "training": training})
    command = [sys.executable, "-W", "ignore", "-m", "timm_cbam2.evidence.benchmark.timing", job]
    # The current folder may not be where the package is.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        kind = "training" if training else "inference"
        raise UserError(f"the memory of {variant.label}, {kind}, cannot be measured: {one_line(reason[0], 300)}")
    return json.loads(done.stdout.splitlines()[-1])


def _resident_peak() -> float:
    """Peak resident memory of this process in MB.

    Linux hands `ru_maxrss` on from parent to child, through fork and exec alike; VmHWM begins anew with each program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)[1]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _measure_memory(job: dict[str, Any]) -> float:
    import timm_cbam2  # noqa: F401  (registers the models)

    setup, variant = Setup(**job["setup"]), VARIANTS[job["variant"]]
    torch.set_num_threads(setup.threads)
    step = make_step(setup, variant, build(setup, variant), job["training"])
    for _ in range(MEMORY_STEPS):
        step()
    if setup.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident_peak()


if __name__ == "__main__":
    print(json.dumps(_measure_memory(json.loads(sys.argv[1]))))
