"""The command for the day a GPU is there, rehearsed on the CPU: every part is done, and one that fails ends no other."""

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

import timm_cbam2

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
    variants = {row["variant"] for row in found if row["part"] == "speed" and row["training"]}
    assert variants >= {"plain", "se", "eca", "cbam", "cbam2"}
    ablation = [row for row in found if row.get("bench") == "ablation"]
    assert all(len(row["accuracies"]) == 2 for row in ablation) and {r["variant"] for r in ablation} > {
        "plain",
        "cbam2",
    }
    assert any(row.get("question") == "controls" and row["seeds"] == 2 for row in found)
    for name in ("resnet20_cbam2", "resnet56_cbam2"):
        folder = tmp_path / f"{name}.cifar10"
        model = timm_cbam2.hub.zoo.load(str(folder))  # opens as any model folder
        assert model.num_classes == 10 and load_file(folder / "model.safetensors").keys() == model.state_dict().keys()

    # Trainings that are known are not made again.
    again = gpu_day(
        "--data", parquet, "--out", tmp_path / "again", "--only", "ablation", "--done", tmp_path / "gpu_day.jsonl"
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert [row for row in rows(tmp_path / "again") if row.get("bench")] == []
    pairs = [[row for row in rows(folder) if "question" in row] for folder in (tmp_path, tmp_path / "again")]
    assert pairs[0] == pairs[1]


def test_a_part_that_fails_or_hangs_ends_no_other(tmp_path):
    """Three parts in place of the command's own."""
    script = tmp_path / "gpu_day.py"
    text = (ROOT / "tests" / "gpu_day.py").read_text()
    text = text.replace("HERE = Path(__file__).resolve().parent\n", f"HERE = Path({str(ROOT / 'tests')!r})\n")
    parts = (
        "def _hang(place):\n    place.say(begun=1)\n    import subprocess, sys\n"
        "    subprocess.run([sys.executable, '-c', f'import time; time.sleep(1); open({str(place.out / \"late\")!r}, "
        '"w")\\nwhile True: time.sleep(1)\'])\n\n\n'
        "class _Of(Part):\n    def load(self):\n        return globals()[self.where]\n\n\n"
        "def _broken(place):\n    raise ValueError('no such thing')\n\n\ndef _good(place):\n    place.say(value=7)\n\n\n"
        "GRACE = 1.0\nPARTS = {'broken': _Of('', '_broken', 9), 'hang': _Of('', '_hang', 9, 5), "
        "'good': _Of('', '_good', 9, 9)}\n\n\nif __name__"
    )
    script.write_text(text.replace("if __name__", parts))
    done = gpu_day("--out", tmp_path / "out", script=script)
    found = rows(tmp_path / "out")
    status = [(row["part"], row["status"].split(":")[0]) for row in found if "status" in row]
    assert status == [
        *(("broken", "failed"), ("hang", "killed after its 5 s"), ("good", "done")),
        ("all", "failed"),
    ], (found, done.stderr)
    assert "no such thing" in next(row["error"] for row in found if "error" in row)
    assert {"part": "good", "value": 7} in found and {"part": "hang", "begun": 1} in found
    assert done.returncode == 1
