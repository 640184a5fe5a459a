"""Every registered architecture is its timm twin with attention, in everything timm's models can do."""

import copy
import pickle
import warnings

import pytest
import timm
import torch
from randomise import randomise
from timm.models._manipulate import group_parameters
from transformers.initialization import no_init_weights

import timm_cbam2
from timm_cbam2 import Cbam2

SMALL_RESNET = dict(layers=(1, 1, 1, 1), channels=(16, 16, 24, 32))
SMALL_CONVNEXT = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
REPRESENTATIVES = {
    "resnet18": SMALL_RESNET,  # BasicBlock
    "resnet50": SMALL_RESNET,  # Bottleneck
    "resnet26d": SMALL_RESNET,  # deep stem, average pool on the shortcut
    "resnet10t": {},  # deep tiered stem
    "resnetaa50d": SMALL_RESNET,
    "resnetblur18": SMALL_RESNET,
    "resnet50_gn": dict(layers=(1, 1, 1, 1), channels=(32, 32, 32, 32)),
    "wide_resnet50_2": SMALL_RESNET,
    "resnext50_32x4d": SMALL_RESNET,
    "test_resnet": {},
    "resnet20": {},
    "convnext_tiny": SMALL_CONVNEXT,
    "convnext_atto": SMALL_CONVNEXT,  # convolutional MLP
    "convnextv2_atto": SMALL_CONVNEXT,
    "convnext_atto_rms": SMALL_CONVNEXT,
    "convnext_atto_ols": SMALL_CONVNEXT,
    "convnext_large_mlp": dict(SMALL_CONVNEXT, head_hidden_size=20),
    "convnext_tiny_hnf": SMALL_CONVNEXT,  # norm before the pooling
    "test_convnext": {},
}
IS_RESNET = [name for name in REPRESENTATIVES if "convnext" not in name]
SIZE = 64
representatives = pytest.mark.parametrize("name", REPRESENTATIVES)


def create(name, attention=True, **kwargs):
    arguments = {"num_classes": 10, **REPRESENTATIVES[name], **kwargs}
    return timm.create_model(f"{name}_cbam2" if attention else name, **arguments)


def images(channels=3, size=SIZE, count=2):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def blocks_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Cbam2)}


def test_registered_on_import_and_not_before_twice_and_in_silence(script):
    code = (
        "import warnings; warnings.simplefilter('error'); import timm\n"
        "assert not timm.list_models('*_cbam2') and not timm.is_model('resnet20')\n"
        "import importlib, timm_cbam2, timm_cbam2.models.resnet_cbam2 as ours\n"
        "importlib.reload(ours); importlib.reload(timm_cbam2)\n"
        "print(len(timm.list_models('*_cbam2')), len(timm.list_pretrained('*_cbam2.from_*')))"
    )
    result = script(code)
    assert result.code == 0 and result.err == "", result.err
    models, tags = map(int, result.out.split())
    assert models >= 75 and tags >= 209  # with timm 1.0.22


@pytest.mark.parametrize("name", timm.list_models("*_cbam2"))
def test_weights_are_those_of_the_twin_and_attention(name):
    with no_init_weights(), warnings.catch_warnings():  # what a tensor on the meta device holds takes half the time
        warnings.simplefilter("ignore")  # timm initialises there nonetheless
        model = timm.create_model(name, device="meta")
        twin = timm.create_model(name.removesuffix("_cbam2"), device="meta")
    slot = ".attn" if "convnext" in name else ".se"
    blocks = blocks_of(model)
    kinds = ("BasicBlock", "Bottleneck", "ConvNeXtBlock")
    residual_blocks = [n for n, m in twin.named_modules() if type(m).__name__ in kinds]
    assert sorted(blocks) == sorted(n + slot for n in residual_blocks)
    prefixes = tuple(f"{block}." for block in blocks)
    shapes = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    assert shapes == {key: value.shape for key, value in twin.state_dict().items()}
    cfg, twin_cfg = model.pretrained_cfg, twin.pretrained_cfg
    for key in ("mean", "std", "input_size", "crop_pct", "interpolation", "num_classes", "first_conv", "classifier"):
        assert cfg[key] == twin_cfg[key]
    if twin_cfg.get("hf_hub_id"):
        assert cfg["tag"] == f"from_{twin_cfg['tag']}" and cfg["hf_hub_id"] == twin_cfg["hf_hub_id"]
        assert cfg.get("license") == twin_cfg.get("license")


