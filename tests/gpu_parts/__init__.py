"""The parts of gpu_day.py, and what each is given."""

from __future__ import annotations

import importlib
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

__all__ = ["PARTS", "Part", "Place"]


@dataclass
class Place:
    """Where a part runs, and where its results go."""

    device: str
    quick: bool
    data: Path | None
    out: Path
    earlier: list[dict[str, Any]]  # rows of calls before this one
    part: str = ""
    ends: float = 0.0  # of time.monotonic()
    scratch: Path = Path()  # a folder that goes with the part
    wrong: int = 0  # rows that are not ok
    write: Callable[[dict[str, Any]], None] = print

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until this part is killed."""
        return self.ends - time.monotonic()

    def say(self, **row: Any) -> None:
        """Write a row of results."""
        self.wrong += row.get("ok") is False
        self.write(row)

    @contextmanager
    def going_on(self, **row: Any) -> Iterator[None]:
        """What fails inside is a row that is not ok, and the part goes on."""
        try:
            yield
        except Exception:
            self.say(**row, ok=False, error=traceback.format_exc()[-2000:])

    def check(self, error: float, bound: float, **row: Any) -> None:
        """Write a row with `error`, and whether it is within `bound`; NaN never is."""
        self.say(**row, error=error, bound=bound, ok=error <= bound)


@dataclass(frozen=True)
class Part:
    """A function of a `Place`, named "module.function", that returns None or why there was nothing to do."""

    about: str
    where: str
    seconds: int
    quick_seconds: int = 300  # of a rehearsal, perhaps on a busy machine; most take a few

    def load(self) -> Callable[[Place], str | None]:
        module, _, name = self.where.partition(".")
        return getattr(importlib.import_module(f"gpu_parts.{module}"), name)


PARTS = {
    "box": Part("what this machine is, and how fast it copies and multiplies", "speed.box", 60),
    "block": Part("the block against float64 on the CPU: dtypes, layouts, both passes", "correctness.block", 150),
    "networks": Part("whole networks against float64 on the CPU", "correctness.networks", 120),
    "guards": Part("fp16 at 1e4, determinism, no waiting for the device, CUDA graphs", "guards.guards", 90),
    "compiled": Part("torch.compile, default and max-autotune-no-cudagraphs", "guards.compiled", 150),
    "speed": Part("time and memory beside plain, SE, ECA and CBAM, in turn", "speed.speed", 330),
    "loop": Part("finetune with AMP; killed and resumed, how far off", "loop.loop", 150),
    "processes": Part("finetune under DDP and FSDP2", "loop.processes", 150),
    "ablation": Part("every variant of the ablation, eight seeds", "ablation.ablation", 560),
    "claims": Part("every variant of the bench of claims, eight seeds", "claims.claims", 560),
    "resnet20": Part("resnet20_cbam2 on CIFAR-10, as long as its limit allows", "long.resnet20", 540),
    "resnet56": Part("resnet56_cbam2 likewise", "long.resnet56", 540),
}
