"""Cross-validation: every image is validated on once, killed it goes on, and the folds are summed up."""

import json
import time

import numpy as np
import pytest
from scipy import stats

from timm_cbam2.data.sources import find_images, images_of_run
from timm_cbam2.errors import UserError


def test_folds_of_images(write_folder, tmp_path):
    folder = write_folder(tmp_path / "train", count=10)
    write_folder(tmp_path / "val", count=2, start=20)
    images = find_images(str(tmp_path))
    everything = sorted([*images.splits["train"].items, *images.splits["val"].items])
    folds = [images.with_val(f"fold:{k}/4") for k in range(1, 5)]
    assert sorted(name for fold in folds for name in fold.splits["val"].items) == everything
    for fold in folds:
        assert [fold.splits["val"].labels.count(c) for c in range(3)] == [3, 3, 3]
        assert sorted([*fold.splits["train"].items, *fold.splits["val"].items]) == everything
    assert folds[0].splits["val"].items == find_images(str(tmp_path)).with_val("fold:1/4").splits["val"].items
    for wrong, words in (("fold:5/4", "no such fold"), ("fold:1/99", "36 images, fewer than folds")):
        with pytest.raises(UserError, match=words):
            images.with_val(wrong)
    with pytest.raises(UserError, match="every class of train has fewer images"):
        find_images(str(folder)).with_val("fold:1/11")
    two = find_images("digits").with_val("fold:2/5")
    assert len(two.splits["train"]) + len(two.splits["val"]) == 1797


def test_cross_validation(start, run, refused, small_run, quick, tmp_path):
    """Killed in its second fold and gone on with; each fold is a run of its own."""
    folder = tmp_path / "cross"
    args = ("finetune", "--data", small_run[1], *quick, "--lr", "2e-3", "--folds", "3")
    running = start(*args, "--output", folder)
    while not (folder / "fold-2" / "metrics.jsonl").exists():
        assert running.alive, running.wait()
        time.sleep(0.01)
    running.kill()
    running.wait()
    before = (folder / "fold-1" / "metrics.jsonl").stat().st_mtime_ns
    refused(*args, "--output", folder, words=(folder, "already holds a cross-validation", "--resume auto"))
    result = run("finetune", "--resume", folder)
    assert result.code == 0 and result.err == "" and "fold 1 of 3" not in result.out, result
    assert (folder / "fold-1" / "metrics.jsonl").stat().st_mtime_ns == before

    found = json.loads((folder / "folds.json").read_text())
    scores, seen = [], []
    for number in (1, 2, 3):
        rows = [json.loads(line) for line in (folder / f"fold-{number}" / "metrics.jsonl").read_text().splitlines()]
        assert [row["epoch"] for row in rows] == [1, 2]
        scores.append(max(row["val_accuracy"] for row in rows))
        settings = json.loads((folder / f"fold-{number}" / "run.json").read_text())
        assert settings["val_split"] == f"fold:{number}/3"
        seen += images_of_run(settings).splits["val"].items
    assert sorted(seen) == sorted(str(path) for path in small_run[1].glob("*/*.png"))
    assert len(set(scores)) > 1
    low, high = stats.t.interval(0.95, 2, np.mean(scores), stats.sem(scores))
    assert found["scores"] == scores and found["mean"] == pytest.approx(np.mean(scores))
    assert found["interval"] == pytest.approx([low, high])
    said = f"accuracy {100 * np.mean(scores):.2f} ± {50 * (high - low):.2f} %"
    assert f"cross-validation: {said} (mean and 95 % interval over 3 folds" in result.out
    result = run("evaluate", folder / "fold-2")
    assert result.code == 0 and f"top-1 {100 * scores[1]:.2f} %" in result.out, result

    refused(*args, "--folds", "4", "--output", folder, "--resume", "auto", words=("--folds was 3 and is now 4",))
    refused(*args, "--output", small_run[0], words=("--output", "holds something already"))
    refused(*args, "--val-split", "0.3", "--output", tmp_path / "no", words=("--folds", "--val-split"))


def test_two_processes_in_turn(start_group, small_run, quick, tmp_path):
    """One after the other in the same processes, with a teacher, drawn classes, and a rate that the main one finds."""
    args = ("finetune", "--data", small_run[1], *quick, "--epochs", "1", "--batch-size", "4", "--folds", "2")
    args += ("--lr", "auto", "--distill-from", small_run[0], "--balance", "sampler", "--output", tmp_path / "run")
    for result in [p.wait() for p in start_group(2, *args)]:
        assert result.code == 0 and result.err == "", result
    found = json.loads((tmp_path / "run" / "folds.json").read_text())
    assert len(found["scores"]) == 2 and found["lr"] == "auto"
    for number in (1, 2):
        settings = json.loads((tmp_path / "run" / f"fold-{number}" / "run.json").read_text())
        assert settings["processes"] == 2 and 1e-6 < settings["lr"] < 1
