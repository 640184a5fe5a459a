"""hf_configs/: one current file for each architecture, enough to build it without a network."""

import json
from pathlib import Path

import pytest
import timm
import torch
from packaging.version import Version
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from timm_cbam2 import Cbam2Config
from timm_cbam2.errors import UserError
from timm_cbam2.hub.configs import config_texts, configs

FOLDER = Path(__file__).resolve().parents[2] / "hf_configs"


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="older timm's table words things otherwise")
def test_they_are_current(capsys):
    configs(FOLDER, check=True)
    assert set(config_texts()) == set(timm.list_models("*_cbam2")) == {path.name for path in FOLDER.iterdir()}


def test_writing_and_checking(tmp_path):
    with pytest.raises(UserError, match="run `timm-cbam2 configs`"):
        configs(tmp_path, check=True)
    configs(tmp_path)
    configs(tmp_path, check=True)
    (tmp_path / "resnet50_cbam2/config.json").write_text("{}")
    (tmp_path / "resnet51_cbam2").mkdir()
    with pytest.raises(UserError, match="resnet50_cbam2, resnet51_cbam2"):
        configs(tmp_path, check=True)


@pytest.mark.parametrize("name", ["resnet20_cbam2", "resnet50_cbam2", "convnext_atto_cbam2"])
def test_build_without_network(name):
    config = AutoConfig.from_pretrained(FOLDER / name)
    assert (
        config.num_labels == timm.create_model(name).num_classes == json.loads(config.to_json_string())["num_classes"]
    )
    with torch.device("meta"):
        classifier = AutoModelForImageClassification.from_config(config)
    assert classifier.timm_model.state_dict().keys() == timm.create_model(name).state_dict().keys()
    size = timm.get_pretrained_cfg(name).input_size
    assert tuple(AutoImageProcessor.from_pretrained(FOLDER / name).data_config["input_size"]) == size
    with torch.no_grad():
        assert AutoModel.from_config(config).eval()(torch.randn(1, 3, 64, 64)).pooler_output.isfinite().all()
    if config.num_labels == 1000:
        assert config.id2label[0].startswith("tench") and "id2label" not in config.to_dict()


def test_they_tell_what_networks_are_made_with():
    """Decisions are measured over the batch exactly where the network itself is."""
    found = set()
    for file in sorted(FOLDER.glob("*/config.json")):
        with torch.device("meta"):
            model = timm.create_model(file.parent.name)
        told = json.loads(file.read_text())["model_args"]["cbam2"]
        assert told == json.loads(json.dumps(model.cbam2_options)), file
        normalised = {module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)}
        assert told["squeeze_norm"] == told["router_norm"] == told["center_spatial"] == bool(normalised), file
        found.add(bool(normalised))
    assert found == {True, False}
    grouped = Cbam2Config(architecture="resnet18_cbam2", model_args={"norm_layer": "groupnorm"})
    assert not grouped.model_args["cbam2"]["router_norm"]
    assert not timm.create_model("resnet18_cbam2", norm_layer="groupnorm").cbam2_options["router_norm"]
