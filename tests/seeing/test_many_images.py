"""Folders of images: files of probabilities and features, workers, and averages over views."""

import csv
import json
import shutil

import numpy as np
import pytest
import timm
import torch

import timm_cbam2  # noqa: F401
from timm_cbam2.data.loading import build_transform, data_config
from timm_cbam2.data.reading import read_image
from timm_cbam2.errors import UserError
from timm_cbam2.hub.folder import save
from timm_cbam2.seeing.views_averaged import with_views


def test_a_folder_of_images(run, refused, small_run, tmp_path):
    folder, data = small_run
    files = ("--output", tmp_path / "all.csv", "--features", tmp_path / "all.npz")
    result = run("predict", folder, data, "--batch-size", "5", "--workers", "1", *files)
    assert result.code == 0 and result.err == "", result
    names = [str(path) for path in sorted(data.glob("*/*.png"))]
    lines = result.out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:-2]] == names
    assert run("predict", folder, data, "--output", tmp_path / "all.json").out.splitlines()[:-1] == lines[:-2]

    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    transform = build_transform(data_config(model))
    images = torch.stack([transform(read_image(name)) for name in names])
    with torch.no_grad():
        expected = model(images).softmax(1).numpy()
        seen = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
    rows = list(csv.reader((tmp_path / "all.csv").open()))
    assert rows[0] == ["image", "prediction", "digit0", "digit1", "digit2"] and [row[0] for row in rows[1:]] == names
    np.testing.assert_allclose(np.array([row[2:] for row in rows[1:]], dtype=float), expected, atol=1e-5)
    assert [row[1] for row in rows[1:]] == [f"digit{i}" for i in expected.argmax(1)]
    told = json.loads((tmp_path / "all.json").read_text())
    assert told["classes"] == rows[0][2:] and [row["image"] for row in told["images"]] == names
    np.testing.assert_allclose([row["probabilities"] for row in told["images"]], expected, atol=1e-5)
    with np.load(tmp_path / "all.npz") as kept:
        assert kept["images"].tolist() == names
        np.testing.assert_allclose(kept["features"], seen, atol=1e-4)

    refused("predict", folder, data, "--output", "all.txt", words=("--output all.txt", ".csv or .json"))
    refused("predict", folder, data, "--features", tmp_path / "no" / "x.npz", words=("--features", "no folder"))


def test_views_are_averaged(run, refused, small_run, tmp_path):
    folder, data = small_run
    result = run("evaluate", folder, "--tta", "flip", "--output", tmp_path / "flip")
    assert result.code == 0 and "--tta flip" in result.out, result
    numbers = json.loads((tmp_path / "flip" / "evaluation.json").read_text())
    plain = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert numbers["tta"] == "flip" and numbers["loss"] != plain["val_loss"]
    image = next(data.glob("*/*.png"))
    result = run("predict", folder, image, "--tta", "flip", "--output", tmp_path / "one.json")
    assert result.code == 0, result
    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    x = build_transform(data_config(model))(read_image(image))[None]
    with torch.no_grad():
        expected = (model(x).softmax(1) + model(x.flip(-1)).softmax(1)) / 2
    told = json.loads((tmp_path / "one.json").read_text())["images"][0]["probabilities"]
    assert torch.allclose(torch.tensor([told]), expected, atol=1e-5)

    refused("predict", folder, image, "--tta", "twice", words=("--tta twice", "flip, crops, flip+crops"))
    handed = tmp_path / "handed"  # as a run on digits is
    shutil.copytree(folder, handed)
    settings = json.loads((folder / "run.json").read_text())
    (handed / "run.json").write_text(json.dumps(settings | {"augment": "light"}))
    refused("predict", handed, image, "--tta", "flip", words=("--tta flip", "without mirroring", "leave it out"))


def test_crops(run, small_run, tmp_path):
    model = timm.create_model("test_resnet_cbam2", num_classes=3).eval()
    torch.nn.init.normal_(model.fc.weight)
    config = data_config(model, 32) | {"crop_pct": 0.8}
    averaged, wider = with_views(model, config, "flip+crops", "standard")
    assert wider["input_size"] == (3, 40, 40) and wider["crop_pct"] == 1.0
    image = torch.randn(2, 3, 40, 40)
    views = [image[:, :, t : t + 32, s : s + 32] for t, s in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))]
    with torch.no_grad():
        expected = torch.stack([model(v).softmax(1) for view in views for v in (view, view.flip(-1))]).mean(0)
        assert torch.allclose(averaged(image).softmax(1), expected, atol=1e-6)
    assert not torch.allclose(model(views[-1]).softmax(1), expected, atol=1e-4)
    with pytest.raises(UserError, match="sees whole images .*give --tta flip"):
        with_views(model, config | {"crop_pct": 1.0}, "flip+crops", None)
    save(model, tmp_path / "model", label_names=["digit0", "digit1", "digit2"], data_config=config)
    result = run("predict", tmp_path / "model", next(small_run[1].glob("*/*.png")), "--tta", "crops")
    assert result.code == 0 and "digit" in result.out, result
