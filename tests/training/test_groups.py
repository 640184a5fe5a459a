"""What the optimizer is given: rates and weight decay of backbone and attention."""

import json

import timm

import timm_cbam2  # noqa: F401
from timm_cbam2.hub.run_folder import with_attention_decay
from timm_cbam2.training.optimise import attention_lr_scale, attention_parameters, freeze, make_optimizer

OPTIONS = dict(opt="adamw", opt_kwargs={}, momentum=None, lr=1.0, weight_decay=0.1, layer_decay=None)
OPTIONS |= dict(attention_lr_scale=1.0, attention_weight_decay=None)


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
