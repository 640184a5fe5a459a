"""The main job and its run folder, launched as a user does."""

import json
import shutil
import signal
import time

import pytest
import timm
import torch
from PIL import Image

import timm_cbam2  # noqa: F401
from timm_cbam2.data.loading import build_transform, data_config

TIMES = ("seconds", "images_per_second")


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_same_command_gives_the_same_run(run, small_run, quick, tmp_path):
    first, data = small_run
    result = run("finetune", "--data", data, *quick, "--workers", "1", "--output", tmp_path / "again")
    assert result.code == 0, result
    one, two = rows(first), rows(tmp_path / "again")
    for row in (*one, *two):
        for key in TIMES:
            row.pop(key)
    assert one == two
    assert run("finetune", "--data", data, *quick, "--seed", "1", "--output", tmp_path / "other").code == 0
    assert rows(tmp_path / "other")[0]["train_loss"] != one[0]["train_loss"]


def test_run_folder_models_load_in_timm(small_run):
    folder, data = small_run
    for name in ("best", "last"):
        model = timm.create_model(f"local-dir:{folder / name}", pretrained=True).eval()
        assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == ["digit0", "digit1", "digit2"]
        assert tuple(model.pretrained_cfg["input_size"]) == (3, 8, 8)
        transform = build_transform(data_config(model))
        image = transform(Image.open(next(data.glob("*/*.png"))).convert("RGB"))
        assert model(image[None]).isfinite().all()


def test_a_used_run_folder_is_refused(refused, small_run, quick):
    folder, data = small_run
    before = (folder / "metrics.jsonl").read_text()
    refused("finetune", "--data", data, *quick, "--output", folder, words=(folder, "already holds a run"))
    assert (folder / "metrics.jsonl").read_text() == before


def test_starting_from_a_model_folder(run, small_run, quick, tmp_path, write_folder):
    folder, data = small_run
    args = ("finetune", "--model", folder, "--data", data, *quick[2:], "--epochs", "1", "--output", tmp_path / "same")
    result = run(*args)
    assert result.code == 0 and "trained weights" in result.out and "starts anew" not in result.out, result
    assert json.loads((tmp_path / "same" / "run.json").read_text())["lr"] == 5e-4
    other = write_folder(tmp_path / "images", classes=(4, 5, 6))
    result = run("finetune", "--model", folder, "--data", other, *quick[2:], "--output", tmp_path / "other")
    assert result.code == 0 and "the classifier starts anew" in result.out, result


def test_unreadable_images(run, refused, write_folder, truncate, quick, tmp_path):
    data = write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", start=20, count=5)
    truncate(data / "digit1" / "000.jpg")
    truncate(tmp_path / "val" / "digit2" / "000.jpg")
    args = ("finetune", "--data", tmp_path, *quick, "--output", tmp_path / "run")
    refused(*args, words=("train/digit1/000.jpg", "--skip-bad-images"))
    refused(*args, "--workers", "1", words=("train/digit1/000.jpg", "--skip-bad-images"))
    result = run(*args, "--skip-bad-images")
    assert result.code == 0 and "2 unreadable images left out" in result.out, result
    assert result.out.count("left out, since they cannot be read") == 2, result  # one of each split, once
    bad = [json.loads(line) for line in (tmp_path / "run" / "bad_images.txt").read_text().splitlines()]
    assert bad == [str(data / "digit1" / "000.jpg"), str(tmp_path / "val" / "digit2" / "000.jpg")]
    last = rows(tmp_path / "run")[-1]
    assert last["bad_images"] == {"train": 1, "val": 1} and last["val_images"] == 15
    result = run("evaluate", tmp_path / "run")
    assert result.code == 0 and "1 unreadable images left out" in result.out, result


