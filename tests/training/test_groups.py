"""What the optimizer is given: rates and weight decay of backbone and attention."""

import json

import timm
import torch
from safetensors.torch import load_file

import timm_cbam2  # noqa: F401
from timm_cbam2.hub.run_folder import with_attention_decay
from timm_cbam2.training.optimise import (
    attention_lr_scale,
    attention_parameters,
    freeze,
    make_optimizer,
    make_schedule,
)

OPTIONS = dict(opt="adamw", opt_kwargs={}, momentum=None, lr=1.0, weight_decay=0.1, layer_decay=None)
OPTIONS |= dict(attention_lr_scale=1.0, attention_weight_decay=None, attention_delay_epochs=0.0)


def test_parameter_groups():
    network = timm.create_model("resnet20_cbam2")
    names = {id(p): name for name, p in network.named_parameters()}
    attention = attention_parameters(network)
    assert attention == {name for name, _ in network.named_parameters() if ".se." in name}
    optimizer = make_optimizer(network, {**OPTIONS, "layer_decay": 0.5, "attention_lr_scale": 3.0})
    scales = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            scales[name] = group["lr_scale"]
            assert bool(group["weight_decay"]) == (parameter.ndim > 1 and ".se." not in name), name
    assert scales.keys() == set(names.values())
    assert scales["layer1.0.se.channel.fc1.weight"] == 3 * scales["layer1.0.conv1.weight"]
    assert scales["conv1.weight"] < scales["layer2.0.conv1.weight"] < scales["fc.weight"] == 1.0
    everything = {name for name, p in network.named_parameters() if p.ndim > 1}
    for given, expected in ((None, everything - attention), (0.0, everything - attention), (0.1, everything)):
        optimizer = make_optimizer(network, {**OPTIONS, "attention_weight_decay": given})
        groups = [group for group in optimizer.param_groups if group["weight_decay"]]
        assert {names[id(p)] for group in groups for p in group["params"]} == expected
        assert {group["weight_decay"] for group in groups} == {0.1}
    assert freeze(network, "head") == sum(p.numel() for p in network.fc.parameters())


def test_the_rate_of_attention(run, small_run, quick, tmp_path):
    """CBAM2's own by optimizer, where all begins at random; a run records which, and another is taken as given."""
    network, plain = timm.create_model("resnet20_cbam2"), timm.create_model("resnet18")
    assert attention_lr_scale(network, "adamw", "all", False) == 0.3
    assert attention_lr_scale(network, "sgd", "all", False) == 3.0
    for model, opt, train, pretrained in (
        (network, "lamb", "all", False),
        (network, "adamw", "attention+head", False),
        (network, "adamw", "all", True),
        (plain, "adamw", "all", False),
        (timm.create_model("test_convnext_cbam2"), "adamw", "all", False),  # has no norms
        (timm.create_model("seresnet50"), "sgd", "all", False),
    ):
        assert attention_lr_scale(model, opt, train, pretrained) == 1.0
    still = make_optimizer(network, {**OPTIONS, "attention_lr_scale": 0.0})  # as Python may ask
    assert {group["lr_scale"] for group in still.param_groups} == {0.0, 1.0}
    found = []
    for more in (
        ("--no-pretrained",),
        ("--no-pretrained", "--opt", "sgd", "--lr", "0.1"),
        ("--no-pretrained", "--attention-lr-scale", "2"),
        ("--model", f"{small_run[0]}/best"),
    ):
        folder = tmp_path / f"run{len(found)}"
        args = ("finetune", "--data", small_run[1], *quick, "--output", folder, "--epochs", "1", *more)
        assert run(*args).code == 0
        found.append(json.loads((folder / "run.json").read_text())["attention_lr_scale"])
    assert found == [0.3, 3.0, 2.0, 1.0]
    again = ("finetune", "--data", small_run[1], *quick, "--output", tmp_path / "run2", "--no-pretrained")
    result = run(*again, "--epochs", "2", "--resume", "auto")  # as if begun when the default was another
    assert result.code == 0 and "going on from" in result.out, result
    assert json.loads((tmp_path / "run2" / "run.json").read_text())["attention_lr_scale"] == 2.0


def test_attention_that_waits():
    """Its rate is 0 for so many epochs and then what it would have been; all else learns as ever."""
    settings = {**OPTIONS, "sched": "cosine", "epochs": 4, "warmup_epochs": 1.0, "attention_lr_scale": 0.5}
    found = []
    for delay in (0.0, 1.5):
        network = timm.create_model("resnet20_cbam2")
        attention = {id(p) for name, p in network.named_parameters() if name in attention_parameters(network)}
        given = {**settings, "attention_delay_epochs": delay}
        optimizer = make_optimizer(network, given)
        schedule, rates = make_schedule(optimizer, given, updates_per_epoch=10), {True: [], False: []}
        for update in range(40):
            for group in optimizer.param_groups:
                rates[id(group["params"][0]) in attention].append(group["lr"])
            schedule.step_update(update + 1)
        found.append(rates)
    (usual, waiting), groups = found, len(found[0][True]) // 40
    assert usual[False] == waiting[False] and min(usual[True]) > 0
    assert waiting[True] == [0.0] * (15 * groups) + usual[True][15 * groups :]


def test_a_run_whose_attention_waits(run, refused, small_run, quick, tmp_path):
    """Begun once or gone on with while it waits, it ends alike; before its time nothing of it has learned."""
    args = ("finetune", "--data", small_run[1], *quick, "--no-pretrained", "--sched", "none", "--resume", "auto")
    gate, found = "layer3.2.se.channel.fc2.weight", []  # at 0 to begin with
    for folder, epochs in (("whole", (3,)), ("parts", (1, 3))):
        for count in epochs:
            how = ("--output", tmp_path / folder, "--epochs", count, "--attention-delay-epochs", "2")
            result = run(*args, *how)
            assert result.code == 0 and ("note: attention does not learn" in result.err + result.out) == (count == 1)
            weights = load_file(tmp_path / folder / "last" / "model.safetensors")
            assert weights[gate].any() == (count == 3)
        found.append(weights)
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["attention_delay_epochs"] == 2.0
    refused("finetune", "--attention-delay-epochs", "inf", words=("--attention-delay-epochs inf", "a number from 0"))
    plain = ("finetune", "--data", small_run[1], *quick, "--model", "resnet18", "--no-pretrained")
    words = ("--attention-delay-epochs 1: this model has no attention",)
    refused(*plain, "--attention-delay-epochs", "1", "--output", tmp_path / "plain", words=words)


def test_begun_when_attention_was_decayed(run, refused, small_run, quick, tmp_path):
    """Before attention had a weight decay of its own it had that of all; such a run keeps it, and its optimizer."""
    folder = tmp_path / "run"
    args = ("finetune", "--data", small_run[1], *quick, "--output", folder)
    assert run(*args, "--epochs", "1", "--attention-weight-decay", "0.05").code == 0
    settings = json.loads((folder / "run.json").read_text())
    assert settings.pop("attention_weight_decay") == settings["weight_decay"] == 0.05
    assert with_attention_decay(settings)["attention_weight_decay"] == 0.05  # of checkpoints, which have checksums
    (folder / "run.json").write_text(json.dumps(settings))
    words = ("cannot resume", "--attention-weight-decay was 0.05 and is now None")
    refused(*args, "--epochs", "2", "--resume", "auto", words=words)
    result = run("finetune", "--resume", folder, "--epochs", "2")
    assert result.code == 0 and "going on from" in result.out, result
    assert json.loads((folder / "run.json").read_text())["attention_weight_decay"] == 0.05
