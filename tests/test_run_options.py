"""Options whose effect is seen in what a run says and writes: early stopping, the cheap mode, senseless numbers."""

import importlib.util
import json
import math

import pytest
import timm

import timm_cbam2  # noqa: F401
from timm_cbam2.errors import UserError
from timm_cbam2.finetune import finetune
from timm_cbam2.optimise import freeze


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


def test_attention_only_says_what_it_trains(run, small_run, quick, tmp_path):
    args = ("finetune", "--data", small_run[1], *quick, "--pretrained", "--train", "attention", "--epochs", "1")
    result = run(*args, "--output", tmp_path / "run")
    assert result.code == 0, result
    network = timm.create_model("resnet20_cbam2", num_classes=3)
    everything = sum(p.numel() for p in network.parameters())
    trained = freeze(network, "attention")
    text = f"attention: {trained:,} of {everything:,} parameters trained, {100 * trained / everything:.1f} %"
    begun, ended = [line for line in result.out.splitlines() if text in line]
    assert (
        begun.startswith("resnet20_cbam2: ")
        and ended == f"{text}; {rows(tmp_path / 'run')[-1]['images_per_second']:.0f} images/s"
    )


def test_senseless_numbers(refused):
    refused("finetune", "--ema", "1", words=("--ema 1 makes no sense", "0.999"))
    for name, value in (("layer_decay", 0.0), ("layer_decay", 7.0), ("clip_grad", 0.0), ("weight_decay", math.inf)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value:g} makes no sense: give"):
            finetune(**{name: value})
    with pytest.raises(UserError, match="--bce-target-threshold is a threshold of --bce"):
        finetune(bce_target_threshold=0.2)


def test_a_tracker_that_is_not_installed(refused):
    missing = next(name for name in ("aim", "swanlab", "clearml", "comet_ml") if importlib.util.find_spec(name) is None)
    refused("finetune", "--track", missing, words=(f"pip install {missing}",))
