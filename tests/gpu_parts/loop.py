"""The package's own training on a GPU: mixed precision, killed and resumed, and under DDP and FSDP2."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from . import Place

__all__ = ["loop", "processes"]

ROOT = Path(__file__).resolve().parents[2]
# As on the box: what it lacks is not found here either. (See ABSENT of gpu_day.py.)
BARE = "import sys; sys.modules.update(dict.fromkeys({absent!r})); sys.argv[0] = 'timm-cbam2'; "
COMMAND = BARE + "from timm_cbam2.cli import main; main()"
FSDP = ROOT / "timm_cbam2" / "training" / "recipes" / "accelerate" / "fsdp_8.yaml"


def _environment(place: Place) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place.scratch / "cache")}


def _finetune(place: Place, folder: Path, *more: str) -> list[str]:
    words = ["finetune", "--model", "resnet20_cbam2", "--no-pretrained", "--epochs", "2", "--workers", "0"]
    if place.quick:
        words += ["--data", _few(place), "--img-size", "8", "--batch-size", "16", "--save-every", "1 step"]
    else:
        words += ["--data", "digits", "--img-size", "32", "--batch-size", "64", "--save-every", "5 steps"]
    words += ["--output", str(folder), "--resume", "auto"]
    words += ["--mixed-precision", "bf16"] if place.cuda else ["--cpu", "--mixed-precision", "no"]
    return [*words, *more]


def _few(place: Place) -> str:
    """A folder of 40 digits, of two classes."""
    folder = place.scratch / "few"
    for name, digit in (("zero", 0), ("one", 1)):
        if not (folder / name).exists():
            found = load_digits()
            (folder / name).mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(found.target == digit)[:20]):
                Image.fromarray((found.images[index] * 15).astype(np.uint8)).save(folder / name / f"{number}.png")
    return str(folder)


def _command(words: list[str]) -> list[str]:
    absent = [name for name, module in sys.modules.items() if module is None and "." not in name]
    return [sys.executable, "-c", COMMAND.format(absent=absent), *words]


def _run(place: Place, command: list[str], **environment: str) -> None:
    done = subprocess.run(command, env={**_environment(place), **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1500:]}")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def _apart(one: Path, other: Path) -> dict[str, Any]:
    """How far two runs' last weights are from each other."""
    a, b = _weights(one), _weights(other)
    far = max((a[key].double() - b[key].double()).abs().max().item() for key in a if a[key].is_floating_point())
    return {"bit_identical": all(torch.equal(a[key], b[key]) for key in a), "largest_difference": far}


def loop(place: Place) -> None:
    base = place.scratch
    whole, again, killed = (base / name for name in ("whole", "again", "killed"))
    start = time.monotonic()
    _run(place, _command(_finetune(place, whole)))
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    place.say(
        what="finetune",
        seconds=round(time.monotonic() - start, 1),
        images_per_second=row["images_per_second"],
        accuracy=row["val_accuracy"],
        device=json.loads((whole / "run.json").read_text())["device"],
        ok=json.loads((whole / "run.json").read_text())["device"].startswith(place.device),
    )
    child = subprocess.Popen(_command(_finetune(place, killed)), env=_environment(place), stdout=subprocess.DEVNULL)
    while not (steps := sorted((killed / "checkpoints").glob("step-*"))) or int(steps[-1].name[5:]) < (
        2 if place.quick else 10
    ):
        if child.poll() is not None:
            raise RuntimeError(f"ended before it could be killed, exit code {child.returncode}")
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    _run(place, _command(_finetune(place, killed)))
    if not place.quick:
        _run(place, _command(_finetune(place, again)))
        place.say(what="the same command twice", **_apart(whole, again))
    found = _apart(whole, killed)
    # On a CPU it is promised; on a GPU some of cuDNN's sums come in another order each time.
    place.say(what="killed and resumed", **found, **({} if place.cuda else {"ok": found["bit_identical"]}))


def processes(place: Place) -> None:
    """One process on the one GPU there is, through the code for many; on a CPU two."""
    base = place.scratch
    count = "1" if place.cuda else "2"
    module = ["-m", "timm_cbam2.finetune"]
    plain = base / "plain"
    if not place.quick:
        _run(place, _command(_finetune(place, plain)))
    half = [*_finetune(place, base / "ddp")[1:]]
    if not place.cuda:  # so that a step is of as many images
        size = half.index("--batch-size") + 1
        half[size] = str(int(half[size]) // 2)
    on_cpu = {} if place.cuda else {"ACCELERATE_USE_CPU": "true"}
    with place.going_on(what="DDP"):
        start = time.monotonic()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", count, "--standalone"]
        _run(place, [*torchrun, *module, *half], **on_cpu)
        _said(place, "DDP", base / "ddp", plain, start)
    if not place.cuda:
        place.say(what="FSDP2", skipped="on CPUs it is among the tests of training")
        return
    start = time.monotonic()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FSDP), "--num_processes", "1"]
    _run(place, [*launch, *module, *_finetune(place, base / "fsdp")[1:]])
    _said(place, "FSDP2", base / "fsdp", plain, start)


def _said(place: Place, what: str, folder: Path, plain: Path, start: float) -> None:
    run = json.loads((folder / "run.json").read_text())
    place.say(
        what=what,
        seconds=round(time.monotonic() - start, 1),
        distributed_type=run["distributed_type"],
        processes=run["processes"],
        ok=run["distributed_type"] != "NO",
        from_one_process=_apart(plain, folder) if plain.exists() else None,
        accuracy=json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["val_accuracy"],
    )
