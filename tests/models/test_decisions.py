"""Options for decisions that live: norms before them, learned maps, routing by position. Off, a block is as it was."""

import copy
import json
import warnings

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from randomise import randomise
from timm.utils import ModelEmaV3
from transformers import AutoModelForImageClassification

import timm_cbam2
from timm_cbam2 import Cbam2, Cbam2Config, SpatialAttn, record_attention, resolve_options
from timm_cbam2.models.decisions_cbam2 import DecisionNorm, statistics_kept
from timm_cbam2.models.saved_cbam2 import OLD_TIMM
from timm_cbam2.training.optimise import freeze, keep_frozen

OPTIONS = [
    dict(center_spatial=True),
    dict(squeeze_norm=True),
    dict(router_norm=True),
    dict(router_norm=True, fusion="static"),
    dict(learned_maps=3),
    dict(learned_maps=2, router_pool="moments", center_spatial=True),
    dict(router_pool="none"),
    dict(router_pool="none", coords=False, router_norm=True, learned_maps=2, squeeze_norm=True, center=True),
]


def _block(options, dtype=torch.float32, **more):
    torch.manual_seed(0)
    return Cbam2(12, **options, **more).to(dtype)


def _features(dtype=torch.float32, batch=3):
    return torch.randn(batch, 12, 7, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fresh_is_the_identity_and_trains(options):
    block, x = _block(options, gate="unit_sigmoid").train(), _features().requires_grad_()
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.channel.fc2.weight.grad.abs().sum() > 0 and block.spatial.branches[0].pw.weight.grad.abs().sum() > 0
    randomise(block)
    assert not torch.allclose(block(x), x)
    block.reset_parameters()
    assert torch.equal(block(x), x)
    assert block(x[:1]).isfinite().all() and block(x[:1, :, :1, :1]).isfinite().all()  # nothing to measure a spread of


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2"])
def test_normalised_decisions_start_quiet(name):
    """At full strength a fresh router answers by chance: its weights are near to even instead, in a network too."""
    model = timm.create_model(name, cbam2=dict(router_norm=True, squeeze_norm=True)).train()
    norms = [m for m in model.modules() if isinstance(m, DecisionNorm)]
    assert norms and all((norm.weight == norm.gain).all() and norm.gain == 0.1 for norm in norms)
    with record_attention(model) as records:
        model(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    seen = next(iter(records.values()))
    assert (seen.fusion_weights - 1 / 2).abs().max() < 0.1 and (seen.router_weights - 1 / 4).abs().max() < 0.1
    nn.init.ones_(norms[0].weight)
    norms[0].reset_parameters()
    assert (norms[0].weight == 0.1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_path_agrees(options):
    """In eval mode: plain, with a hook on a branch, reparameterized, scripted, exported, in half precision."""
    block, x = _block(options), _features()
    randomise(block)
    block.eval()
    y, attention = block(x, return_attention=True)
    torch.testing.assert_close(block(x), y)
    by_position = options.get("router_pool") == "none"
    assert attention.router_weights.shape == ((3, 4, 7, 6) if by_position else (3, 4))
    torch.testing.assert_close(attention.router_weights.sum(1), torch.ones_like(attention.router_weights[:, 0]))
    handle = block.spatial.branches[1].register_forward_hook(lambda *args: None)
    torch.testing.assert_close(block(x), y)
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(block)(x), y)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), y)
    torch.testing.assert_close(copy.deepcopy(block).bfloat16()(x.bfloat16()).float(), y, rtol=0.1, atol=0.1)
    block.spatial.reparameterize()
    torch.testing.assert_close(block(x), y)


