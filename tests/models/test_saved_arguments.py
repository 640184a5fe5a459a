"""A config.json with a value of another kind: opened all the same, or one ValueError that names the key.

Where a value is one that the key may have, but not with these weights, the weights that do not fit are named.
"""

import json

import pytest
import timm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

from timm_cbam2 import Cbam2Backbone
from timm_cbam2.hub.folder import save

VALUES = (None, True, -1, 2.5, 10**12, 1e308, "x", "", [], [1], {"a": 1}, [[1, 2]])
# Besides those that are in the file: others of the network, of timm's builder, and of where weights come from.
ARGUMENTS = (
    *("layers", "block", "channels", "depths", "dims", "in_chans", "output_stride", "drop_path_rate", "act_layer"),
    *("norm_layer", "stem_type", "cbam2_stages", "block_args", "cardinality", "aa_layer", "kernel_sizes", "img_size"),
    *("features_only", "out_indices", "device", "dtype", "feature_cfg", "variant", "model_cls", "remap", "unknown"),
    *("checkpoint_path", "kwargs_filter", "pretrained_filter_fn", "pruned", "model_cfg", "head_init_scale"),
)
WEIGHTS = (
    *("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset", "tag"),
    *("architecture", "label_names", "label_descriptions", "notes", "unknown"),
)
OF_TRANSFORMERS = ("out_features", "out_indices", "_attn_implementation", "quantization_config", "label2id", "dtype")
# What the libraries do with these before they ask this package ends in errors of their own.
BEFOREHAND = {
    "timm": {"architecture", "model_args", "pretrained_cfg", "input_size", "test_input_size", "min_input_size"},
    "transformers": {"model_type"},
    "backbone": set(),
}


def paths(value, at=()):
    yield at
    if isinstance(value, dict):
        for key, part in value.items():
            yield from paths(part, (*at, key))


def changed(config, path, value):
    new = json.loads(json.dumps(config))
    place = new
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return new


@pytest.mark.parametrize("name", ["resnet20_cbam2", "test_convnext_cbam2"])
def test_each_key_of_another_kind(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.disable_progress_bar()
    folder = save(timm.create_model(name, num_classes=3, drop_rate=0.1), tmp_path / "m", label_names=["a", "b", "c"])
    config = json.loads((folder / "config.json").read_text())
    all_paths = [*paths(config), *((key,) for key in OF_TRANSFORMERS)]
    all_paths += [("model_args", key) for key in ARGUMENTS] + [("pretrained_cfg", key) for key in WEIGHTS]
    all_paths = [path for path in dict.fromkeys(all_paths) if path not in [(), ("transformers_version",)]]
    doors = {
        "timm": lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
        "transformers": lambda: AutoModelForImageClassification.from_pretrained(folder),
        "backbone": lambda: Cbam2Backbone.from_pretrained(folder),
    }
    # All values through one door of one family; what the other checks is the same code, so that a few are enough.
    few = (True, 1e308, "x", [[1, 2]])
    opened = refused = 0
    for path in all_paths:
        for value in VALUES:
            (folder / "config.json").write_text(json.dumps(changed(config, path, value)))
            for door, open_it in doors.items():
                if door == "backbone" and path[0] not in ("out_features", "out_indices"):
                    continue
                if value not in few and (name != "resnet20_cbam2" or len(path) > 2 or door == "transformers"):
                    continue
                try:
                    open_it()
                    opened += 1
                except ValueError as error:
                    case = (door, path, value, error)
                    text = str(error).replace("quantization config", "quantization_config")
                    said = path[-1].removeprefix("_") in text or "a=1" in text or "do not fit" in text
                    assert said or path[-1] in BEFOREHAND[door], case
                    assert "\n" not in text or path[-1] in BEFOREHAND[door], case
                    refused += 1
                except (AttributeError, TypeError, RuntimeError, AssertionError) as error:
                    assert path[-1] in BEFOREHAND[door], (door, path, value, repr(error))
    assert opened > 50 and refused > 200, (opened, refused)
