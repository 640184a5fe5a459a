"""What a run or a model left in disorder says of itself: one line that names the file, and nothing made worse."""

import json
import shutil

import pytest
import timm
import torch

from timm_cbam2.data.sources import check_apart
from timm_cbam2.errors import UserError
from timm_cbam2.hub.card import card
from timm_cbam2.hub.folder import save

DAMAGE = {"cut": '{"model": "resnet', "a list": "[1, 2]", "empty": "{}", "not text": b"\xff\xfe\x00"}


@pytest.fixture
def copy(small_run, tmp_path):
    return shutil.copytree(small_run[0], tmp_path / "run")


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_damaged_settings(content, copy, refused):
    (copy / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (("evaluate", copy), ("report", copy), ("push", copy, "me/model", "--dry-run")):
        refused(*command, words=(copy / "run.json", "bring back a copy"))
    refused("finetune", "--resume", copy, words=(copy / "run.json",))


def test_half_a_line_of_figures_is_passed_over(copy, run):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('3\n{"epoch": 9, "val_acc')
    for command in (("report", copy), ("push", copy, "me/model", "--dry-run")):
        result = run(*command)
        assert result.code == 0, result


def test_a_strangers_run_beside_a_model_is_not_its_own(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"model": "resnet50_cbam2.from_a1_in1k", "data": "secret.parquet"}))
    save(timm.create_model("test_resnet_cbam2", num_classes=2), tmp_path / "model")
    assert "secret" not in card(tmp_path / "model") and "resnet50" not in card(tmp_path / "model")


def test_a_model_that_diverged_in_the_last_step_is_not_kept(refused, write_folder, tmp_path):
    images = write_folder(tmp_path / "images")
    size = ("--img-size", "32", "--batch-size", "64", "--model", "test_resnet_cbam2", "--no-pretrained")
    more = ("--opt", "sgd", "--lr", "1e30", "--warmup-epochs", "0", "--epochs", "1", "--output", tmp_path / "run")
    refused("finetune", "--data", images, *size, *more, words=("validation loss became", "diverged", "--lr"))
    assert not (tmp_path / "run" / "best").exists() and not (tmp_path / "run" / "last").exists()


def test_numbers_that_are_none(copy, refused, small_run):
    model = timm.create_model(f"local-dir:{copy / 'best'}", pretrained=True)
    model.get_classifier().weight.data.fill_(float("nan"))
    save(model, copy / "best")
    picture = next(small_run[1].rglob("*.png"))
    for command in (("evaluate", copy), ("predict", copy, picture), ("explain", copy, picture)):
        refused(*command, words=("gives no finite numbers", "diverged"))


def test_a_model_folder_names_the_file_at_fault(copy, refused):
    for content, words in (("{", "is not JSON"), ("[]", "names no architecture"), ("{}", "names no architecture")):
        (copy / "best" / "config.json").write_text(content)
        refused("predict", copy, "image.png", words=(copy / "best" / "config.json", words))


@pytest.mark.parametrize(
    "options, words",
    [
        (("--model-kwargs", "num_classes=7"), ("--model-kwargs num_classes", "leave it out")),
        (("--model-kwargs", "features_only=True"), ("--model-kwargs features_only",)),
        (("--model-kwargs", "checkpoint_path=x.pt"), ("--model-kwargs checkpoint_path",)),
        (("--model-kwargs", "cbam2=3", "--cbam2", "gate=sigmoid"), ("--model-kwargs cbam2", "--cbam2 KEY=VALUE")),
        (("--cbam2", "gate"), ("KEY=VALUE", "gate=sigmoid")),
        (("--attention-lr-scale", "inf"), ("--attention-lr-scale inf", "a number from 0")),
        (("--momentum", "1.5"), ("--momentum 1.5", "less than 1")),
        (("--img-size", "100000"), ("--img-size 100000", "4096")),
        (("--val-img-size", "4"), ("--val-img-size 4", "4096")),
        (("--opt", "adahessian", "--lr", "0.01"), ("--opt adahessian", "second derivatives", "adamw")),
        (("--data", "n" * 300), ("no such folder",)),
        (("--opt-kwargs", "foo=1"), ("foo", "leave --opt-kwargs")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else None,
)
def test_options_that_would_break_later(options, words, refused, tmp_path):
    refused("finetune", *options, "--output", tmp_path / "run", words=words)


@pytest.mark.parametrize(
    "columns, words",
    [
        ({"image": [1, 2], "label": [0, 1]}, ("column 'image' holds int64", "--image-column")),
        ({"image": [b"x", b"y"], "label": [0.0, 1.0]}, ("numbers such as 0.0", "integers")),
        ({"image": [b"x", b"y"], "label": [{"a": 1}, {"a": 2}]}, ("holds {'a': 1}, which names no class",)),
    ],
    ids=["no images", "labels with a point", "structures"],
)
def test_tables_of_the_wrong_kind(columns, words, refused, tmp_path):
    from datasets import Dataset

    Dataset.from_dict(columns).to_parquet(tmp_path / "table.parquet")
    refused("finetune", "--data", tmp_path / "table.parquet", "--output", tmp_path / "run", words=words)


def test_a_run_is_not_written_among_its_images(refused, write_folder, quick, tmp_path):
    data = write_folder(tmp_path / "images", count=4)
    for output in (data, data / "run"):
        refused("finetune", "--data", data, *quick, "--output", output, words=("lies among the images", "elsewhere"))
    assert sorted(path.name for path in data.iterdir()) == ["digit0", "digit1", "digit2"]
    write_folder(tmp_path / "split" / "train", count=4)
    with pytest.raises(UserError, match="lies among"):
        check_apart(tmp_path / "split" / "train" / "run", str(tmp_path / "split"))
    check_apart(tmp_path / "split" / "run", str(tmp_path / "split"))
    check_apart(tmp_path / "run", str(data))


def test_results_that_cannot_be_written(copy, refused, small_run, tmp_path):
    (tmp_path / "file").write_text("")
    refused("evaluate", copy, "--output", tmp_path / "file" / "in", words=("--output", "cannot be written"))
    (copy / "evaluate-images-val" / "evaluation.json").unlink(missing_ok=True)
    (copy / "evaluate-images-val" / "evaluation.json").mkdir(parents=True)
    refused("evaluate", copy, words=("--output", "cannot be written"))


def test_features_that_do_not_fit():
    from timm_cbam2 import Cbam2

    for shape in ((1, 7, 5, 5), (8, 5, 5)):
        with pytest.raises(ValueError, match=r"\(B, 8, H, W\)"):
            Cbam2(8)(torch.zeros(shape))


def test_a_loss_of_nan(refused, write_folder, tmp_path):
    """Step, learning rate, the batch's files, the last good checkpoint."""
    images = write_folder(tmp_path / "images", count=20)
    args = ("finetune", "--data", images, "--model", "resnet20_cbam2", "--img-size", "8", "--workers", "0")
    args += ("--opt", "sgd", "--lr", "1e30", "--sched", "none", "--save-every", "1", "--batch-size", "16")
    args += ("--output", tmp_path / "run")
    line = refused(
        *args, words=("epoch 1, step 2", "at lr 1e+30", str(images), "last good checkpoint", "step-00000001")
    )
    found = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert len(found["files"]) == 16 and found["files"][0] in line and found["step"] == 2
