"""timm's own weights under attention at identity: the twin's logits bit for bit, and nothing silently random."""

import os
import re
import warnings

import pytest
import timm
import torch
from hf_cache import add_to_cache
from randomise import randomise
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

import timm_cbam2
from timm_cbam2 import Cbam2
from timm_cbam2.models.saved_cbam2 import OLD_TIMM

TWINS = {
    "resnet18": dict(num_classes=1000),
    "resnet10t": dict(num_classes=10),
    "test_resnet": dict(num_classes=12, in_chans=1),
    "convnext_atto": dict(num_classes=1000),
    "convnextv2_atto": dict(num_classes=10),
}
every_twin = pytest.mark.parametrize("name", TWINS)


def images(channels=3):
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each twin, a folder as timm writes it, all weights and statistics random."""
    out = {}
    for name, kwargs in TWINS.items():
        twin = randomise(timm.create_model(name, **kwargs)).eval()
        folder = tmp_path_factory.mktemp(name)
        arguments = {key: value for key, value in kwargs.items() if key != "num_classes"}
        save_for_hf(twin, folder, safe_serialization=True, model_args=arguments)  # which it knows since 1.0.31
        out[name] = (twin, folder)
    return out


def warm(name, folder, weights=None, **kwargs):
    """Warm start from a folder: timm's way to say where the weights of a tag are."""
    cfg = dict(num_classes=TWINS[name]["num_classes"], input_size=(TWINS[name].get("in_chans", 3), 224, 224))
    overlay = dict(cfg, file=str(weights or folder / "model.safetensors"))
    return timm.create_model(f"{name}_cbam2", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@every_twin
def test_logits_equal_the_twins_bit_for_bit(name, folders):
    twin, folder = folders[name]
    x = images(TWINS[name].get("in_chans", 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = warm(name, folder)
    assert any(isinstance(module, Cbam2) for module in model.modules())
    assert torch.equal(model(x), twin(x))
    with pytest.warns(UserWarning, match="changes the backbone's function"):
        other = warm(name, folder, cbam2=dict(gate="sigmoid"))
    assert not torch.equal(other(x), twin(x)), "this comparison cannot fail"


@every_twin
def test_features_equal_the_twins(name, folders):
    twin, folder = folders[name]
    x = images(TWINS[name].get("in_chans", 3))
    kwargs = {k: v for k, v in TWINS[name].items() if k != "num_classes"}
    model = warm(name, folder, features_only=True, **kwargs)
    expected = timm.create_model(
        name,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(folder / "model.safetensors")),
        **kwargs,
    ).eval()
    for one, other in zip(model(x), expected(x)):
        assert torch.equal(one, other)
    assert torch.equal(model(x)[-1], twin.forward_intermediates(x, intermediates_only=True)[-1])


@every_twin
def test_another_number_of_classes_keeps_the_backbone(name, folders):
    twin, folder = folders[name]
    model = warm(name, folder, num_classes=7)
    x = images(TWINS[name].get("in_chans", 3))
    assert torch.equal(model.forward_features(x), twin.forward_features(x))
    assert model(x).shape == (2, 7)
    assert torch.equal(warm(name, folder, num_classes=0).forward_features(x), twin.forward_features(x))


def test_one_channel_is_adapted_as_timm_does(folders):
    _, folder = folders["resnet18"]
    overlay = dict(file=str(folder / "model.safetensors"))
    expected = timm.create_model("resnet18", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(warm("resnet18", folder, in_chans=1)(images(1)), expected(images(1)))


DAMAGES = {
    "missing": lambda w: w.pop(next(k for k in w if "conv1.weight" in k and k.startswith("layer"))),
    "extra": lambda w: w.update({"layer9.0.weight": torch.zeros(3)}),
    "shape": lambda w: w.update({"layer1.0.bn1.weight": torch.ones(3)}),
    "attention in part": lambda w: w.update({"layer1.0.se.channel.temperature.raw": torch.zeros(1)}),
}


@pytest.mark.parametrize("kwargs", [dict(), dict(num_classes=7), dict(features_only=True), dict(in_chans=1)], ids=str)
@pytest.mark.parametrize(
    "damage, named",
    [
        ("missing", "missing: layer1.0.conv1.weight"),
        ("extra", "unexpected: layer9.0.weight"),
        ("shape", r"layer1.0.bn1.weight: shape \(3,\), not \(64,\)"),
        ("attention in part", "missing: layer1.0.se"),
    ],
)
def test_damaged_files_are_refused_with_the_keys_named(damage, named, kwargs, folders, tmp_path):
    weights = load_file(folders["resnet18"][1] / "model.safetensors")
    DAMAGES[damage](weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=named):
        warm("resnet18", None, tmp_path / "model.safetensors", **kwargs)


@pytest.mark.parametrize("key", ["head.norm.weight", "stages.1.blocks.0.mlp.fc1.weight"])
def test_a_damaged_convnext_is_refused_too(key, folders, tmp_path):
    weights = load_file(folders["convnext_atto"][1] / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"missing: {key}"):
        warm("convnext_atto", None, tmp_path / "model.safetensors")


def test_fcmae_tags_lack_the_heads_norm_as_in_timm(folders, tmp_path):
    twin, folder = folders["convnextv2_atto"]
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("head.")}
    save_file(weights, tmp_path / "model.safetensors")
    overlay = dict(file=str(tmp_path / "model.safetensors"))
    tag = "convnextv2_atto_cbam2.from_fcmae"
    model = timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert model.num_classes == 0 and torch.equal(model.forward_features(images()), twin.forward_features(images()))
    del weights["stem.0.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: stem.0.bias"):
        timm.create_model(tag, pretrained=True, pretrained_cfg_overlay=overlay)


def test_the_original_authors_format_is_remapped(folders, tmp_path):
    twin, folder = folders["convnext_atto"]
    renamed = {}
    for key, value in load_file(folder / "model.safetensors").items():
        key = key.replace("stem.", "downsample_layers.0.").replace(".blocks", "").replace("conv_dw", "dwconv")
        parts = key.split(".")
        if "downsample" in parts:
            key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        key = key.replace("mlp.fc", "pwconv").replace("head.fc.", "head.").replace("head.norm.", "norm.")
        renamed[key] = value
    torch.save({"model": renamed}, tmp_path / "weights.pth")
    assert torch.equal(warm("convnext_atto", None, tmp_path / "weights.pth")(images()), twin(images()))


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2", "resnet20_cbam2"])
def test_a_checkpoint_of_our_own_stays_strict(name, tmp_path):
    model = randomise(timm.create_model(name, num_classes=10)).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    options = {}
    if OLD_TIMM and model.cbam2_options["router_norm"]:  # it saves no options, which are not guessed
        with pytest.raises(ValueError, match="give that; timm_cbam2.save keeps it") as caught:
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        told = re.search(r"cbam2=dict\((.*)\)", str(caught.value))[1]
        options = {"cbam2": {word.split("=")[0]: word.endswith("True") for word in told.split(", ")}}
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **options).eval()
    assert torch.equal(again(images()), model(images()))
    # Copied: older versions of safetensors leave them in the file, which is written anew.
    weights = {key: value.clone() for key, value in load_file(tmp_path / "model.safetensors").items()}
    attention = [key for key in weights if ".se." in key or ".attn." in key]
    for removed in (attention, attention[:1]):
        save_file({k: v for k, v in weights.items() if k not in removed}, tmp_path / "model.safetensors")
        for kwargs in (dict(), dict(num_classes=3), dict(features_only=True)):
            with pytest.raises(ValueError, match="missing: "):
                timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **kwargs)