@representatives
def test_forward_and_a_gradient_for_every_parameter(name):
    model = randomise(create(name)).train()
    out = model(images(count=6))  # of two images a norm keeps only which is larger
    assert out.shape == (6, 10)
    out.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@representatives
def test_a_fresh_model_is_the_identity_beside_its_twin_and_other_gates_are_not(name):
    twin = randomise(create(name, attention=False)).eval()
    for gate, equal in (("unit_sigmoid", True), ("sigmoid", False)):
        model = create(name, cbam2=dict(gate=gate)).eval()
        result = model.load_state_dict(twin.state_dict(), strict=False)
        assert not result.unexpected_keys and all(".se." in k or ".attn." in k for k in result.missing_keys)
        assert torch.equal(model(images()), twin(images())) == equal


@representatives
def test_features_only_and_forward_intermediates(name):
    model = randomise(create(name)).eval()
    features = randomise(create(name, features_only=True)).eval()
    twin = create(name, attention=False, features_only=True)
    assert features.feature_info.reduction() == twin.feature_info.reduction()
    assert features.feature_info.channels() == twin.feature_info.channels()
    flattened = {
        key.replace(".", "_", 1) if key.startswith("stages.") else key: v for key, v in model.state_dict().items()
    }
    features.load_state_dict(flattened, strict=False)
    maps = features(images())
    final, intermediates = model.forward_intermediates(images())
    assert len(maps) == len(intermediates) == len(features.feature_info.channels())
    info = features.feature_info
    for one, other, channels, reduction in zip(maps, intermediates, info.channels(), info.reduction()):
        assert torch.equal(one, other) and one.shape == (2, channels, SIZE // reduction, SIZE // reduction)
    assert torch.equal(final, model.forward_features(images()))
    early = model.forward_intermediates(images(), indices=[1], intermediates_only=True, stop_early=True)
    assert len(early) == 1 and torch.equal(early[0], intermediates[1])
    getter = create(name, features_only=True, feature_cls="getter", out_indices=[0, 2])
    assert [m.shape for m in getter(images())] == [maps[0].shape, maps[2].shape]


@representatives
def test_inputs_heads_and_rates(name):
    assert create(name, in_chans=1)(images(1)).shape == (2, 10)
    headless = create(name, num_classes=0)
    assert headless(images()).shape == (2, headless.head_hidden_size)
    model = create(name, drop_path_rate=0.2, drop_rate=0.1).train()
    assert model(images()).shape == (2, 10)
    weight = model.get_classifier().weight
    assert weight.shape[0] == 10
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7) and model.num_classes == 7
    assert blocks_of(copy.deepcopy(model)).keys() == blocks_of(pickle.loads(pickle.dumps(model))).keys() != set()


@pytest.mark.parametrize("name", [n for n in IS_RESNET if n != "resnet20"])
def test_output_stride(name):
    model = create(name, output_stride=8, features_only=True)
    twin = create(name, attention=False, output_stride=8, features_only=True)
    assert [m.shape for m in model(images())] == [m.shape for m in twin(images())]
    assert max(model.feature_info.reduction()) == 8


def test_output_stride_of_cifar_resnets():
    model = timm.create_model("resnet20_cbam2", output_stride=2, features_only=True)
    assert model.feature_info.reduction() == [1, 1, 2, 2]
    assert [m.shape[-1] for m in model(images(size=32))] == [32, 32, 16, 16]
    with pytest.raises(ValueError, match="output_stride=1"):
        timm.create_model("resnet20_cbam2", output_stride=1)


