"""Training options, launched as a user does: several processes, frozen parts, recipes, streams, trackers."""

import json
import platform
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import timm_cbam2  # noqa: F401
from timm_cbam2.data.cached import CachedImages
from timm_cbam2.data.loading import ImageDataset, data_config, make_loader
from timm_cbam2.data.sources import find_images
from timm_cbam2.training.optimise import attention_parameters, freeze
from timm_cbam2.training.recipe import RECIPES, read_recipe


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def images(write_folder, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), count=20)


def test_two_processes_are_one_with_twice_the_batch(run, start_group, images, tmp_path):
    """On a model without BatchNorm: losses and weights to 1e-5, every validation image once."""
    args = ("finetune", "--data", images, "--model", "test_convnext_cbam2", "--no-pretrained", "--img-size", "32")
    args += ("--epochs", "2", "--workers", "0", "--opt", "sgd", "--lr", "0.05", "--momentum", "0.9", "--clip-grad", "1")
    one = run(*args, "--batch-size", "8", "--output", tmp_path / "one")
    assert one.code == 0, one
    both = start_group(2, *args, "--batch-size", "4", "--output", tmp_path / "two", brief=False)
    for result in [p.wait() for p in both]:
        assert result.code == 0, result
    a, b = weights(tmp_path / "one" / "last"), weights(tmp_path / "two" / "last")
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    start = timm.create_model("test_convnext_cbam2", num_classes=3).state_dict()
    assert max((a[k] - start[k]).abs().max().item() for k in a) > 1e-2  # it did learn
    for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in ("train_loss", "val_loss"):
            assert row[key] == pytest.approx(other[key], abs=1e-5), key
        assert row["val_images"] == other["val_images"] == 12 and row["step"] == other["step"]


@pytest.mark.parametrize("train", ["attention", "attention+head", "head"])
def test_frozen_means_frozen(run, images, quick, tmp_path, train):
    """From the shipped weights: all but the chosen part is bit-equal afterwards, BatchNorm statistics included."""
    args = ("finetune", "--data", images, *quick, "--epochs", "1", "--pretrained", "--train", train, "--lr", "0.01")
    result = run(*args, "--weight-decay", "0.1", "--output", tmp_path / "run")
    assert result.code == 0, result
    torch.manual_seed(0)  # as the run: the classifier, new for other classes, starts with the same weights
    before = timm.create_model("resnet20_cbam2", pretrained=True, num_classes=3)
    after, names = weights(tmp_path / "run" / "last"), attention_parameters(before)
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["trainable_parameters"] < 0.2 * settings["parameters"]
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, after[name])}
    names |= {name for name, _ in before.named_buffers() if ".se." in name}  # statistics of its norms
    kinds = {"attention" if name in names else "head" if name.startswith("fc.") else name for name in changed}
    assert kinds == set(train.split("+"))
    if train == "attention":  # what is trained is said before and after, with the speed
        everything, trained = sum(p.numel() for p in before.parameters()), freeze(before, "attention")
        text = f"attention: {trained:,} of {everything:,} parameters trained, {100 * trained / everything:.1f} %"
        begun, ended = [line for line in result.out.splitlines() if text in line]
        speed = rows(tmp_path / "run")[-1]["images_per_second"]
        assert begun.startswith("resnet20_cbam2: ") and ended == f"{text}; {speed:.0f} images/s"