def offline(home):
    return {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


def test_tags_load_from_timms_repository(script, folders, tmp_path):
    twin, folder = folders["resnet18"]
    add_to_cache(folder, tmp_path, "timm/resnet18.a2_in1k")
    save_file({"logits": twin(images()).detach()}, tmp_path / "logits.safetensors")
    code = (
        "import timm, timm_cbam2, torch, sys; from safetensors.torch import load_file\n"
        "model = timm.create_model('resnet18_cbam2.from_a2_in1k', pretrained=True).eval()\n"
        "x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))\n"
        f"print(torch.equal(model(x), load_file({str(tmp_path / 'logits.safetensors')!r})['logits']))"
    )
    result = script(code, env=offline(tmp_path))
    assert result.out.strip() == "True", result.err


@pytest.mark.parametrize("name", ["resnet50_cbam2", "convnext_atto_cbam2.from_d2_in1k"])
def test_offline_with_nothing_cached_is_one_clear_sentence(script, name, tmp_path):
    code = (
        "import timm, timm_cbam2\nmodel = None\n"
        f"try: model = timm.create_model({name!r}, pretrained=True)\n"
        "except RuntimeError as error: print(error)\nassert model is None"
    )
    result = script(code, env=offline(tmp_path))
    assert result.code == 0, result.err
    message = result.out.strip()
    assert "\n" not in message and "could not be fetched from timm/" in message and "pretrained=False" in message


def test_default_tags_and_licences_are_the_twins():
    for name in timm.list_models("*_cbam2"):
        arch = name.removesuffix("_cbam2")
        if not timm.is_model(arch) or arch.startswith(("resnet20_", "resnet32_", "resnet44_", "resnet56_")):
            continue
        twin_tags = [t for t in timm.list_pretrained(arch) if t.startswith(f"{arch}.")]
        tags = timm.list_pretrained(f"{name}.from_*")
        assert sorted(tags) == sorted(t.replace(f"{arch}.", f"{name}.from_") for t in twin_tags)
        for tag in tags:
            cfg, source = timm.get_pretrained_cfg(tag), timm.get_pretrained_cfg(tag.replace("_cbam2.from_", "."))
            assert cfg.license == source.license and cfg.hf_hub_id == source.hf_hub_id
    cfg = timm.get_pretrained_cfg("convnextv2_tiny_cbam2.from_fcmae_ft_in1k")
    assert cfg.license == "cc-by-nc-4.0"
    assert timm_cbam2.__version__


@every_twin
def test_a_folder_and_a_file_of_plain_timm_start_transformers_models_and_timm_ones(name, folders, tmp_path):
    twin, folder = folders[name]
    x = images(TWINS[name].get("in_chans", 3))
    with pytest.raises(ValueError, match=f"{name}_cbam2 starts from plain weights of {name} with warm_start=True"):
        timm_cbam2.Cbam2ForImageClassification.from_pretrained(folder)
    model = timm_cbam2.Cbam2ForImageClassification.from_pretrained(folder, warm_start=True)
    assert model.config.num_labels == TWINS[name]["num_classes"] and torch.equal(model(x).logits, twin(x))
    model.save_pretrained(tmp_path / "saved")
    again = timm_cbam2.Cbam2ForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(x).logits, twin(x))
    other = timm_cbam2.Cbam2Model.from_pretrained(folder, warm_start=True)
    assert torch.equal(other(x).last_hidden_state, twin.forward_features(x))

    torch.save(twin.state_dict(), tmp_path / "plain.pth")
    with pytest.warns(UserWarning, match="These weights have no attention: it stays the identity"):
        model = timm.create_model(f"{name}_cbam2", checkpoint_path=str(tmp_path / "plain.pth"), **TWINS[name]).eval()
    assert torch.equal(model(x), twin(x))
    for changed, weights in (
        (randomise(model), twin.state_dict()),  # what it has learned would be kept, unasked
        (timm.create_model(f"{name}_cbam2", cbam2=dict(gate="sigmoid"), **TWINS[name]), twin.state_dict()),
        (timm.create_model(f"{name}_cbam2", **TWINS[name]), dict(list(twin.state_dict().items())[1:])),
    ):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: "):
            changed.load_state_dict(weights)
