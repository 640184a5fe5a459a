"""One folder, two doors: what timm computes from a model folder, transformers computes too, and back."""

import json
import shutil

import pytest
import timm
import torch
from randomise import randomise
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
)

import timm_cbam2
from timm_cbam2 import Cbam2Backbone, Cbam2Config, Cbam2ForImageClassification, Cbam2Model
from timm_cbam2.hub.folder import save

ARCHITECTURES = ["test_resnet_cbam2", "test_convnext_cbam2"]
OPTIONS = dict(gate="sigmoid", kernel_sizes=(3, 4), router_pool="moments", learnable_temperature=False)
NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def change(folder, edit):
    """Rewrite the weights of a folder after `edit(weights)`."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def test_equal_logits_and_features(saved, images):
    folder, model = saved
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert type(classifier) is Cbam2ForImageClassification and not classifier.training
    through_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(through_timm(images), expected)
        assert torch.equal(classifier(images).logits, expected)
        features = AutoModel.from_pretrained(folder)(images, output_hidden_states=True)
        headless = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        assert torch.equal(features.last_hidden_state, headless.forward_features(images))
        assert torch.equal(features.pooler_output, headless(images))
        last, maps = headless.forward_intermediates(images)
        assert all(torch.equal(a, b) for a, b in zip(features.hidden_states, maps))
        assert len(features.hidden_states) == len(maps)
    assert classifier.config.id2label == dict(enumerate(NAMES)) and classifier.config.label2id["cat"] == 2


def test_the_cifar_networks(images, tmp_path):
    model = randomise(timm.create_model("resnet20_cbam2", num_classes=5)).eval()
    save(model, tmp_path / "model")
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert torch.equal(classifier(images).logits, model(images))
    backbone = Cbam2Backbone.from_pretrained(tmp_path / "model", out_features=["stem", "stage3"])
    expected = model.forward_intermediates(images, [0, 3], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images).feature_maps, expected))


def test_every_tensor_is_the_files_own(saved):
    folder, _ = saved
    weights = load_file(folder / "model.safetensors")
    for cls, lacks in ((Cbam2ForImageClassification, set()), (Cbam2Model, {"fc.weight", "fc.bias"})):
        model = cls.from_pretrained(folder)
        own = {key.removeprefix("timm_model."): value for key, value in model.state_dict().items()}
        missing = weights.keys() - own.keys()
        assert {key.removeprefix("head.") for key in missing} == lacks and own.keys() <= weights.keys()
        assert all(torch.equal(value, weights[key]) for key, value in own.items())
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        assert names == set(model.state_dict()), "a tensor that is in no file would come back as garbage"


def test_saved_by_transformers_opens_in_timm(saved, images, tmp_path):
    folder, model = saved
    Cbam2ForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == model.state_dict().keys()
    again = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True).eval()
    assert torch.equal(again(images), model(images)) and again.cbam2_options == model.cbam2_options
    assert again.pretrained_cfg["label_names"] == NAMES
    for cls in (Cbam2Model, Cbam2Backbone):
        cls.from_pretrained(folder).save_pretrained(tmp_path / "headless")
        headless = timm.create_model(f"local-dir:{tmp_path / 'headless'}", pretrained=True).eval()
        assert headless.num_classes == 0
        assert torch.equal(headless(images), AutoModel.from_pretrained(folder)(images).pooler_output)
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "headless")(images).pooler_output, headless(images))


def test_the_file_serves_both_libraries(saved):
    config = json.loads((saved[0] / "config.json").read_text())
    assert config["model_type"] == "cbam2" and config["architectures"] == ["Cbam2ForImageClassification"]
    assert config["image_processor_type"] == "TimmWrapperImageProcessor"
    assert config["num_classes"] == 5 and config["label_names"] == NAMES and config["pretrained_cfg"]
    assert config["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    assert "num_classes" not in config["model_args"]
    assert config["model_args"]["cbam2"].keys() == timm_cbam2.resolve_options().keys()
    assert config["model_args"]["cbam2"]["kernel_sizes"] == [3, 4] and "auto_map" not in config


def test_a_folder_that_plain_timm_wrote(saved, images, plain_timm_saves, tmp_path, caplog):
    plain_timm_saves(saved[1], tmp_path)
    assert "model_type" not in json.loads((tmp_path / "config.json").read_text())
    model = Cbam2ForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(model(images).logits, saved[1](images)) and not caplog.records


@pytest.mark.parametrize("name", ["conv1.weight", "stem.0.weight", "running_var", "temperature.value"])
def test_a_missing_weight_is_an_error(copy, name):
    gone = [key for key in load_file(copy / "model.safetensors") if key.endswith(name)]
    if gone:
        change(copy, lambda weights: weights.pop(gone[0]))
        for cls in (AutoModel, AutoModelForImageClassification):
            with pytest.raises(ValueError, match=f"missing: {gone[0]}"):
                cls.from_pretrained(copy)


def test_unexpected_weights_are_an_error(copy):
    change(copy, lambda weights: weights.update(extra=torch.zeros(3)))
    with pytest.raises(ValueError, match="unexpected: extra"):
        AutoModel.from_pretrained(copy)


def test_warm_start_is_a_choice(copy, images):
    change(copy, lambda weights: [weights.pop(k) for k in list(weights) if ".se." in k or ".attn." in k])
    with pytest.raises(ValueError, match="pass warm_start=True"):
        AutoModel.from_pretrained(copy)
    config = json.loads((copy / "config.json").read_text())
    config["model_args"]["cbam2"]["gate"] = "unit_sigmoid"
    (copy / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageClassification.from_pretrained(copy, warm_start=True)
    plain = timm.create_model(config["architecture"].removesuffix("_cbam2"), num_classes=5).eval()
    plain.load_state_dict(load_file(copy / "model.safetensors"))
    assert torch.equal(model(images).logits, plain(images))


def test_a_new_classifier(saved, images):
    folder, model = saved
    with pytest.raises(ValueError, match=r"misshapen: .*\(5,\), not \(3,\).* pass ignore_mis"):
        Cbam2ForImageClassification.from_pretrained(folder, num_labels=3)
    new = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, id2label={0: "x", 1: "y", 2: "z"}, label2id={"x": 0, "y": 1, "z": 2},
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    assert new(images).logits.shape == (3, 3) and new.config.id2label[2] == "z"
    assert 0 < new.timm_model.get_classifier().weight.std() < 1
    assert torch.equal(new.timm_model.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("other_classes", [{}, {"num_labels": 3, "ignore_mismatched_sizes": True}])
def test_only_the_classifier_may_have_another_shape(other_classes, saved, tmp_path):
    copy = shutil.copytree(saved[0], tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    key = next(key for key in weights if key.endswith("fc1.weight"))
    weights[key] = torch.zeros(2, 3, 1, 1)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as error:
        AutoModelForImageClassification.from_pretrained(copy, **other_classes)
    assert f"{key} has shape (2, 3, 1, 1)" in str(error.value)


def test_from_config_starts_as_timm_does(saved):
    config = AutoConfig.from_pretrained(saved[0])
    torch.manual_seed(0)
    expected = timm.create_model(config.architecture, num_classes=5, cbam2=OPTIONS).state_dict()
    torch.manual_seed(0)
    own = AutoModelForImageClassification.from_config(config).timm_model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in expected.items())


def test_from_timm(saved, images):
    model = Cbam2ForImageClassification.from_timm(saved[1])
    assert torch.equal(model(images).logits, saved[1](images))
    assert model.config.model_args["cbam2"]["kernel_sizes"] == [3, 4]
    with pytest.raises(ValueError, match="not a CBAM2 model"):
        Cbam2Model.from_timm(timm.create_model("test_resnet"))


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2", "resnet20_cbam2"])
def test_from_timm_takes_the_model_as_it_is_now(name, images):
    model = timm.create_model(name, drop_path_rate=0.1)
    model.reset_classifier(5, "max")
    taken = Cbam2ForImageClassification.from_timm(model.eval())
    assert torch.equal(taken(images).logits, model(images))
    assert taken.config.model_args["drop_path_rate"] == 0.1  # its training may go on


def test_attentions(saved, images):
    model = AutoModelForImageClassification.from_pretrained(saved[0])
    output = model(images, output_attentions=True)
    with timm_cbam2.record_attention(saved[1]) as records:
        expected = saved[1](images)
    assert torch.equal(output.logits, expected) and len(output.attentions) == len(records) > 3
    for got, want in zip(output.attentions, records.values()):
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        assert got.channel_mask.shape[0] == 3 and got.fusion_weights.shape == (3, 2)
        assert got.spatial_mask.shape[1] == 1 and got.router_weights.shape == (3, 3)
    everything = model(images, labels=torch.tensor([0, 1, 2]), output_attentions=True, output_hidden_states=True)
    as_tuple = model(
        images, labels=torch.tensor([0, 1, 2]), output_attentions=True, output_hidden_states=True, return_dict=False
    )
    assert len(as_tuple) == 4 and torch.equal(as_tuple[0], everything.loss)
    assert model(images, return_dict=False)[0].shape == (3, 5)


@pytest.mark.parametrize("labels", [torch.tensor([0, 4, 2]), torch.eye(5)[:3], torch.zeros(3, 5)])
def test_losses(saved, images, labels):
    model = AutoModelForImageClassification.from_pretrained(saved[0])
    kind, loss = {
        torch.int64: ("single_label_classification", torch.nn.CrossEntropyLoss()),
        torch.float32: ("multi_label_classification", torch.nn.BCEWithLogitsLoss()),
    }[labels.dtype]
    if labels.sum() == 0:
        kind, loss = "regression", torch.nn.MSELoss()
        model.config.problem_type = kind
    output = model(images, labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    assert model.config.problem_type == kind
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_backbone_equals_features_only(saved, images):
    folder, _ = saved
    for indices in ([0, 2], [1, 3], [3]):
        expected = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=indices)
        backbone = Cbam2Backbone.from_pretrained(folder, out_indices=indices)
        wanted = expected.eval()(images)
        for maps in (backbone(images), backbone(images, output_attentions=True, output_hidden_states=True)):
            # What is recorded passes through the separate steps at the end of a branch, equal to rounding.
            assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(maps.feature_maps, wanted))
            assert [m.shape[1] for m in maps.feature_maps] == backbone.channels == expected.feature_info.channels()
        assert all(torch.equal(a, b) for a, b in zip(backbone(images).feature_maps, wanted))
    named = Cbam2Backbone.from_pretrained(folder, out_features=["stage1", "stage3"])
    assert named.out_indices == [named.stage_names.index("stage1"), named.stage_names.index("stage3")]
    built = AutoBackbone.from_config(AutoConfig.from_pretrained(folder, out_features=["stage2"]))
    assert built.out_features == ["stage2"] and len(built(images).feature_maps) == 1


def test_stages_of_each_family():
    for name in ("resnet18_cbam2", "resnet20_cbam2", "resnet26t_cbam2", "convnext_zepto_rms_cbam2"):
        with torch.device("meta"):
            config = Cbam2Config(architecture=name)
            info = Cbam2Backbone(config).timm_model.feature_info
        assert len(info) == len(config.stage_names), name