def test_options_reach_the_model_and_the_data(run, refused, digits, tmp_path):
    """Model and block options, the last rows for validation, cached images, from a parquet file."""
    datasets = pytest.importorskip("datasets")
    pixels, labels = digits
    table = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(p) for p in pixels[:200]], "label": [int(n) for n in labels[:200]]}
    ).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "digits.parquet")
    args = ("finetune", "--data", tmp_path / "digits.parquet", "--model", "resnet20_cbam2", "--no-pretrained")
    args += ("--img-size", "8", "--epochs", "2", "--val-split", "last:50", "--output", tmp_path / "run")
    args += ("--model-kwargs", "drop_rate=0.1", "drop_path_rate=0.1", "--cbam2", "gate=sigmoid", "kernel_sizes=[3,7]")
    result = run(*args, "--cbam2", "fusion=static", "--cache-images", "--augment", "mild")
    assert result.code == 0 and result.err == "", result
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["images"] == {"train": 150, "val": 50} and settings["workers"] == 0
    assert settings["cbam2"] == {"gate": "sigmoid", "kernel_sizes": [3, 7], "fusion": "static"}
    assert settings["command"].startswith("timm-cbam2 finetune --data ") and "last:50" in settings["command"]
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True)
    options = model.cbam2_options
    assert (options["gate"], tuple(options["kernel_sizes"]), options["fusion"]) == ("sigmoid", (3, 7), "static")
    assert Image.open(tmp_path / "run" / "confusion.png").size[0] > 400
    best = max(row["val_accuracy"] for row in rows(tmp_path / "run"))
    assert f"{100 * best:.2f} %" in (tmp_path / "run" / "best" / "README.md").read_text()
    measured = run("evaluate", tmp_path / "run")  # reads the same images the usual way
    assert f"top-1 {100 * best:.2f} %" in measured.out, measured
    plain = ("finetune", "--data", tmp_path / "digits.parquet", "--model", "resnet20", "--no-pretrained")
    result = run(
        *plain,
        "--epochs",
        "1",
        "--img-size",
        "8",
        "--model-kwargs",
        "block_args={'attn_layer':'se'}",
        "--output",
        tmp_path / "se",
    )
    assert result.code == 0 and rows(tmp_path / "se")[-1]["health"] is None, result
    assert any(".se." in key for key in weights(tmp_path / "se" / "last"))
    refused("finetune", "--cbam2", "gat=sigmoid", words=("gat", "Did you mean gate"))
    refused("finetune", "--val-split", "last:99999", words=("last:99999",))
    refused("finetune", "--val-split", "2", words=("--val-split 2", "last:N"))
    refused("finetune", "--train", "head+attention", words=("--train head+attention", "attention+head"))
    refused("finetune", "--model", "resnet20", "--train", "attention", words=("no attention",))
    refused("finetune", "--mixup", "0.2", "--batch-size", "31", words=("--batch-size 31 is odd",))
    refused("finetune", "--save-every", "often", words=("--save-every often", "2 epochs"))
    refused("finetune", "--sync-bn", "--output", tmp_path / "x", words=("--sync-bn needs GPUs",))