def test_a_bad_image_that_shows_late(run, refused, write_folder, truncate, quick, tmp_path):
    """The run goes on without it from where it stopped, and nothing is checked again."""
    write_folder(tmp_path / "train")
    late = truncate(write_folder(tmp_path / "val", start=20, count=5) / "digit2" / "000.jpg")
    args = ("finetune", "--data", tmp_path, *quick, "--output", tmp_path / "run", "--resume", "auto")
    refused(*args, "--save-every", "1 step", words=("val/digit2/000.jpg", "--skip-bad-images"))
    late.write_bytes(b"")  # a check in advance would now leave it out, and count it, before any other
    result = run(*args, "--skip-bad-images")
    assert result.code == 0 and "going on from" in result.out, result
    assert "note: --skip-bad-images was False and is now True" in result.out, result
    assert [row["bad_images"] for row in rows(tmp_path / "run")] == [{"train": 0, "val": 1}] * 2


@pytest.mark.parametrize("workers", ["0", "1"])
def test_ctrl_c(start, run, write_folder, quick, tmp_path, workers):
    data = write_folder(tmp_path / "images")
    args = ("finetune", "--data", data, *quick, "--workers", workers, "--epochs", "100000", "--output", "run")
    running = start(*args, cwd=tmp_path)
    while "epoch   2/" not in running.out():
        assert running.alive, running.wait()
        time.sleep(0.01)
    running.kill_group(signal.SIGINT)  # as a terminal does: every process of the group
    code, _, err = running.wait()
    assert code == 75
    assert len(err.splitlines()) == 1 and "run/last" in err and "run/best" in err, err
    assert timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True).num_classes == 3
    assert rows(tmp_path / "run") and (tmp_path / "run" / "curves.png").exists()
    assert [p.name for p in (tmp_path / "run").glob(".*")] == [".lock"]
    assert run("evaluate", tmp_path / "run").code == 0


def test_optimizer_decays_no_norm_bias_or_attention():
    from timm.optim import create_optimizer_v2

    model = timm.create_model("resnet20_cbam2")
    decayed = {
        id(p)
        for g in create_optimizer_v2(model, "adamw", 1e-3, 0.05).param_groups
        if g["weight_decay"]
        for p in g["params"]
    }
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and ".se." not in name), name


def test_best_is_kept_when_a_later_save_fails(small_run, tmp_path, monkeypatch):
    from timm_cbam2.hub import folder as model_folders

    folder = tmp_path / "model"
    shutil.copytree(small_run[0] / "best", folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folders, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        model_folders.save(timm.create_model("resnet20_cbam2", num_classes=3), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_save_keeps_the_function_and_every_option(tmp_path):
    from timm_cbam2.hub.folder import save

    options = dict(gate="sigmoid", kernel_sizes=(3, 5), dilated=None, router_pool="moments")
    model = timm.create_model("test_resnet_cbam2", num_classes=4, cbam2=options, in_chans=1).eval()
    model = model.to(memory_format=torch.channels_last)
    wrapped = torch.nn.parallel.DataParallel(model)
    save(torch.compile(wrapped.module), tmp_path / "m", label_names=list("abcd"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (
        config["model_args"]["cbam2"]["router_pool"] == "moments" and config["model_args"]["cbam2"]["rd_divisor"] == 8
    )
    assert "num_classes" not in config["model_args"] and not config["pretrained_cfg"]["tag"].startswith("from_")
    again = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    again = again.to(memory_format=torch.channels_last)
    images = torch.randn(2, 1, 64, 64)
    assert torch.equal(model(images), again(images))
    assert again.pretrained_cfg["label_names"] == list("abcd")
    assert (tmp_path / "m" / "model.safetensors").stat().st_mode & 0o444 == 0o444
    (tmp_path / "m" / "README.md").write_text("mine")
    save(model, tmp_path / "m")
    assert (tmp_path / "m" / "README.md").read_text() == "mine"
    with pytest.raises(ValueError, match="3 label_names"):
        save(model, tmp_path / "n", label_names=list("abc"))
    assert not (tmp_path / "n").exists()
