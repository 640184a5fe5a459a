"""The wheel holds all it needs: installed into a fresh environment it runs the main job from another folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from warm import make_bare_python

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.file_size for info in archive.infolist())
    assert {name.split("/")[0] for name in names} == {"timm_cbam2", "timm_cbam2-0.1.0.dist-info"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "timm_cbam2").rglob("*.py")}
    assert modules <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for tag in ("cifar10", "cifar10_v2", "clutter"):
        assert f"timm_cbam2/checkpoints/resnet20_cbam2.{tag}/model.safetensors" in names
    assert "timm_cbam2/evidence/claims/README.md" in names and "timm_cbam2/evidence/claims/results.jsonl" not in names
    assert size < 5e6 + 1e6  # the models may take 5 MB


def test_it_runs_the_main_job_elsewhere(wheel, run, tmp_path):
    python = make_bare_python(tmp_path / "bare")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))

    def call(*command):
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = "import importlib.util as u; found = u.find_spec('timm_cbam2'); print(found and found.origin)"
    assert call(python, "-c", where).strip() == "None"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert str(python.parent.parent) in call(python, "-c", where)
    command = python.parent / "timm-cbam2"

    out = call(command, "finetune")  # the main job, as the README has it
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("resnet20_cbam2-digits-")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(row["val_accuracy"] for row in rows)
    assert best >= 0.97
    assert [row["epoch"] for row in rows] == list(range(1, 7)) and rows[0]["val_images"] == 359
    assert f"best validation accuracy {100 * best:.2f} %" in out
    assert f"timm-cbam2 evaluate {folder.relative_to(tmp_path)}" in out
    settings = json.loads((folder / "run.json").read_text())
    assert settings["lr"] == 5e-4 and settings["pretrained"] and settings["augment"] == "light"
    assert settings["classes"] == list("0123456789")
    assert Image.open(folder / "curves.png").size[0] > 800 and (folder / "report.html").is_file()

    table = subprocess.run(
        [python, "-m", "timm_cbam2.evidence.claims", "table"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert table.returncode == 2 and "repository" in table.stderr and "Traceback" not in table.stderr

    evaluated = run("evaluate", folder, cwd=tmp_path)
    assert f"{100 * best:.2f} %" in evaluated.out, evaluated
    result = json.loads((folder / "evaluate-digits-val" / "evaluation.json").read_text())
    assert result["top1"] == best
    assert result["loss"] == min(row["val_loss"] for row in rows if row["val_accuracy"] == best)
