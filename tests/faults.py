"""Faults tried on real runs, and what happened, as the table of the README: `python tests/faults.py`."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "timm_cbam2.cli", "finetune", "--epochs", "2", "--img-size", "8", "--workers", "0"]
COMMAND += ["--save-every", "5 steps", "--accumulate", "2", "--model-kwargs", "drop_path_rate=0.1", "--no-pretrained"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def begin(folder, *more, command=COMMAND, wrap=()):
    words = [*wrap, *command, "--output", folder, *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([str(word) for word in words], env=ENVIRONMENT, start_new_session=True, **pipes)


def finished(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def checkpoints(folder):
    return sorted((folder / "checkpoints").glob("step-*"))


def wait_for(folder, count, process):
    """Wait until that many steps are saved."""
    while not checkpoints(folder) or int(checkpoints(folder)[-1].name[5:]) < count:
        assert process.poll() is None, finished(process)
        time.sleep(0.01)


def killed(folder, *more, steps=20):
    """A run that ended by SIGKILL in the middle of an epoch."""
    process = begin(folder, *more)
    wait_for(folder, steps, process)
    os.killpg(process.pid, signal.SIGKILL)
    finished(process)


def end_of(folder):
    """What must be equal, bit by bit, in two runs: the model and the numbers."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["images_per_second"]
    return (folder / "last" / "model.safetensors").read_bytes(), rows


def goes_on(folder, whole):
    """In words: whether a run, resumed, ends as one that nothing interrupted."""
    code, out, err = finished(begin(folder, "--resume", "auto"))
    if code:
        return f"cannot go on: {err.strip()}"
    same = end_of(folder) == end_of(whole)
    return "resumed, ended bit-identical" if same else "RESUMED, BUT ENDED DIFFERENTLY"


def short(text, folder):
    """The first line of a message, without the names of this machine's folders."""
    line = text.strip().splitlines()[-1].removeprefix("timm-cbam2: ").replace(f"{folder}", "RUN")
    line = re.sub(r"/\S*/", "", line)
    return line if len(line) < 150 else line[:147] + "…"


def faults(base):
    """Yield (fault, what happened)."""
    whole = base / "whole"
    assert finished(begin(whole))[0] == 0

    killed(base / "kill")
    yield "SIGKILL in the middle of an epoch", goes_on(base / "kill", whole)

    process = begin(base / "term")
    wait_for(base / "term", 10, process)
    process.terminate()
    code, _, err = finished(process)
    yield "SIGTERM (preemption)", f"saved, exit code {code}; {goes_on(base / 'term', whole)}"

    for name, fault in (
        ("half", "newest checkpoint cut in half"),
        ("flip", "one bit of the newest checkpoint flipped"),
    ):
        killed(base / name)
        file = checkpoints(base / name)[-1] / "model.safetensors"
        content = bytearray(file.read_bytes())
        if name == "flip":
            content[len(content) // 2] ^= 1
        file.write_bytes(content if name == "flip" else content[: len(content) // 2])
        outcome = goes_on(base / name, whole)
        aside = [path.name for path in (base / name / "checkpoints").glob("damaged-*")]
        yield fault, f"named, set aside as {aside[0]}, the one before used; {outcome}"

    killed(base / "full")
    limit = ["bash", "-c", 'ulimit -f 600; exec "$@"', "limited"]
    code, _, err = finished(begin(base / "full", "--resume", "auto", wrap=limit))
    yield (
        "no room for the next file (a limit on file sizes)",
        f"exit code {code}: {short(err, base / 'full')}; {goes_on(base / 'full', whole)}",
    )

    process = begin(base / "live", "--epochs", "1000")
    wait_for(base / "live", 5, process)
    code, _, err = finished(begin(base / "live", "--resume", "auto"))
    os.killpg(process.pid, signal.SIGKILL)
    finished(process)
    yield "a second run on the folder of a live one", f"exit code {code}: {short(err, base / 'live')}"

    process = begin(base / "rank", "--num-processes", "2")
    wait_for(base / "rank", 5, process)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    code, _, err = finished(process)
    yield "one of two processes dies", f"exit code {code}: {short(err, base / 'rank')}"

    code, _, err = finished(begin(base / "nan", "--opt", "sgd", "--lr", "1e30", "--sched", "none"))
    yield "the loss becomes NaN", f"exit code {code}: {short(err, base / 'nan')}"

    killed(base / "lr")
    code, _, err = finished(begin(base / "lr", "--resume", "auto", "--batch-size", "64"))
    yield "resumed with another batch size", f"exit code {code}: {short(err, base / 'lr')}"


def main():
    with tempfile.TemporaryDirectory() as base:
        print("| fault | what happened |\n| --- | --- |", flush=True)
        for fault, outcome in faults(Path(base)):
            print(f"| {fault} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
