"""Everything there is to learn from a GPU that is lent for half an hour, in one command.

    python tests/gpu_day.py --data train.parquet --out RESULTS [--only PART…]
    python tests/gpu_day.py --device cpu --quick --out RESULTS        the rehearsal, on any machine

Each part (`--list`) is a process of its own that ends at its limit; what it finds is a JSON line in
RESULTS/gpu_day.jsonl at once, so that nothing is lost with a part that fails or is too slow, and the next one begins.
It needs torch, timm, transformers, accelerate, torchvision, pyarrow, scikit-learn, matplotlib and, on a GPU, Triton: no
`datasets`, no network, no installation (it runs from the checkout). typer, which the commands need, comes with
transformers.
Trainings that a file of earlier results holds (`--done`, by default the committed ones) are not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Callable

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
# Parts are forks, and whoever asked the driver for its devices cannot be forked: ask the management library instead.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from gpu_parts import PARTS, Part, Place  # noqa: E402

MEASURED = HERE.parent / "timm_cbam2" / "evidence" / "measured" / "gpu_day.jsonl"
ABSENT = ("datasets", "torchdata", "gradio", "onnx", "onnxruntime", "trackio", "wandb")  # such boxes lack them
GRACE = 5.0  # seconds that a part which was told to stop has before it is killed


def write(place: Place, row: dict[str, Any]) -> None:
    """Add a line to the results, on disk when this returns, and show it."""
    line = json.dumps(row)
    with (place.out / "gpu_day.jsonl").open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line if len(line) < 400 else line[:399] + "…", flush=True)


def _child(place: Place, name: str, function: Callable[[Place], str | None], limit: float) -> None:
    """Run one part, in a session of its own, so that all it starts can be ended with it."""
    os.setsid()
    sys.modules.update(dict.fromkeys(ABSENT))  # also where they are installed: a rehearsal is of the box
    place.part, place.ends = name, time.monotonic() + limit
    place.write = lambda row: write(place, {"part": name, **row})
    try:
        skipped = function(place)
    except BaseException:
        write(place, {"part": name, "status": "failed", "error": traceback.format_exc()[-3000:]})
        raise SystemExit(1) from None
    if place.wrong:
        write(place, {"part": name, "status": f"{place.wrong} rows are not ok"})
        raise SystemExit(1)
    write(place, {"part": name, "status": f"skipped: {skipped}" if skipped else "done"})


def run_part(place: Place, name: str, part: Part, limit: float) -> bool:
    """Run one part for at most `limit` seconds; whether it was done."""
    start = time.monotonic()
    place.scratch = Path(tempfile.mkdtemp(prefix="gpu_day-"))
    # Nothing here has touched the GPU yet, so that a fork may: it spares each part the imports.
    child = multiprocessing.get_context("fork").Process(target=_child, args=(place, name, part.load(), limit))
    child.start()
    child.join(limit + GRACE)
    killed = child.exitcode is None
    if killed:
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
    shutil.rmtree(place.scratch, ignore_errors=True)
    row = {"part": name, "seconds": round(time.monotonic() - start, 1)}
    if killed or child.exitcode not in (0, 1):
        row["status"] = f"killed after its {limit:.0f} s" if killed else f"died with exit code {child.exitcode}"
    write(place, row)
    return child.exitcode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: see that everything works")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="these parts, in the order given")
    parser.add_argument("--list", action="store_true", help="say which parts there are")
    parser.add_argument("--data", type=Path, help="parquet of CIFAR-10; without it, made images stand in")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu_day_results"))
    parser.add_argument("--done", type=Path, nargs="*", default=[MEASURED], help="results of earlier calls")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all parts of this call")
    given = parser.parse_args()
    if given.list:
        for name, part in PARTS.items():
            print(f"{name:<12} {part.seconds:>4} s  {part.about}")
        return 0
    if given.data is not None and not given.data.is_file():
        parser.error(f"--data {given.data}: no such file")
    given.out.mkdir(parents=True, exist_ok=True)
    place = Place(given.device, given.quick, given.data, given.out.resolve(), _earlier(given.done))
    ends = time.monotonic() + given.budget
    failed = []
    for name in given.only or PARTS:
        part = PARTS[name]
        limit = min(part.quick_seconds if given.quick else part.seconds, ends - time.monotonic() - GRACE)
        if limit < 5:
            write(place, {"part": name, "status": f"not begun: the {given.budget:.0f} s of this call are over"})
            failed.append(name)
        elif not run_part(place, name, part, limit):
            failed.append(name)
    write(place, {"part": "all", "status": f"failed: {', '.join(failed)}" if failed else "done"})
    return 1 if failed else 0


def _earlier(files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines() if line]


if __name__ == "__main__":
    sys.exit(main())
