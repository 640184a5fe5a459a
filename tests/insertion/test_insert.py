"""Blocks put into trained networks change nothing until they are trained, and leave no trace when they go."""

import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import timm
import torch
from networks import MAKERS, Own, answers, blocks, equal, images, make
from randomise import randomise
from torch import nn

import timm_cbam2
from timm_cbam2 import Cbam2, insert, record_attention, remove
from timm_cbam2.hub.zoo import load

every_network = pytest.mark.parametrize("name", MAKERS)


@every_network
@pytest.mark.parametrize("training", [False, True])
def test_outputs_statistics_and_gradients_stay(name, training):
    model, x = make(name).train(training), images(name)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert insert(model) is model
    assert len(blocks(model)) > 2
    before, after = answers(plain, x), answers(model, x)
    assert equal(before, after)
    state = model.state_dict()
    for key, value in plain.state_dict().items():  # running statistics too
        assert torch.equal(value, state[key]), key
    for said in (before, after):
        sum(part.square().sum() for part in said).backward()
    parameters = dict(model.named_parameters())
    reached = [bool(p.grad.any()) for key, p in parameters.items() if key.endswith("channel.fc2.weight")]
    assert any(reached) if training else all(reached), "the fresh blocks learn"  # drop path may drop one in training


def gradients(model, x):
    sum(part.square().sum() for part in answers(model, x)).backward()
    return {key: parameter.grad for key, parameter in model.named_parameters()}


@every_network
@pytest.mark.parametrize("training", [False, True])
def test_gradients_stay(name, training):
    """In double precision to its rounding; in single they are as near to those as the network's own were."""
    plain, x = make(name).train(training), images(name)
    exact, model, double = (
        copy.deepcopy(plain).double(),
        insert(copy.deepcopy(plain)),
        insert(copy.deepcopy(plain)).double(),
    )
    wanted, own = gradients(exact, x.double()), gradients(double, x.double())
    for key, gradient in wanted.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-5, atol=1e-6, msg=key)
    before, after = gradients(plain, x), gradients(model, x)
    for key, gradient in wanted.items():
        error, least = (before[key] - gradient).norm(), 1e-6 * gradient.norm()
        assert (after[key] - gradient).norm() <= 2 * max(error, least), key


@every_network
def test_this_comparison_can_fail(name):
    model, x = make(name).eval(), images(name)
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="gate='sigmoid' is not the identity"):
        insert(model, gate="sigmoid")
    assert not equal(answers(plain, x), answers(model, x))


@every_network
def test_attention_counts_and_goes_again(name):
    """Every block multiplies what it should: a mask that is a constant scales the end of the branch."""
    model, x = make(name).eval(), images(name)
    plain = copy.deepcopy(model)
    insert(model)
    with record_attention(model) as records:
        answers(model, x)
    assert list(records) == blocks(model)
    for block in (module for module in model.modules() if isinstance(module, Cbam2)):
        randomise(block)
    assert not equal(answers(plain, x), answers(model, x))
    assert remove(model) is model
    assert type(model) is type(plain) and blocks(model) == []
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in plain.named_modules()}
    assert equal(answers(plain, x), answers(model, x))