def test_cached_images_are_the_same_images(write_folder, tmp_path):
    config = data_config(timm.create_model("resnet20"), 16)
    samples = find_images(str(write_folder(tmp_path / "d"))).splits["all"]
    usual, cached = ImageDataset(samples, config), CachedImages(samples, config)
    for one, other in zip(make_loader(usual, 7, 0), make_loader(cached, 7, 1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    def epoch(number, seed=0, batch=5, augment="mild"):
        dataset = CachedImages(samples, config, augment, seed)
        dataset.set_epoch(number)
        return torch.cat([images for images, *_ in make_loader(dataset, batch, 0)])

    assert torch.equal(epoch(1), epoch(1, batch=9))
    assert not torch.equal(epoch(1), epoch(2)) and not torch.equal(epoch(1), epoch(1, seed=1))
    # Every crop is one of the 25 of the padded image, mirrored or not, and all kinds occur.
    whole = epoch(1, augment="none")
    padded = torch.nn.functional.pad(whole, (2, 2, 2, 2), mode="reflect")
    seen = set()
    for number in range(1, 5):
        for index, image in enumerate(epoch(number)):
            seen |= {
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in (False, True)
                if torch.equal(
                    padded[index, :, top : top + 16, left : left + 16].flip(-1)
                    if flip
                    else padded[index, :, top : top + 16, left : left + 16],
                    image,
                )
            }
    assert len(seen) > 40


def test_every_recipe_is_understood(run, refused, images, tmp_path):
    """Their keys are options; a flag overrides; a wrong key names its nearest neighbour."""
    for path in RECIPES.glob("*.yaml"):
        assert path.read_text().startswith("# ") and read_recipe(path.stem)
    args = ("finetune", "--recipe", "attention", "--data", images, "--model", "resnet20_cbam2", "--img-size", "8")
    result = run(*args, "--epochs", "1", "--workers", "0", "--output", tmp_path / "run")
    assert result.code == 0, result
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    recipe = read_recipe("attention")
    assert settings["train"] == recipe["train"] and settings["lr"] == recipe["lr"] and settings["epochs"] == 1
    assert "recipe attention: " in result.out and f"lr={recipe['lr']}" in result.out and "epochs=1" in result.out
    assert "finetune " in run("finetune", "--recipe", "list").out
    (tmp_path / "mine.yaml").write_text("epochs: 1\nweight-deca: 0.1\n")
    refused("finetune", "--recipe", tmp_path / "mine.yaml", words=("weight_deca", "did you mean weight_decay"))
    (tmp_path / "mine.yaml").write_text("epochs: many\n")
    refused("finetune", "--recipe", tmp_path / "mine.yaml", words=("--epochs", "valid integer"))
    refused("finetune", "--recipe", "finetun", words=("did you mean finetune",))


def test_accelerate_takes_the_configurations():
    """Accelerate's own reader accepts every key of them."""
    from accelerate.commands.config.config_args import load_config_from_file

    names = set()
    for path in (RECIPES / "accelerate").glob("*.yaml"):
        config = load_config_from_file(str(path))
        assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
        names.add(path.name)
    assert {"cpu_2.yaml", "gpus_8.yaml", "gpus_4x8.yaml", "fsdp_8.yaml", "deepspeed_8.yaml"} == names


def test_streaming(run, digits, tmp_path):
    """Parquet shards read as they are used: each image measured once, and more epochs afterwards.

    In two processes, killed and stopped: test_streaming_resume.py.
    """
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("torchdata")
    pixels, labels = digits
    kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    for name, start, stop in (("train-0", 0, 35), ("train-1", 35, 70), ("validation-0", 70, 103)):
        part = {"image": [Image.fromarray(p) for p in pixels[start:stop]], "label": labels[start:stop].tolist()}
        datasets.Dataset.from_dict(part, features=kind).to_parquet(tmp_path / "data" / f"{name}.parquet")
    args = ("finetune", "--data", tmp_path / "data", "--streaming", "--model", "resnet20_cbam2", "--img-size", "8")
    args += ("--batch-size", "8", "--epochs", "1", "--workers", "1", "--save-every", "5 steps")
    result = run(*args, "--output", tmp_path / "one")
    assert result.code == 0, result
    (checkpoint,) = (tmp_path / "one" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "checkpoint.json").read_text())["step"] == 8
    result = run("finetune", "--resume", tmp_path / "one", "--epochs", "2")
    assert result.code == 0 and "--epochs was 1 and is now 2" in result.out, result
    assert [row["epoch"] for row in rows(tmp_path / "one")] == [1, 2]
    assert [row["val_images"] for row in rows(tmp_path / "one")] == [33, 33]
    assert [row["step"] for row in rows(tmp_path / "one")] == [8, 16]


def test_speed_options_and_trackers(run, refused, images, quick, tmp_path):
    pytest.importorskip("tensorboard")
    args = ("finetune", "--data", images, *quick, "--no-pretrained", "--mixed-precision", "bf16", "--channels-last")
    args += (
        "--grad-checkpointing",
        "--bce",
        "--auto-augment",
        "rand-m6-mstd0.5-inc1",
        "--patience",
        "1",
        "--ema",
        "0.9",
    )
    result = run(*args, "--track", "tensorboard", "--output", tmp_path / "run")
    assert result.code == 0, result
    if platform.machine() == "x86_64" and (known := Path("/proc/cpuinfo")).exists():
        computes = {"avx512bw", "avx_ne_convert"} & set(known.read_text().split())
        assert ("bf16 on a CPU without" in result.out) != bool(computes), result
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert all("raw_val_accuracy" in row for row in rows(tmp_path / "run"))
    refused("finetune", "--track", "tensorbord", words=("--track tensorbord", "tensorboard"))
    refused("finetune", "--data", images, "--auto-augment", "rnd", "--img-size", "8", words=("rnd",))


MIXED = """
import sys, timm, timm_cbam2, torch
from accelerate import Accelerator
seen = []
network = Accelerator(cpu=True, mixed_precision="bf16").prepare(timm.create_model("test_resnet_cbam2"))
network.layer1[0].conv1.register_forward_hook(lambda module, args, out: seen.append(str(out.dtype)))
images = torch.randn(2, 3, 32, 32)
network(images)
timm_cbam2.save(network, sys.argv[1])
network(images)
copy = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True)
copy.layer1[0].conv1.register_forward_hook(lambda module, args, out: seen.append(str(out.dtype)))
copy(images)
print(*seen)
"""


def test_saving_leaves_mixed_precision_as_it_is(script, environment, tmp_path):
    """Every epoch saves a model: what is trained stays under autocast, what is saved is not."""
    done = script(MIXED, tmp_path / "model", env=environment, cwd=tmp_path)
    assert done.out.split() == ["torch.bfloat16", "torch.bfloat16", "torch.float32"], done
