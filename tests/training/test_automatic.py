"""What a run finds by itself: the same every time, leaving no trace in the training, remembered when it goes on."""

import json
import math

import pytest
import torch

from timm_cbam2.errors import UserError
from timm_cbam2.training.batch_size import largest
from timm_cbam2.training.range_test import find_lr


def weights(folder):
    return (folder / "last" / "model.safetensors").read_bytes()


def test_learning_rate_and_batch_size(run, refused, small_run, quick, tmp_path):
    data = small_run[1]
    args = ("finetune", "--data", data, *quick, "--no-pretrained", "--drop-path", "0.1", "--output")
    result = run(*args, tmp_path / "auto", "--lr", "auto", "--batch-size", "auto", "--epochs", "1")
    assert result.code == 0 and result.err == "", result
    found = json.loads((tmp_path / "auto" / "auto.json").read_text())
    settings = json.loads((tmp_path / "auto" / "run.json").read_text())
    lr, size = found["lr"]["chosen"], found["batch_size"]["chosen"]
    assert (settings["lr"], settings["batch_size"]) == (lr, size) and size == 8
    assert f"--lr auto: {lr:g}, a tenth of" in result.out and "--batch-size auto: 8 (" in result.out
    lowest = found["lr"]["lrs"][found["lr"]["losses"].index(min(found["lr"]["losses"]))]
    assert lr == pytest.approx(lowest / 10, rel=0.05) and 1e-6 < lr < 1
    assert "--lr auto chose" in (tmp_path / "auto" / "report.html").read_text()

    # Neither the test's weights nor its random numbers are left in the run.
    given = ("--lr", lr, "--batch-size", size)
    assert run(*args, tmp_path / "given", *given, "--epochs", "1").code == 0
    assert weights(tmp_path / "auto") == weights(tmp_path / "given")
    assert not (tmp_path / "given" / "auto.json").exists()
    more = ("--lr", "auto", "--batch-size", "auto", "--resume", "auto", "--epochs", "2")
    result = run(*args, tmp_path / "auto", *more)
    assert result.code == 0 and "going on from" in result.out and "lr auto:" not in result.out, result
    assert json.loads((tmp_path / "auto" / "run.json").read_text())["lr"] == lr
    assert json.loads((tmp_path / "auto" / "auto.json").read_text()) == found

    for option, value in (("--lr", "some"), ("--batch-size", "2.5")):
        refused(*args, tmp_path / "no", option, value, words=(option, value, "neither a number nor auto"))
    refused(*args, tmp_path / "no", "--lr", "auto", "--streaming", words=("--lr auto", "--streaming"))
    refused(*args, tmp_path / "no", "--opt", "sgd", words=("--lr auto",))
    refused(*args, tmp_path / "no", "--batch-size", "1", words=("--batch-size 1", "at least 2"))


def test_a_tenth_of_the_best_rate():
    lrs = [10 ** (-6 + step / 10) for step in range(70)]
    losses = [2 + abs(math.log10(lr) + 2) for lr in lrs]  # lowest at 1e-2
    assert find_lr(lrs, losses) == pytest.approx(1e-3)
    for flat in ([2.0] * 70, list(range(1, 71))):
        with pytest.raises(UserError, match="the loss falls with no learning rate"):
            find_lr(lrs, flat)


def test_the_largest_batch_that_fits():
    tried = []

    def trial(batch_size):
        tried.append(batch_size)
        if batch_size > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert largest(trial, 512) == 64 and tried == [512, 256, 128, 64]

    def never(batch_size):
        raise RuntimeError("CUDA out of memory.")

    assert largest(never, 16) == 0

    def broken(batch_size):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        largest(broken, 16)
