"""Images with several labels, from a table to predictions: trained, measured, drawn, resumed, told apart."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

import timm_cbam2  # noqa: F401
from timm_cbam2.hub.zoo import load
from timm_cbam2.training.multi_label import MultiLabelLoss, MultiPredictions

OPTIONS = ("--model", "resnet20_cbam2", "--img-size", "16", "--batch-size", "16", "--workers", "0", "--no-pretrained")


@pytest.fixture(scope="module")
def pairs(digits, tmp_path_factory):
    """Two digits side by side, and a table that names both."""
    folder = tmp_path_factory.mktemp("pairs")
    pixels, labels = digits
    by_class = [pixels[labels == c] for c in range(3)]
    draw, lines = np.random.default_rng(0), ["file_name,labels"]
    for number in range(90):
        one, other = draw.integers(0, 3, 2)
        both = [by_class[c][draw.integers(len(by_class[c]))] for c in (one, other)]
        Image.fromarray(np.pad(np.hstack(both), ((4, 4), (0, 0)))).save(folder / f"{number:03}.png")
        lines.append(f"{number:03}.png," + "|".join(sorted({f"digit{one}", f"digit{other}"})))
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(run, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "run"
    result = run("finetune", "--data", pairs, "--multi-label", *OPTIONS, "--epochs", "8", "--output", folder)
    assert result.code == 0 and result.err == "", result
    return folder, result.out


def test_training(trained):
    folder, said = trained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["val_map"], -row["val_loss"]))
    assert f"best validation mean average precision {100 * best['val_map']:.2f} %" in said and "mAP" in said
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] and best["val_map"] > 0.6
    assert json.loads((folder / "run.json").read_text())["multi_label"] is True
    assert json.loads((folder / "best" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert load(str(folder)).multi_label and not load("resnet20_cbam2").multi_label
    report = (folder / "report.html").read_text()
    assert "mean average precision" in report and "<h2>Classes</h2>" in report and "Not measured" not in report
    assert "Mean average precision" in (folder / "best" / "README.md").read_text()
    assert not (folder / "confusion.png").exists() and (folder / "curves.png").exists()


def test_evaluate_and_predict(run, refused, trained, pairs, small_run, tmp_path):
    folder, _ = trained
    result = run("evaluate", folder, "--tta", "flip", "--output", tmp_path / "flip")
    assert result.code == 0, result
    result = run("evaluate", folder)
    assert result.code == 0 and result.err == "", result
    where = folder / f"evaluate-{pairs.name}-val"
    numbers = json.loads((where / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["val_map"], -row["val_loss"]))
    assert (numbers["map"], numbers["macro_f1"], numbers["exact"]) == tuple(
        best[key] for key in ("val_map", "val_f1", "val_accuracy")
    )
    assert numbers["loss"] == pytest.approx(best["val_loss"]) and numbers["map"] == pytest.approx(
        np.mean([row["average_precision"] for row in numbers["per_class"].values()])
    )
    assert (
        f"mean average precision {100 * numbers['map']:.2f} %" in result.out and "average precision per" in result.out
    )
    assert {p.name for p in where.iterdir()} == {"evaluation.json", "classes.png", "reliability.png"}

    image = pairs / "000.png"
    result = run("predict", folder, pairs, "--threshold", "0.4", "--output", tmp_path / "all.csv")
    assert result.code == 0 and len(result.out.splitlines()) == 91, result
    header, first, *_ = csv.reader((tmp_path / "all.csv").open())
    likely = [name for name, p in zip(header[2:], first[2:]) if float(p) >= 0.4]
    assert first[:2] == [str(image), "|".join(likely)]
    line = result.out.splitlines()[0]
    assert all(name in line for name in likely) if likely else "nothing above 40 %" in line
    result = run("predict", folder, image, "--threshold", "1")
    assert "nothing above 100 % (digit" in result.out, result
    assert run("explain", folder, image, "-o", tmp_path / "pictures").code == 0
    refused("evaluate", folder, "--data", small_run[1], words=("labels do not match", "one label an image", "several"))
    refused("evaluate", small_run[0], "--data", pairs, "--multi-label", words=("labels do not match", "tells one"))
    logits = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    from transformers import AutoModelForImageClassification

    other = AutoModelForImageClassification.from_pretrained(folder / "best").eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(logits(x), other(x).logits) and other.config.problem_type == "multi_label_classification"


def test_options(run, refused, pairs, tmp_path):
    """Cached images, weights, smoothing, in two parts; and what does not go with several labels."""
    args = ("finetune", "--data", pairs, "--multi-label", *OPTIONS, "--balance", "weights", "--label-smoothing", "0.1")
    args += ("--cache-images", "--augment", "none", "--output", tmp_path / "run", "--resume", "auto")
    assert run(*args, "--epochs", "1").code == 0
    result = run(*args, "--epochs", "2")
    assert result.code == 0 and "going on from" in result.out, result
    for more, word in ((("--mixup", "0.2"), "--mixup"), (("--balance", "sampler"), "--balance weights")):
        refused(*args[:-4], *more, "--output", tmp_path / "no", words=(word, "several"))
    refused(*args, "--streaming", "--no-cache-images", "--balance", "none", words=("--multi-label", "--streaming"))


def test_loss_and_measures():
    logits, labels = torch.randn(6, 3), torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    smooth = labels * 0.8 + 0.1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, smooth)
    assert torch.allclose(MultiLabelLoss(0.2, None, None)(logits, labels), expected)
    found = MultiPredictions(logits.sigmoid(), torch.zeros(6), labels)
    each = [average_precision_score(labels[:, c], logits[:, c]) for c in range(2)]  # the third class never occurs
    assert found.measures()["val_map"] == pytest.approx(np.mean(each))
    exact = ((logits > 0) == (labels > 0)).all(1).double().mean().item()
    assert found.accuracy() == exact
