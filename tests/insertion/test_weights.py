"""Files of every origin, read by the commands without running what may be in them, and every key accounted for."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from hub_server import Hub
from networks import images
from randomise import randomise
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from transformers import AutoModelForImageClassification, ConvNextV2Config, ResNetConfig

import timm_cbam2
from timm_cbam2.insertion.translate import in_timms_keys


@pytest.fixture(scope="module")
def plain():
    return randomise(timm.create_model("test_resnet", num_classes=3)).eval()


@pytest.fixture(scope="module")
def files(plain, tmp_path_factory):
    """The same weights as scripts and libraries save them."""
    folder, weights = tmp_path_factory.mktemp("files"), plain.state_dict()
    other = {key: torch.zeros_like(value) for key, value in weights.items()}

    def below(prefix, values=weights):
        return {prefix + key: value for key, value in values.items()}

    options = argparse.Namespace(model="test_resnet", lr=0.1)
    lightning = {"state_dict": below("model._orig_mod.") | {"loss.weight": torch.ones(3)}, "hyper_parameters": {}}
    for name, content in {
        "plain.pth": weights,
        "train.pth.tar": {"arch": "test_resnet", "epoch": 3, "state_dict": below("module.", other), "args": options}
        | {"state_dict_ema": below("_orig_mod."), "optimizer": {"state": {}}},
        "torchvision.pth": {"model": weights, "args": options, "lr_scheduler": {"last_epoch": 1}},
        "lightning.ckpt": lightning | {"hyper_parameters": {"model_name": "test_resnet"}},
        "twice.ckpt": {"state_dict": below("student.") | below("teacher.", other)},
        "whole.pt": plain,
        "numbers.pth": {"epoch": 3},
    }.items():
        torch.save(content, folder / name)
    (folder / "cut.pth").write_bytes((folder / "plain.pth").read_bytes()[:-2000])
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "plain.safetensors")
    save_for_hf(plain, folder / "timm", model_config=dict(label_names=["x", "y", "z"]), safe_serialization=True)
    return folder


def opened(folder):
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("plain.pth", ("--model", "test_resnet"), ()),
        ("plain.safetensors", ("--model", "test_resnet_cbam2"), ()),
        ("train.pth.tar", (), ("note: the averaged weights (state_dict_ema)",)),
        ("torchvision.pth", (), ()),
        ("lightning.ckpt", (), ("note: outside the network and left aside, 1 in all: loss.weight",)),
        ("timm", ("--cbam2", "fusion=static"), ()),
        ("timm/model.safetensors", (), ()),
    ],
)
def test_insert_reads_files_of_every_origin(name, options, words, files, plain, run, tmp_path):
    result = run("insert", files / name, "-o", tmp_path / "new", *options)
    assert result.code == 0, result
    assert "blocks" in result.out and "outputs equal those before, bit for bit" in result.out
    assert all(word in result.out for word in words)
    model = opened(tmp_path / "new")
    assert torch.equal(model(images(side=64)), plain(images(side=64)))
    assert model.cbam2_options["fusion"] == ("static" if options[:1] == ("--cbam2",) else "router")
    if name.startswith("timm"):
        assert json.loads((tmp_path / "new" / "config.json").read_text())["label_names"] == ["x", "y", "z"]


def test_insert_draws_what_is_inside_by_seed(files, run, tmp_path):
    def weights(name, *options):
        assert run("insert", files / "timm", "-o", tmp_path / name, *options).code == 0
        return (tmp_path / name / "model.safetensors").read_bytes()

    one = weights("one", "--seed", "3", "--cbam2", "squeeze_norm=false", "--cbam2", "dilated=None")
    assert one == weights("two", "--seed", "3", "--cbam2", "squeeze_norm=False", "--cbam2", "dilated=None")
    assert one != weights("three", "--cbam2", "squeeze_norm=false", "--cbam2", "dilated=None")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["model_args"]["cbam2"]["squeeze_norm"] is False
    weights("four", "--cbam2", "router_pool=none")  # text that is no word of Python's


def test_insert_names_what_is_wrong_and_writes_nothing(files, refused, run, tmp_path):
    new = tmp_path / "new"
    cases = [
        ("plain.pth", (), ("does not say of which network it is: give --model; it fits", "test_resnet")),
        (
            "plain.pth",
            ("--model", "resnet18"),
            (
                "does not fit resnet18: 53 missing: conv1.weight, ",
                "and 43 more; 34 unexpected: ",
                "47 of another shape: bn1.bias",
            ),
        ),
        ("plain.pth", ("--model", "resnett18"), ("--model resnett18 is unknown; did you mean resnet",)),
        ("plain.pth", ("--model", "vit_tiny_patch16_224"), ("has no CBAM2 twin", "where=")),
        ("whole.pt", (), ("holds more than tensors", "timm.models.resnet.", "save its weights alone")),
        ("numbers.pth", (), ("holds no weights",)),
        ("cut.pth", (), ("damaged",)),
        ("twice.ckpt", ("--model", "test_resnet"), ("hold the network twice", "student.", "teacher.")),
        ("timm", ("--cbam2", "gates=sigmoid"), ("gates", "Did you mean gate")),
        ("timm", ("--cbam2", "gate"), ("--cbam2 gate: write KEY=VALUE",)),
        ("nothing.pth", (), ("no such file or folder",)),
    ]
    for name, options, words in cases:
        refused("insert", files / name, "-o", new, *options, words=words)
    assert not new.exists()
    assert run("insert", files / "timm", "-o", new).code == 0
    before = {file.name: file.read_bytes() for file in new.iterdir()}
    refused("insert", files / "timm", "-o", new, words=("already holds a model", "config.json"))
    refused("insert", new, "-o", tmp_path / "other", words=("has CBAM2 already", "--start-from"))
    assert before == {file.name: file.read_bytes() for file in new.iterdir()}
    timm_cbam2.save(timm_cbam2.insert(torchvision.models.resnet18()), tmp_path / "outside")
    refused("insert", tmp_path / "outside", "-o", tmp_path / "other", words=("outside timm", "load_inserted"))


def test_a_file_that_would_run_code_does_not(tmp_path, refused):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}, "args": Evil()}, tmp_path / "evil.pth")
    for verb in (("insert", tmp_path / "evil.pth", "-o", tmp_path / "new"), ("finetune", "--start-from")):
        more = (tmp_path / "evil.pth",) if verb[0] == "finetune" else ()
        refused(*verb, *more, "--model", "test_resnet_cbam2", words=("holds more than tensors", "mkdir"))
    assert not (tmp_path / "it ran").exists()


def _hf(config):
    return randomise(AutoModelForImageClassification.from_config(config)).eval()


def test_networks_of_transformers_and_torchvision_become_timms(tmp_path, run):
    names = {0: "a", 1: "b", 2: "c"}
    sizes = dict(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    resnet = _hf(ResNetConfig(layer_type="basic", id2label=names, **sizes))
    convnext = _hf(ConvNextV2Config(depths=[2, 2, 6, 2], hidden_sizes=[40, 80, 160, 320], id2label=names))
    vision = randomise(torchvision.models.convnext_tiny(num_classes=3)).eval()
    resnet.save_pretrained(tmp_path / "resnet")
    convnext.save_pretrained(tmp_path / "convnext")
    torch.save(vision.state_dict(), tmp_path / "vision.pth")
    x = images(side=64)
    for source, model, twin, whose, options in (
        (tmp_path / "resnet", resnet, "resnet18_cbam2", "transformers", ()),
        (tmp_path / "convnext", convnext, "convnextv2_atto_cbam2", "transformers", ()),
        (tmp_path / "vision.pth", vision, "convnext_tiny_cbam2", "torchvision", ("--model", "convnext_tiny")),
    ):
        result = run("insert", source, "-o", tmp_path / twin, *options)
        assert result.code == 0, result
        assert f"{twin}: " in result.out and f"the keys are those of {whose}" in result.out
        expected = model(x)
        torch.testing.assert_close(
            opened(tmp_path / twin)(x), getattr(expected, "logits", expected), rtol=1e-3, atol=1e-3
        )
    assert json.loads((tmp_path / "resnet18_cbam2" / "config.json").read_text())["label_names"] == ["a", "b", "c"]


def test_keys_of_the_convnext_papers_and_wrappers_around_every_library():
    theirs = {
        "timm": "conv1.weight",
        "papers": "downsample_layers.0.0.weight",
    }
    network = timm.create_model("test_convnext2")
    wanted = randomise(network).state_dict()
    authors = {}
    for key, value in wanted.items():
        for new, old in (
            ("stem.", "downsample_layers.0."),
            (".blocks.", "."),
            (".conv_dw.", ".dwconv."),
            (".mlp.fc", ".pwconv"),
            (".mlp.grn.weight", ".grn.gamma"),
            (".mlp.grn.bias", ".grn.beta"),
            ("head.norm.", "norm."),
            ("head.fc.", "head."),
        ):
            key = key.replace(new, old)
        if ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            key = f"downsample_layers.{stage}.{rest}"
        authors[f"net.{key}"] = value.reshape(1, 1, 1, -1) if ".grn." in key else value
    assert f"net.{theirs['papers']}" in authors
    found, aside, whose = in_timms_keys(authors | {"other.weight": torch.ones(1)}, wanted)
    assert whose == "the ConvNeXt papers" and aside == ["other.weight"]
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_finetune_starts_from_them(files, run, refused, write_folder, tmp_path):
    data = write_folder(tmp_path / "images")
    quick = ("--data", data, "--img-size", "16", "--batch-size", "16", "--workers", "0", "--epochs", "1")
    frozen = ("--train", "attention", "--lr", "1e-9", "--weight-decay", "0")

    result = run("finetune", "--start-from", files / "lightning.ckpt", *quick, *frozen, "--output", tmp_path / "a")
    assert result.code == 0, result
    assert "the weights have no attention: it starts as the network's own, the identity" in result.out
    assert "test_resnet_cbam2: " in result.out and "trained weights" in result.out
    weights, source = load_file(tmp_path / "a" / "last" / "model.safetensors"), load_file(files / "plain.safetensors")
    assert weights.keys() > source.keys() and all(torch.equal(weights[key], source[key]) for key in source)
    settings = json.loads((tmp_path / "a" / "run.json").read_text())
    assert settings["model"] == "test_resnet_cbam2" and settings["start_from"] == str(files / "lightning.ckpt")
    assert settings["pretrained"] and settings["lr"] == 1e-9

    # Trained attention and its options come along, and go on; the head, of other classes, starts anew.
    more = write_folder(tmp_path / "more", classes=(0, 1, 2, 3))
    result = run("insert", files / "timm", "-o", tmp_path / "new", "--cbam2", "kernel_sizes=(3,)")
    assert result.code == 0, result
    quick = ("--data", more, *quick[2:])
    result = run("finetune", "--start-from", tmp_path / "new", *quick, *frozen, "--output", tmp_path / "b")
    assert result.code == 0, result
    assert "the classifier starts anew, for 4 classes (it had 3 classes)" in result.out
    before, after = load_file(tmp_path / "new" / "model.safetensors"), load_file(tmp_path / "b/last/model.safetensors")
    learnt = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")  # what its norms have seen
    same = [key for key in before if not key.startswith("fc.") and not (".se." in key and key.endswith(learnt))]
    assert before.keys() == after.keys() and all(torch.allclose(before[k], after[k], atol=1e-6) for k in same)
    assert opened(tmp_path / "b" / "last").cbam2_options["kernel_sizes"] == (3,)

    # A plain network stays one when it is asked for, and a stopped run goes on without being told again.
    plain = ("--start-from", files / "plain.pth", "--model", "test_resnet", "--output", tmp_path / "c")
    assert run("finetune", *plain, *quick).code == 0
    assert "channel" not in str(load_file(tmp_path / "c" / "last" / "model.safetensors").keys())
    result = run("finetune", "--resume", tmp_path / "c", "--epochs", "2")
    assert result.code == 0 and "going on from" in result.out, result

    refused("finetune", "--start-from", files / "timm", "--pretrained", words=("two sets of weights to start from",))
    refused(
        "finetune", "--start-from", files / "timm", "--model", tmp_path / "new", words=("brings weights of its own",)
    )
    refused(
        "finetune", "--start-from", files / "timm", "--model", "resnet20_cbam2", words=("does not fit resnet20_cbam2",)
    )


def test_repositories_on_the_hub(files, plain, environment, tmp_path):
    with Hub() as hub:
        for repo, folder in (("user/plain", files / "timm"), ("user/empty", files / "none")):
            hub.add(repo, {file.name: file.read_bytes() for file in folder.glob("*")})
        env = {**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        del env["HF_HUB_OFFLINE"]

        def call(*args):
            command = [sys.executable, "-m", "timm_cbam2.cli", *map(str, args)]
            return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)

        result = call("insert", "hf-hub:user/plain", "-o", "new")
        assert result.returncode == 0 and "outputs equal those before, bit for bit" in result.stdout, result
        assert torch.equal(opened(tmp_path / "new")(images(side=64)), plain(images(side=64)))
        result = call("insert", "hf-hub:user/empty", "-o", "other")
        assert result.returncode == 2 and "has neither model.safetensors nor pytorch_model.bin" in result.stderr
        result = call("insert", "hf-hub:user/none", "-o", "other")
        assert result.returncode == 2 and result.stderr.startswith("timm-cbam2: hf-hub:user/none cannot be fetched")
        assert len(result.stderr.splitlines()) == 1


def test_bare_weights_of_before_say_which_options_they_were_made_with(run, refused, write_folder, tmp_path):
    before = dict(center_spatial=False, squeeze_norm=False, router_norm=False)
    torch.save(timm.create_model("test_resnet_cbam2", cbam2=before, num_classes=3).state_dict(), tmp_path / "old.pth")
    with pytest.raises(RuntimeError, match=r"as by 0.1, .* cbam2=dict\(center_spatial=False, .*router_norm=False\)"):
        timm.create_model("test_resnet_cbam2", num_classes=3, checkpoint_path=str(tmp_path / "old.pth"))
    opened = timm.create_model("test_resnet_cbam2", cbam2=before, num_classes=3, checkpoint_path=tmp_path / "old.pth")
    assert opened.cbam2_options["router_norm"] is False

    data = write_folder(tmp_path / "images")
    start = ("--start-from", tmp_path / "old.pth", "--model", "test_resnet_cbam2", "--data", data, "--img-size", "16")
    refused("finetune", *start, words=("saved without router_norm", "--cbam2 router_norm=False"))
    off = [word for option in before for word in ("--cbam2", f"{option}=False")]
    result = run("finetune", *start, *off, "--workers", "0", "--epochs", "1", "--output", tmp_path / "run")
    assert result.code == 0, result
