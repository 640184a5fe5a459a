"""Reading a run back: numbers that agree with the run's own, pictures, names, and mistakes in one line."""

import json

import pytest
import timm
from PIL import Image

import timm_cbam2  # noqa: F401
from timm_cbam2.hub.folder import save


def test_evaluate_reproduces_the_run(run, small_run):
    folder, data = small_run
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    for model, extra in ((folder, ()), (folder / "best", ()), (folder, ("--data", data))):
        result = run("evaluate", model, *extra)
        assert result.code == 0 and result.err == "", result
        numbers = json.loads((folder / "evaluate-images-val" / "evaluation.json").read_text())
        assert (numbers["top1"], numbers["loss"]) == (best["val_accuracy"], best["val_loss"])
    assert f"top-1 {100 * best['val_accuracy']:.2f} %" in result.out and "top-3 100.00 %" in result.out
    low, high = numbers["top1_interval"]
    assert low < numbers["top1"] < high or numbers["top1"] in (0, 1)
    assert f"{100 * low:.2f} to {100 * high:.2f} %" in result.out
    assert f"macro F1 {100 * numbers['macro_f1']:.2f} %" in result.out
    assert f"(ECE) {100 * numbers['calibration']['ece']:.2f} %" in result.out
    assert sum(b["images"] for b in numbers["calibration"]["bins"]) == numbers["images"]
    assert Image.open(folder / "evaluate-images-val" / "reliability.png").size[0] > 300
    assert "<h2>Calibration</h2>" in (folder / "report.html").read_text()
    matrix = numbers["confusion"]
    assert sum(map(sum, matrix)) == numbers["images"] == best["val_images"]
    assert sum(matrix[i][i] for i in range(3)) / numbers["images"] == numbers["top1"]
    for index, (name, row) in enumerate(numbers["per_class"].items()):
        assert row["accuracy"] == matrix[index][index] / row["images"] and name == f"digit{index}"
    assert Image.open(folder / "evaluate-images-val" / "confusion.png").size[0] > 300


def test_evaluate_on_other_images(run, small_run, write_folder, tmp_path):
    """Classes are matched by name: a subset in another folder, all of it, into a folder of choice."""
    other = write_folder(tmp_path / "other", classes=(2, 0), count=7, start=30)
    result = run("evaluate", small_run[0] / "last", "--data", other, "--output", tmp_path / "out")
    assert result.code == 0, result
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert numbers["split"] == "all" and numbers["images"] == 14
    assert [sum(row) for row in numbers["confusion"]] == [7, 0, 7]
    held = ("--val-split", "last:5", "--output", tmp_path / "held")
    assert run("evaluate", small_run[0] / "last", "--data", other, *held).code == 0
    numbers = json.loads((tmp_path / "held" / "evaluation.json").read_text())
    assert numbers["split"] == "val" and [sum(row) for row in numbers["confusion"]] == [0, 0, 5]


def test_evaluate_mistakes(refused, small_run, write_folder, tmp_path):
    folder, data = small_run
    refused("evaluate", tmp_path / "none", words=(tmp_path / "none", "no such run"))
    refused("evaluate", tmp_path, words=(tmp_path, "neither a run"))
    refused("evaluate", folder / "best" / "config.json", words=("config.json", "no such run"))
    refused("evaluate", "resnet20_cbam3", words=("resnet20_cbam3", "did you mean", "resnet20_cbam2"))
    refused("evaluate", folder, "--split", "test", words=("--split test", "train, val"))
    refused("evaluate", folder, "--labels", tmp_path / "none.csv", words=("--labels", "none.csv", "cannot be read"))
    refused("evaluate", folder, "--multi-label", words=("--multi-label", "one for each image"))
    others = write_folder(tmp_path / "others", classes=(7, 8))
    refused("evaluate", folder, "--data", others, words=("labels do not match", "digit0", "digit7"))
    some = write_folder(tmp_path / "some", classes=(1, 9))
    refused("evaluate", folder, "--data", some, words=("labels do not match", "digit9"))
    save(timm.create_model("resnet20_cbam2", num_classes=5), tmp_path / "nameless")
    refused("evaluate", tmp_path / "nameless", words=("not a run", "--data"))
    refused("evaluate", tmp_path / "nameless", "--data", data, words=("labels do not match", "5", "3"))
    refused("evaluate", "resnet32_cbam2", "--data", data, words=("no pretrained weights", "finetune"))
    refused("evaluate", "resnet18_cbam2", "--data", data, words=("resnet18_cbam2",))  # offline, nothing cached


def test_a_damaged_model_is_refused(refused, small_run, tmp_path):
    weights = (small_run[0] / "best" / "model.safetensors").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_bytes((small_run[0] / "best" / "config.json").read_bytes())
    refused("predict", tmp_path / "cut", "x.png", words=("cannot load", "cut"))
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("predict", tmp_path / "cut", "x.png", words=("cannot load", "cut"))


def test_predict(run, refused, small_run, truncate, tmp_path):
    folder, data = small_run
    images = sorted(data.glob("*/*.png"))[:2]
    result = run("predict", folder, *images, "--top-k", "2")
    assert result.code == 0 and result.err == "", result
    lines = result.out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(image) for image in images]
    assert all(line.count("digit") >= 2 and line.count(" %") == 2 for line in lines)

    refused("predict", folder, tmp_path, words=(tmp_path, "has no images"))
    bad = truncate(tmp_path / "bad.jpg")
    result = run("predict", folder, tmp_path, images[0], tmp_path / "none.png")
    assert result.code == 2 and len(result.err.splitlines()) == 1, result
    assert all(str(name) in result.err for name in (bad, tmp_path / "none.png", "1 more"))
    assert result.out.splitlines() == [result.out.strip()] and str(images[0]) in result.out  # the good one is answered


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_features_are_no_answer(refused, small_run, command, tmp_path):
    save(timm.create_model("resnet20_cbam2", num_classes=0), tmp_path / "model")
    image = next(small_run[1].glob("*/*.png"))
    refused(command, tmp_path / "model", image, words=("has no classifier",), cwd=tmp_path)
    refused(command, "m" * 300, image, words=("unknown model mmm",), cwd=tmp_path)


@pytest.mark.parametrize("name", ["best", "last"])
def test_predict_takes_a_model_folder(run, small_run, name):
    folder, data = small_run
    result = run("predict", f"local-dir:{folder / name}", next(data.glob("*/*.png")))
    assert result.code == 0 and "digit" in result.out, result
