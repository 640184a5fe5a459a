"""trust_remote_code where timm_cbam2 is absent, and beside it where it is installed; each in a process of its own."""

import os
import re
from pathlib import Path

import pytest
import timm
import torch
from randomise import randomise

from timm_cbam2.hub.folder import model_code, save, with_auto_map

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as `push` sends it, with its code, an input and the logits."""
    place = tmp_path_factory.mktemp("remote")
    model = randomise(timm.create_model("test_resnet_cbam2", num_classes=3)).eval()
    folder = save(model, place / "model", label_names=["x", "y", "z"])
    import json

    (folder / "config.json").write_text(with_auto_map(json.loads((folder / "config.json").read_text())))
    for name, path in model_code().items():
        (folder / name).write_bytes(path.read_bytes())
    images = torch.randn(2, 3, 64, 64)
    torch.save((images, model(images).detach()), place / "example.pt")
    return folder


def run(script, folder, tmp_path, code, with_package):
    """Run `code` away from the repository, with an empty cache; every warning is shown."""
    path = str(ROOT) if with_package else ""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env.update(HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1", PYTHONPATH=path, NO_COLOR="1")
    head = f"""
import importlib.util, torch
folder, again = {str(folder)!r}, {str(tmp_path / "again")!r}
images, logits = torch.load({str(folder.parent / "example.pt")!r})
assert (importlib.util.find_spec("timm_cbam2") is not None) is {with_package}
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
"""
    done = script(head + code, cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    quiet = re.sub(r"(?m)^.*(Loading weights|Writing model shards).*$", "", done.err).strip()
    assert "arning" not in quiet and "[transformers]" not in quiet, quiet
    return done.out


def test_an_older_transformers_takes_all_along():
    """Of a folder, it copies the two files that config.json names, and those that these name themselves; no others."""
    named = {"configuration_cbam2", "modeling_cbam2"}
    for file in sorted(named):
        text = model_code()[f"{file}.py"].read_text(encoding="utf-8")
        named |= set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE))
    assert {f"{name}.py" for name in named} == model_code().keys()


LOAD_SAVE_LOAD = """
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(images).logits, logits) and "transformers_modules" in type(model).__module__
assert len(model(images, output_attentions=True).attentions) == 4
model.save_pretrained(again)
model = AutoModelForImageClassification.from_pretrained(again, trust_remote_code=True)
assert torch.equal(model(images).logits, logits)
assert AutoModel.from_pretrained(again, trust_remote_code=True)(images).pooler_output.shape == (2, 96)
import timm  # the code has registered its architectures
model = timm.create_model(f"local-dir:{again}", pretrained=True).eval()
assert torch.equal(model(images), logits)
built = AutoModel.from_config(AutoConfig.from_pretrained(again, trust_remote_code=True), trust_remote_code=True)
print(sorted(type(m).__module__.split(".")[0] for m in (model, built)))
"""


def test_without_the_package(bare_script, folder, tmp_path):
    out = run(bare_script, folder, tmp_path, LOAD_SAVE_LOAD, with_package=False)
    assert out.strip() == "['transformers_modules', 'transformers_modules']"
    again = {path.name for path in (tmp_path / "again").iterdir()}
    assert again == {"config.json", "model.safetensors", *model_code()}


def test_the_code_runs_only_when_asked(bare_script, folder, tmp_path):
    code = """
try:
    AutoModel.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError
"""
    run(bare_script, folder, tmp_path, code, with_package=False)
    assert not list(tmp_path.rglob("modeling_cbam2.py"))


@pytest.mark.parametrize("order", ["package first", "code first", "without asking"])
def test_beside_the_package(bare_script, folder, tmp_path, order):
    code = {
        "package first": """
import timm_cbam2, transformers
from packaging.version import Version
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
if type(model) is not timm_cbam2.Cbam2ForImageClassification:  # older versions take what was asked for
    assert Version(transformers.__version__) < Version("5.23") and "transformers_modules" in type(model).__module__
else:
    model.save_pretrained(again)
    assert "auto_map" not in open(again + "/config.json").read()
""",
        "code first": """
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
import timm, timm_cbam2, importlib
with timm_cbam2.record_attention(model) as records:  # the steps one by one: equal to rounding
    torch.testing.assert_close(model(images).logits, logits)
assert torch.equal(model(images).logits, logits)
assert len(records) == 4 and all(name.startswith("timm_model.layer") for name in records)
importlib.reload(timm_cbam2)
own = timm_cbam2.Cbam2ForImageClassification.from_pretrained(folder)
assert torch.equal(own(images).logits, logits) and len(timm.list_models("*_cbam2")) == 78
assert len(own(images, output_attentions=True).attentions) == 4
""",
        "without asking": """
import timm_cbam2
model = AutoModelForImageClassification.from_pretrained(folder)
print(type(model).__module__)
""",
    }[order]
    run(bare_script, folder, tmp_path, code + "assert torch.equal(model(images).logits, logits)\n", with_package=True)


def test_the_code_is_complete():
    """transformers copies only what it finds by this pattern, docstrings included."""
    code = model_code()
    for name, path in code.items():
        text = path.read_text()
        found = re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)
        assert {f"{module}.py" for module in found} <= code.keys(), name
        assert not re.findall(r"^\s*(from \. import|import timm_cbam2|from timm_cbam2)", text, flags=re.MULTILINE), name
