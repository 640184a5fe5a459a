"""Options whose effect is seen in what a run says and writes: early stopping, senseless numbers."""

import importlib.util
import json
import math

import pytest

from timm_cbam2.errors import UserError
from timm_cbam2.finetune import finetune


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_patience(run, small_run, tmp_path):
    """Without BatchNorm and with a learning rate of nothing no epoch is better than the first."""
    args = ("finetune", "--data", small_run[1], "--model", "test_convnext_cbam2", "--no-pretrained", "--img-size", "32")
    args += ("--workers", "0", "--opt", "sgd", "--lr", "1e-30", "--epochs", "9", "--output", tmp_path / "run")
    result = run(*args, "--patience", "2")
    assert result.code == 0 and "after epoch 1 of 3" in result.out, result
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    result = run("finetune", "--resume", tmp_path / "run")  # it stays stopped
    assert result.code == 0 and len(rows(tmp_path / "run")) == 3, result


def test_senseless_numbers(refused):
    refused("finetune", "--ema", "1", words=("--ema 1 makes no sense", "0.999"))
    for name, value in (("layer_decay", 0.0), ("layer_decay", 7.0), ("clip_grad", 0.0), ("weight_decay", math.inf)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value:g} makes no sense: give"):
            finetune(**{name: value})
    for name, value in (("epochs", 0), ("batch_size", 1), ("accumulate", 0), ("keep", 0), ("label_smoothing", 1.0)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value:g} makes no sense: give"):
            finetune(**{name: value})
    with pytest.raises(UserError, match="--bce-target-threshold is a threshold of --bce"):
        finetune(bce_target_threshold=0.2)


def test_a_tracker_that_is_not_installed(refused):
    missing = next(name for name in ("aim", "swanlab", "clearml", "comet_ml") if importlib.util.find_spec(name) is None)
    refused("finetune", "--track", missing, words=(f"pip install {missing}",))