def test_attention_sits_at_the_end_of_the_branch():
    """A spatial mask that is 2·sigmoid(a large number) = 2 doubles the branch, after its last norm, before the add."""
    for name in ("torchvision resnet18", "transformers resnet", "transformers convnextv2", "torchvision convnext"):
        model = insert(make(name)).eval()
        seat = timm_cbam2.insertion.hosts.seats(model)[-1]
        plain = remove(copy.deepcopy(model)).get_submodule(seat.name)
        with torch.no_grad():
            seat.attention.channel.fc2.weight.fill_(1e6)
        x = torch.randn(2, seat.attention.channel.fc1.in_channels, 7, 7)
        layer = timm_cbam2.insertion.hosts.last_layer(plain, seat.kind)
        with torch.no_grad():
            for tensor in (layer.weight, layer.bias):
                tensor.mul_(2)
        torch.testing.assert_close(seat.host(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, twin",
    [
        ("timm resnet18", "resnet18_cbam2"),
        ("timm resnet50", "resnet50_cbam2"),
        ("timm convnext", "test_convnext_cbam2"),
        ("timm convnextv2", "test_convnext2_cbam2"),
        ("timm resnet20", "resnet20_cbam2"),
    ],
)
def test_a_timm_network_becomes_its_registered_twin(name, twin, tmp_path):
    model, x = insert(make(name), fusion="static").eval(), images(name)
    randomise(model)
    assert type(model) is type(timm.create_model(twin)) and model.pretrained_cfg["architecture"] == twin
    timm_cbam2.save(model, tmp_path / "saved")
    for other in (
        timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval(),
        timm_cbam2.Cbam2ForImageClassification.from_timm(model).timm_model,
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        assert torch.equal(other(x), model(x))
    plain = remove(model)
    timm_cbam2.save(plain, tmp_path / "plain")
    assert torch.equal(load(str(tmp_path / "plain")).eval()(x), plain(x))  # timm itself cannot before 1.0.31


def test_whole_stages_are_a_registered_model_and_others_are_not():
    assert type(insert(make("timm resnet18"), "layer[34].*")) is timm_cbam2.ResNetCbam2
    part = insert(make("timm resnet18"), ["layer3.0", "layer4.1"])
    assert type(part) is timm.models.ResNet and blocks(part) == ["layer3.0.se", "layer4.1.se"]
    assert blocks(insert(part, "layer1.0")) == ["layer1.0.se", "layer3.0.se", "layer4.1.se"]


def test_other_attention_is_refused_or_replaced():
    with pytest.raises(ValueError, match=r"layer1.0, .* have another attention layer \(SEModule\); pass replace=True"):
        insert(timm.create_model("seresnet50"))
    model = timm.create_model("resnet18", block_args=dict(attn_layer="eca"))
    with pytest.raises(ValueError, match="EcaModule"):
        insert(model)
    with pytest.warns(UserWarning, match="replaces 8 EcaModule"):
        insert(model, replace=True)
    assert "block_args" not in model._model_args
    with pytest.warns(UserWarning, match="replaces 16 SEModule"):
        model = insert(timm.create_model("seresnet50"), replace=True)
    assert model.pretrained_cfg["architecture"] == "resnet50_cbam2" and len(blocks(model)) == 16
    assert remove(model).layer1[0].se is None


def test_a_network_of_ones_own():
    for where, names in (
        ("body", ["body.cbam2"]),
        (["stem", "layer.*"], ["stem.cbam2", "layer.0.cbam2", "layer.1.cbam2"]),
        (lambda name, module: isinstance(module, nn.Conv2d), None),
        ("body.*", ["body.0.cbam2", "body.1.cbam2", "body.2.cbam2"]),
    ):
        model = randomise(Own()).train()
        plain = copy.deepcopy(model)
        insert(model, where)
        assert names is None or blocks(model) == names
        assert equal(answers(plain, images()), answers(model, images()))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items())
        assert torch.equal(copy.deepcopy(model).eval()(images()), pickle.loads(pickle.dumps(model)).eval()(images()))
        assert equal(answers(remove(model), images()), answers(plain, images()))
    assert blocks(insert(Own(), "stem", channels=8)) == ["stem.cbam2"]
    assert blocks(insert(Own(), "stem", example=torch.rand(1, 3, 17, 19))) == ["stem.cbam2"]


def test_finding_channels_leaves_no_trace():
    class Noisy(Own):
        calls = 0

        def forward(self, x):
            self.body[1].running_mean += 1  # whatever it does in evaluation too
            return super().forward(x + torch.rand(1) + random.random() + np.random.rand())

    model = randomise(Noisy()).train()
    model.body[1].eval()
    before = copy.deepcopy(model.state_dict())
    probe = timm_cbam2.insertion.probe.Probe(model)
    state, others = torch.random.get_rng_state(), (random.getstate(), np.random.get_state()[1].tolist())
    assert probe.shapes({"stem": model.stem}) == {"stem": [(1, 8, 62, 62)]}
    assert torch.equal(state, torch.random.get_rng_state())
    assert others == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert model.training and not model.body[1].training and not model.stem._forward_hooks
    assert blocks(insert(model, "stem")) == ["stem.cbam2"]


def test_dtype_modes_and_frozen_parameters_stay():
    model = make("torchvision resnet18").to(torch.bfloat16).eval().requires_grad_(False)
    model.layer4.train()
    insert(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.layer1[0].cbam2.training and model.layer4[0].cbam2.training and not model.training
    assert all(p.requires_grad == (".cbam2." in name) for name, p in model.named_parameters())
    double = insert(make("timm resnet18").double())
    assert {p.dtype for p in double.parameters()} == {torch.float64}


class Odd(nn.Module):
    """Its convolution's weights are used, and it is never called; or it is called in turn with other shapes."""

    def __init__(self):
        super().__init__()
        self.used, self.act, self.wide = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1)
        self.parts = nn.ModuleDict({"a": nn.Conv2d(6, 6, 1)})

    def forward(self, x):
        return self.act(self.wide(self.act(x))) * self.used.weight.sum()


def test_mistakes_are_named_and_change_nothing():
    cases = [
        (Own(), dict(), "has no residual block .* where='body.*'"),
        (Own(), dict(where="boody"), "where='boody' names no module; near it are body"),
        (Own(), dict(where=[]), "give names of modules, or a function"),
        (Own(), dict(where=lambda name, module: False), "true for no module"),
        (Own(), dict(where="layer"), "a ModuleList cannot hold a block"),
        (Own(), dict(where="fc"), "fc gave 1x4; CBAM2 goes after modules that give"),
        (Own(), dict(where="stem", gate="open"), "gate='open' is not allowed"),
        (Own(), dict(where="stem", kernel_sises=3), "Did you mean kernel_sizes"),
        (Own(), dict(where="stem", channels={"steam": 3}), "channels names 'steam', where no block goes"),
        (Own(), dict(where="stem", channels="many"), "channels='many' is not allowed"),
        (Own(), dict(where="stem", example=torch.rand(1, 5, 9, 9)), r"ran on no noise .*example="),
        (Odd(), dict(where="used"), "used was not called"),
        (Odd(), dict(where="act"), r"called with \[3, 6\] channels in turn"),
        (Odd(), dict(where="parts"), "a ModuleDict cannot hold a block"),
        (insert(Own(), "stem"), dict(where="stem"), "stem hold CBAM2 already; take it out first"),
        (timm.create_model("resnet20_cbam2"), dict(), "hold CBAM2 already"),
        (nn.DataParallel(Own()), dict(where="module.stem"), "insert into its .module first"),
        (torch.compile(Own()), dict(where="stem"), "insert into the model itself"),
    ]
    for model, options, message in cases:
        keys, found = list(model.state_dict()), blocks(model)
        with pytest.raises(ValueError, match=message):
            insert(model, **options)
        assert list(model.state_dict()) == keys and blocks(model) == found
        assert not any(module._forward_hooks for name, module in model.named_modules() if name != "stem")


def test_a_module_used_in_another_way_than_by_being_called_is_found_out():
    class Walks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 3, 1))
            self.body = Own()

        def forward(self, x):
            for part in self.body.children():  # its parts, in turn, among them what is added
                x = part(x) if isinstance(part, (nn.Conv2d, Cbam2)) else x
            return self.inner(x[:, :3]) * len(list(self.inner.children()))

    model = randomise(Walks()).eval()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="outputs change with these blocks at the identity"):
        insert(model, "inner")
    assert list(model.state_dict()) == keys
