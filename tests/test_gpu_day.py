"""The command for the day a GPU is there, rehearsed: every part is done, and one that fails ends no other."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from timm_cbam2.hub.zoo import load

ROOT = Path(__file__).resolve().parent.parent


def gpu_day(*arguments, script=ROOT / "tests" / "gpu_day.py"):
    words = [sys.executable, script, "--device", "cpu", "--quick", *arguments]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run([*map(str, words)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


def rows(folder):
    return [json.loads(line) for line in (folder / "gpu_day.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """60 images as in CIFAR-10's file, a grey level for each class, read by pyarrow alone."""
    table, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def jpeg(label):
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), 25 * label, np.uint8)).save(file, "JPEG")
        return {"bytes": file.getvalue(), "path": None}

    labels = [number % 10 for number in range(60)]
    path = tmp_path_factory.mktemp("gpu") / "train.parquet"
    parquet.write_table(table.table({"image": [jpeg(label) for label in labels], "label": labels}), path)
    return path


def test_every_part_on_the_cpu(parquet, tmp_path):
    done = gpu_day("--data", parquet, "--out", tmp_path, "--budget", "1500")
    found = rows(tmp_path)
    status = {row["part"]: row["status"] for row in found if "status" in row}
    listed = subprocess.run([sys.executable, ROOT / "tests" / "gpu_day.py", "--list"], capture_output=True, text=True)
    parts = [line.split()[0] for line in listed.stdout.splitlines()]
    assert [*status] == [*parts, "all"] and status["all"] == "done", (status, done.stderr[-3000:])
    assert done.returncode == 0
    wrong = [row for row in found if row.get("ok") is False]
    assert not wrong
    checked = {row["part"] for row in found if row.get("ok")}
    assert checked >= {"block", "networks", "guards", "compiled", "loop", "processes"}
    killed = next(row for row in found if row.get("what") == "killed and resumed")
    assert killed["bit_identical"] and killed["largest_difference"] == 0
    variants = {row["variant"] for row in found if row["part"] == "speed" and row.get("training")}
    assert variants >= {"plain", "se", "eca", "cbam", "cbam2"}
    ablation = [row for row in found if row.get("bench") == "ablation"]
    assert all(len(row["accuracies"]) == 2 for row in ablation) and {r["variant"] for r in ablation} > {
        "plain",
        "cbam2",
    }
    assert any(row.get("question") == "controls" and row["seeds"] == 2 for row in found)
    claims = [json.loads(line) for line in (tmp_path / "claims.jsonl").read_text().splitlines()]
    assert [row["start"] for row in claims] == [1, 0] and all("worth" in row for row in claims)
    for name in ("resnet20_cbam2", "resnet56_cbam2"):
        folder = tmp_path / f"{name}.cifar10"
        model = load(str(folder))  # opens as any model folder
        assert model.num_classes == 10 and load_file(folder / "model.safetensors").keys() == model.state_dict().keys()

    # Trainings that are known are not made again.
    known = ("--only", "ablation", "--done", tmp_path / "gpu_day.jsonl")
    again = gpu_day("--data", parquet, "--out", tmp_path / "again", *known)
    assert again.returncode == 0, again.stderr[-3000:]
    assert [row for row in rows(tmp_path / "again") if row.get("bench")] == []
    pairs = [[row for row in rows(folder) if "question" in row] for folder in (tmp_path, tmp_path / "again")]
    assert pairs[0] == pairs[1]


OTHER_PARTS = """
import subprocess, sys, types
import gpu_day, gpu_parts

def broken(place):
    raise ValueError("no such thing")

def hang(place):
    child = subprocess.Popen(["sleep", "1000"])
    place.say(started=child.pid)
    child.wait()

sys.modules["gpu_parts.own"] = types.SimpleNamespace(broken=broken, hang=hang, good=lambda place: place.say(value=7))
gpu_day.GRACE = 1.0
gpu_day.PARTS = {name: gpu_parts.Part("", f"own.{name}", 60, seconds) for name, seconds in
                 {"broken": 60, "hang": 5, "good": 60}.items()}
sys.exit(gpu_day.main())
"""


def test_a_part_that_fails_or_hangs_ends_no_other(tmp_path):
    """Nothing that a killed part started lives on."""
    (tmp_path / "other.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n{OTHER_PARTS}")
    done = gpu_day("--out", tmp_path / "out", script=tmp_path / "other.py")
    found = rows(tmp_path / "out")
    status = [(row["part"], row["status"]) for row in found if "status" in row]
    assert status == [
        *(("broken", "failed"), ("hang", "killed after its 5 s"), ("good", "done"), ("all", "failed: broken, hang")),
    ], (found, done.stderr)
    assert "no such thing" in next(row["error"] for row in found if "error" in row)
    assert {"part": "good", "value": 7} in found and done.returncode == 1
    child = next(row["started"] for row in found if "started" in row)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
