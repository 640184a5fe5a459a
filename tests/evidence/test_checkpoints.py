"""Shipped models: each is as it was, gives its stored answer, and is found from a wheel and from a checkout."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from randomise import randomise
from safetensors.torch import load_file, save_file
from timm.utils import reparameterize_model

from timm_cbam2.evidence.shipped import make, verify
from timm_cbam2.hub.folder import save
from timm_cbam2.hub.zoo import pretrained_tags

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.parent for path in (ROOT / "checkpoints").glob("*/SHA256SUMS"))


def test_models_are_shipped():
    names = [f"resnet20_cbam2.{tag}" for tag in ("cifar10_v2", "cifar10", "clutter")]
    assert set(names) <= {folder.name for folder in SHIPPED}
    assert timm.list_pretrained("resnet20_cbam2*") == sorted(names)
    assert pretrained_tags("resnet20_cbam2") == ["cifar10_v2", "cifar10", "clutter"]  # the default first
    model = timm.create_model("resnet20_cbam2", pretrained=True)
    assert model.pretrained_cfg["tag"] == "cifar10_v2" and model.cbam2_options["router_norm"]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda f: f.name)
def test_every_shipped_model_replays(folder):
    verify(folder)
    card = (folder / "README.md").read_text()
    by_name = timm.is_model_pretrained(folder.name)
    model = folder.name if by_name else f"local-dir:checkpoints/{folder.name}"
    assert f'create_model("{model}", pretrained=True)' in card
    assert card.count(f'from_pretrained("checkpoints/{folder.name}")') == 2
    assert f"timm-cbam2 evaluate {folder.name if by_name else f'checkpoints/{folder.name}'} " in card
    assert timm.create_model(model.replace(":", f":{ROOT}/"), pretrained=True).num_classes
    assert "model-index" in card and str(ROOT) not in card and "/tmp/" not in card


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda f: f.name)
def test_evaluate_gives_the_number_of_the_card(run, folder, tmp_path):
    card, data = (folder / "README.md").read_text(), ("clutter",)
    if not folder.name.endswith(".clutter"):
        data = Path(os.environ.get("CIFAR10_JPEG", ROOT.parent / "shared" / "data" / "cifar10_jpeg" / "train.parquet"))
        if not data.is_file():
            pytest.skip("needs the images it was measured on: set CIFAR10_JPEG to their parquet file")
        data = (data, "--val-split", "last:5000")
    model = folder.name if timm.is_model_pretrained(folder.name) else folder
    result = run("evaluate", model, "--data", *data, "--output", tmp_path)
    assert result.code == 0, result
    top1 = 100 * json.loads((tmp_path / "evaluation.json").read_text())["top1"]
    assert f"Top-1 accuracy {top1:.2f} %" in card and f"value: {round(top1, 2)}\n" in card


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    place = tmp_path_factory.mktemp("shipped")
    model = randomise(timm.create_model("resnet20_cbam2", num_classes=10))
    run = place / "run"
    save(model, run / "best", label_names=[f"class {i}" for i in range(10)])
    (run / "run.json").write_text(
        json.dumps(dict(model="resnet20_cbam2", data=str(place / "things.parquet"), epochs=2))
    )
    row = dict(epoch=1, val_accuracy=0.5, val_loss=1.0, val_top5=0.9, val_images=100)
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return make(run / "best", "resnet20_cbam2.things", place / "checkpoints")


def test_the_card_has_the_number_that_evaluate_gives(run, quick, write_folder, tmp_path):
    """Also for a run in bf16, whose own figures are of that precision."""
    data = write_folder(tmp_path / "images", count=20)
    bf16 = ("--mixed-precision", "bf16", "--no-pretrained", "--output", tmp_path / "run")
    assert run("finetune", "--data", data, *quick, *bf16).code == 0
    folder = make(tmp_path / "run" / "last", "resnet20_cbam2.digits", tmp_path / "new")
    assert 'from_pretrained("checkpoints/resnet20_cbam2.digits")' in (folder / "README.md").read_text()
    result = run("evaluate", folder, "--data", data, "--val-split", "0.2", "--output", tmp_path / "numbers")
    assert result.code == 0, result
    numbers = json.loads((tmp_path / "numbers" / "evaluation.json").read_text())
    assert f"Top-1 accuracy {100 * numbers['top1']:.2f} %" in (folder / "README.md").read_text()


def test_a_run_from_another_run_tells_both(shipped, tmp_path):
    first = shipped.parent.parent / "run"
    second = shutil.copytree(first, tmp_path / "second")
    settings = dict(model=f"local-dir:{first / 'best'}", pretrained=True, data="things.parquet", epochs=1)
    (second / "run.json").write_text(json.dumps(settings))
    folder = make(second / "best", "resnet20_cbam2.things", tmp_path / "new")
    assert (folder / "training.jsonl").read_text() == 2 * (first / "metrics.jsonl").read_text()
    trained, again, _ = (folder / "README.md").read_text().partition("```bash\n")[2].splitlines()[:3]
    assert trained.endswith("--model resnet20_cbam2 --epochs 2 --output run1")
    assert again.endswith("--model run1/best --pretrained --epochs 1")
    (second / "run.json").write_text(json.dumps(settings | dict(model="gone/last")))
    with pytest.raises(ValueError, match="started from gone/last, which is no run here"):
        make(second / "best", "resnet20_cbam2.gone", tmp_path / "new")
    assert not (tmp_path / "new" / "resnet20_cbam2.gone").exists()


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    model = timm.create_model("resnet20_cbam2", num_classes=2)
    for wrong, words, names in (
        (reparameterize_model(model), "reparameterized", None),
        (model, "give a list", "ab"),
        (torch.nn.Linear(1, 1), "Linear", None),
    ):
        with pytest.raises(ValueError, match=words):
            save(wrong, tmp_path / "model", label_names=names)
    assert not (tmp_path / "model").exists()


def test_make_and_verify(shipped, tmp_path):
    verify(shipped)
    names = {"README.md", "SHA256SUMS", "config.json", "example.safetensors", "model.safetensors", "training.jsonl"}
    assert {file.name for file in shipped.iterdir()} == names
    assert json.loads((shipped / "training.jsonl").read_text())["val_accuracy"] == 0.5
    card = (shipped / "README.md").read_text()
    assert "timm-cbam2 finetune --data things.parquet --model resnet20_cbam2 --epochs 2" in card
    assert 'create_model("resnet20_cbam2.things", pretrained=True)' in card and "user/" not in card
    assert 'from_pretrained("checkpoints/resnet20_cbam2.things")' in card
    assert "value: 50.0" in card and "things" in card and str(shipped.parent.parent) not in card
    copy = shutil.copytree(shipped, tmp_path / shipped.name)
    (copy / "README.md").write_text("changed")
    with pytest.raises(ValueError, match="README.md is not the file that was shipped"):
        verify(copy)
    shutil.copy(shipped / "README.md", copy)
    (copy / "optimizer.pt").write_text("")
    with pytest.raises(ValueError, match="optimizer.pt"):
        verify(copy)


def test_another_answer_is_noticed(shipped, tmp_path):
    copy = shutil.copytree(shipped, tmp_path / shipped.name)
    example = load_file(copy / "example.safetensors")
    before = (copy / "example.safetensors").read_bytes()
    example["logits"][0, 0] += 0.1
    save_file(example, copy / "example.safetensors")
    import hashlib

    sums = (copy / "SHA256SUMS").read_text()
    after = (copy / "example.safetensors").read_bytes()
    digests = [hashlib.sha256(data).hexdigest() for data in (before, after)]
    (copy / "SHA256SUMS").write_text(sums.replace(*digests))
    with pytest.raises(ValueError, match="other logits"):
        verify(copy)


@pytest.mark.parametrize("name", ["resnet20_cbam2", "resnet32_cbam2.x", "resnet20_cbam2.a/b", "resnet20_cbam2.."])
def test_a_wrong_name_is_refused(shipped, name, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        make(shipped, name, tmp_path)


def test_what_a_name_does_not_tell_is_refused(tmp_path):
    save(timm.create_model("resnet20_cbam2", cbam2_stages=[1, 2]), tmp_path / "model")
    with pytest.raises(ValueError, match="cbam2_stages.*does not tell"):
        make(tmp_path / "model", "resnet20_cbam2.x", tmp_path)


def test_options_come_with_the_weights(tmp_path):
    """Weights by a name bring the attention that they were trained with, whatever networks are registered with."""
    model = timm.create_model("resnet20_cbam2", cbam2=dict(gate="sigmoid", learned_maps=1)).eval()
    save(model, tmp_path / "model")
    weights = make(tmp_path / "model", "resnet20_cbam2.x", tmp_path) / "model.safetensors"
    opened = timm.create_model("resnet20_cbam2", pretrained=True, pretrained_cfg_overlay=dict(file=str(weights)))
    assert opened.cbam2_options == model.cbam2_options
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(opened.eval()(x), model(x))


def test_a_model_without_a_name_is_opened_as_a_folder(tmp_path):
    model = timm.create_model("test_convnext_cbam2", num_classes=3, dims=[8, 8, 8, 8], cbam2=dict(gate="sigmoid"))
    save(randomise(model), tmp_path / "model")
    folder = make(tmp_path / "model", "test_convnext_cbam2.x", tmp_path / "checkpoints")
    verify(folder)
    card = (folder / "README.md").read_text()
    assert 'create_model("local-dir:checkpoints/test_convnext_cbam2.x", pretrained=True)' in card
    assert 'from_pretrained("checkpoints/test_convnext_cbam2.x")' in card


CODE = """
import sys, timm, torch, timm_cbam2
from safetensors.torch import load_file
example = load_file(sys.argv[1] + "/example.safetensors")
model = timm.create_model("resnet20_cbam2", pretrained=True).eval()
assert torch.allclose(model(example["input"]), example["logits"], rtol=1e-4, atol=1e-5)
assert timm.list_pretrained("resnet20_cbam2") == ["resnet20_cbam2.things"]
assert model.pretrained_cfg["label_names"][3] == "class 3" and model.pretrained_cfg["tag"] == "things"
assert timm.create_model("resnet20_cbam2.things", pretrained=True, num_classes=3).num_classes == 3
print(timm_cbam2.__file__)
"""


@pytest.mark.parametrize("layout", ["wheel", "checkout"])
def test_pretrained_finds_it_offline(script, shipped, tmp_path, layout):
    package = shutil.copytree(
        ROOT / "timm_cbam2", tmp_path / "timm_cbam2", ignore=shutil.ignore_patterns("checkpoints")
    )
    shutil.copytree(shipped.parent, (package if layout == "wheel" else tmp_path) / "checkpoints")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = script(CODE, shipped, env=env, cwd=tmp_path)
    assert done.code == 0 and str(tmp_path) in done.out, done.err