def test_formulas():
    """Written out once more: each option against plain torch, with what is stored in the state dict."""
    x = _features()
    block = _block(dict(squeeze_norm=True, router_norm=True, router_pool="none", learned_maps=2, center_spatial=True))
    randomise(block)
    block.eval()
    y, found = block(x, return_attention=True)
    s = block.state_dict()

    def bn(z, name):
        return F.batch_norm(z, *(s[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")))

    def linear(z, name):
        bias = s.get(f"{name}.bias")
        return F.linear(z, s[f"{name}.weight"].flatten(1), bias)

    both = bn(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), "channel.norm")
    logits = linear(F.relu(linear(both, "channel.router.fc1")), "channel.router.fc2")
    mix = bn(logits, "channel.router.norm").softmax(1)
    torch.testing.assert_close(found.fusion_weights, mix)
    hidden = [F.relu(linear(part, "channel.fc1")) for part in both.chunk(2, 1)]
    z = linear(mix[:, :1] * hidden[0] + mix[:, 1:] * hidden[1], "channel.fc2")
    channel_mask = torch.sigmoid(z / block.channel.temperature(z.dtype))[:, :, None, None]
    torch.testing.assert_close(found.channel_mask, channel_mask)

    u = x * channel_mask
    across = torch.linspace(-1, 1, 6).expand(3, 1, 7, 6)
    down = torch.linspace(-1, 1, 7)[:, None].expand(3, 1, 7, 6)
    learned = bn(F.conv2d(u, s["spatial.learned.conv.weight"]), "spatial.learned.norm")
    maps = torch.cat([u.mean(1, keepdim=True), u.amax(1, keepdim=True), across, down, learned], 1)
    assert s["spatial.branches.0.dw.weight"].shape == (6, 1, 3, 3)
    logits = F.conv2d(maps, s["spatial.router.conv.weight"], padding=1)
    weights = bn(logits, "spatial.router.norm").softmax(1)
    torch.testing.assert_close(found.router_weights, weights)
    z = (weights * torch.cat([branch(maps) for branch in block.spatial.branches], 1)).sum(1, keepdim=True)
    z = z - z.mean((2, 3), keepdim=True)
    mask = torch.sigmoid(z / block.spatial.temperature(z.dtype))
    torch.testing.assert_close(found.spatial_mask, mask)
    torch.testing.assert_close(y, u * mask)


def test_center_spatial_leaves_channels_alone():
    x = _features()
    torch.manual_seed(0)
    blocks = {name: Cbam2(12, **{name: True}) for name in ("center", "center_spatial")}
    for block in blocks.values():
        torch.manual_seed(2)
        randomise(block)
    whole, part = (blocks[name](x, return_attention=True)[1] for name in ("center", "center_spatial"))
    assert not torch.allclose(whole.channel_mask, part.channel_mask)
    centred = Cbam2(12, center=True).channel(x, return_attention=True)[1].logit().mean(1)
    assert centred.abs().max() < 1e-5
    z = part.spatial_mask.double().logit().mean((2, 3))
    assert z.abs().max() < 1e-5


def test_statistics():
    """Training moves them once for a pass; a recorded pass, a frozen norm and eval mode leave them as they are."""
    options = dict(squeeze_norm=True, router_norm=True, learned_maps=2)
    block, x = _block(options).train(), _features(batch=8)
    norms = {n: m for n, m in block.named_modules() if isinstance(m, nn.BatchNorm1d)}
    assert set(norms) == {"channel.norm", "channel.router.norm", "spatial.router.norm", "spatial.learned.norm"}
    before = {n: (m.running_mean.clone(), m.running_var.clone()) for n, m in norms.items()}
    with record_attention(nn.Sequential(block)):
        block(x)
    both = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
    torch.testing.assert_close(norms["channel.norm"].running_mean, 0.1 * both.mean(0))
    torch.testing.assert_close(norms["channel.norm"].running_var, 0.9 + 0.1 * both.var(0))
    moved = {n: m.running_mean.clone() for n, m in norms.items()}
    assert all(not torch.equal(moved[n], before[n][0]) for n in norms)
    with statistics_kept(block):
        inside = block(x)
    assert all(torch.equal(m.running_mean, moved[n]) and m.track_running_stats for n, m in norms.items())
    torch.testing.assert_close(inside, block(x))  # it looked at the batch as in training
    moved = {n: m.running_mean.clone() for n, m in norms.items()}
    block.eval()(x)
    assert all(torch.equal(m.running_mean, moved[n]) for n, m in norms.items())
    half = _block(options).bfloat16().train()
    half(x.bfloat16())
    assert half.channel.norm.running_mean.dtype == torch.bfloat16 and half.channel.norm.running_mean.abs().sum() > 0


ALL = dict(router_pool="none", router_norm=True, squeeze_norm=True, learned_maps=2, center_spatial=True)


def test_norms_follow_the_rules_of_training():
    """Frozen ones keep their statistics, SyncBN takes their place under the same keys, an average takes them along."""
    network = timm.create_model("test_resnet_cbam2", num_classes=3, cbam2=ALL)
    norms = [m for m in network.modules() if isinstance(m, DecisionNorm)]
    blocks = sum(isinstance(m, Cbam2) for m in network.modules())
    assert len(norms) == 4 * blocks > 0
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's zeros would give attention nothing to see
    x = torch.randn(4, 3, 32, 32)
    freeze(network, "head")
    network.train()
    keep_frozen(network)
    network(x)
    assert all(not m.training and not m.running_mean.any() for m in norms)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    average = ModelEmaV3(network, decay=0.5)
    network.train()(x)
    assert all(m.running_mean.any() for m in norms)
    average.update(network)
    own, averaged = network.state_dict(), average.module.state_dict()
    name = "layer1.0.se.channel.norm.running_mean"
    torch.testing.assert_close(averaged[name], own[name] / 2)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(network).state_dict().keys() == own.keys()


OFF = dict(center_spatial=False, squeeze_norm=False, router_norm=False, learned_maps=0, router_pool="avg")


def _chosen(options):
    return {name: options[name] for name in OFF}


def test_absent_in_a_saved_configuration_means_off(tmp_path):
    """A folder from before there were these options, opened by both libraries, beside a model that is made anew."""
    assert _chosen(resolve_options({}, saved=True)) == OFF
    old = timm.create_model("resnet20_cbam2", cbam2=dict(OFF, router_channels=8))
    randomise(old)
    timm_cbam2.save(old, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for options in (dict(router_channels=8), dict(config["model_args"]["cbam2"], router_pool="avg")):
        config["model_args"]["cbam2"] = {k: v for k, v in options.items() if k not in OFF or k == "router_pool"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        x = torch.randn(2, 3, 32, 32)
        for opened in (
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
            AutoModelForImageClassification.from_pretrained(tmp_path).timm_model,
        ):
            assert _chosen(opened.cbam2_options) == OFF and opened.cbam2_options["router_channels"] == 8
            torch.testing.assert_close(opened.eval()(x), old.eval()(x))
    del config["model_args"]
    assert _chosen(Cbam2Config.from_dict(config).model_args["cbam2"]) == OFF


def test_decisions_of_new_networks_are_measured_over_the_batch_where_the_network_itself_is():
    on = {**OFF, "center_spatial": True, "squeeze_norm": True, "router_norm": True}
    for name, expected in {"resnet20_cbam2": on, "test_resnet_cbam2": on, "test_convnext_cbam2": OFF}.items():
        assert _chosen(timm.create_model(name).cbam2_options) == expected
        assert _chosen(Cbam2Config(architecture=name).model_args["cbam2"]) == expected
        inserted = timm_cbam2.insert(timm.create_model(name.removesuffix("_cbam2")))
        blocks = [module for module in inserted.modules() if isinstance(module, Cbam2)]
        assert blocks and {block.channel.norm is not None for block in blocks} == {expected["squeeze_norm"]}
    frozen = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    timm_cbam2.insert(frozen)
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in frozen.modules())


def test_a_model_of_given_sizes_becomes_torchscript():
    """What it was built with, all lists of four, is not taken for the type of what it tells of itself."""
    sizes = dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))
    model = timm.create_model("convnext_atto_cbam2", **sizes).eval()
    assert model._model_args == {**sizes, "cbam2": model.cbam2_options}
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.skipif(OLD_TIMM, reason="timm before 1.0.31 keeps no arguments")
def test_timms_own_saving_tells_every_option(tmp_path):
    """What a model has that was made anew is written by timm, too, though its caller gave one option or none."""
    for number, given in enumerate((None, dict(router_channels=8, learned_maps=2))):
        model = timm.create_model("resnet20_cbam2", cbam2=given)
        assert model.cbam2_options == resolve_options(given)
        randomise(model)
        folder = tmp_path / str(number)
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        told = json.loads((folder / "config.json").read_text())["model_args"]["cbam2"]
        assert told.keys() == model.cbam2_options.keys()
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert again.cbam2_options == model.cbam2_options
        x = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_a_network_with_all_of_them():
    options = ALL
    network = timm.create_model("test_resnet_cbam2", num_classes=3, cbam2=options)
    plain = timm.create_model("test_resnet", num_classes=3)
    assert not plain.load_state_dict({k: v for k, v in network.state_dict().items() if ".se." not in k}).missing_keys
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network.eval()(x), plain.eval()(x))  # the identity at its start
    randomise(network)
    again = timm.create_model("test_resnet_cbam2", num_classes=3, cbam2=options)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again.eval()(x), network.eval()(x))


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(learned_maps=-1), "learned_maps=-1 is not allowed"),
        (dict(learned_maps=True), "learned_maps=True is not allowed"),
        (dict(router_norm=1), "router_norm=1 is not allowed"),
        (dict(router_pool="no"), "router_pool='no' is not allowed; give one of avg, moments, none"),
    ],
)
def test_mistakes(options, text):
    with pytest.raises(ValueError, match=text):
        Cbam2(8, **options)
    with pytest.raises(ValueError, match="learned_maps=2 is not allowed without in_channels"):
        SpatialAttn(learned_maps=2)