@representatives
def test_gradient_checkpointing_changes_nothing(name):
    results = []
    for enable in (False, True):
        model = randomise(create(name)).train()
        model.set_grad_checkpointing(enable)
        out = model(images())
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*results))


@representatives
@pytest.mark.filterwarnings("ignore")
def test_torchscript_as_the_twins_do(name):
    model = randomise(create(name, cbam2=dict(router_pool="moments"))).double().eval()
    scripted = torch.jit.script(model)
    with torch.jit.optimized_execution(False):  # optimising takes longer than all the rest
        for size in (SIZE, 96):
            x = images(size=size).double()
            torch.testing.assert_close(scripted(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "convnext_tiny"])
def test_fx_features(name):
    model = create(name, features_only=True, feature_cls="fx")
    twin = create(name, attention=False, features_only=True, feature_cls="fx")
    assert [m.shape for m in model(images())] == [m.shape for m in twin(images())]


@representatives
@pytest.mark.parametrize("coarse", [False, True])
def test_group_matcher_groups_attention_with_its_block(name, coarse):
    model, twin = create(name), create(name, attention=False)
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    expected = group_parameters(twin, twin.group_matcher(coarse), reverse=True)
    assert {key: groups[key] for key in expected} == expected
    for block in blocks_of(model):
        parent = block.rpartition(".")[0]
        its = {groups[key] for key in groups if key.startswith(f"{block}.")}
        assert its == {groups[key] for key in expected if key.startswith(f"{parent}.")}


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2", "resnet20_cbam2"])
def test_options_reach_every_block(name):
    model = timm.create_model(name, cbam2=dict(gate="sigmoid", kernel_sizes=[3, 7], fusion="static", temperature=2))
    for block in blocks_of(model).values():
        assert block.channel.gate == block.spatial.gate == "sigmoid"
        assert [b.dw.kernel_size[0] for b in block.spatial.branches] == [3, 7, 3]
        assert block.channel.fusion_logits is not None
        assert abs(block.spatial.temperature(torch.float32).item() - 2) < 1e-5
    assert model.cbam2_options["kernel_sizes"] == (3, 7) and model.cbam2_options["router_pool"] == "avg"
    with pytest.raises(ValueError, match="kernal_sizes.*kernel_sizes"):
        timm.create_model(name, cbam2=dict(kernal_sizes=(3, 7)))
    with pytest.raises(ValueError, match="gate='tanh'"):
        timm.create_model(name, cbam2=dict(gate="tanh"))


def test_another_attention_layer_in_the_slot_is_refused():
    with pytest.raises(ValueError, match="attn_layer='se'"):
        timm.create_model("test_resnet_cbam2", block_args=dict(attn_layer="se"))


def test_timm_initialisation_leaves_attention_as_it_starts():
    model = randomise(timm.create_model("test_resnet_cbam2"))
    model.init_weights()
    fresh = timm.create_model("test_resnet_cbam2")
    for block in [*blocks_of(model).values(), *blocks_of(fresh).values()]:
        assert not block.channel.fc2.weight.any() and not any(b.pw.weight.any() for b in block.spatial.branches)
        assert block.channel.temperature(torch.float32).item() == pytest.approx(1, rel=1e-6)


def test_the_same_seed_gives_the_same_weights():
    def build():
        torch.manual_seed(3)
        return timm.create_model("test_convnext_cbam2").state_dict()

    one, other = build(), build()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_half_precision_and_channels_last_networks():
    model = randomise(create("resnet18")).eval()
    expected = model(images())
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(images()), expected, rtol=1e-3, atol=1e-3)
    assert model.bfloat16()(images().bfloat16()).isfinite().all()


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("resnet5_cbam2")
    assert "resnet50_cbam2" in timm_cbam2.suggest("resnet5_cbam2")
