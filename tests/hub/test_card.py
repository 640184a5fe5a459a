"""The model card: metadata the Hub understands, numbers from the run, and code that runs."""

import json
import re
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard

from timm_cbam2.hub.card import MARK, card, write_card
from timm_cbam2.hub.folder import save

ROOT = Path(__file__).resolve().parents[2]
RUN = dict(
    model="test_resnet_cbam2.from_r160_in1k", pretrained=True, data="someone/things", epochs=3, lr=0.01, seed=7,
    images=dict(train=80, val=20), output="/secret/place",
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    save(timm.create_model("test_resnet_cbam2", num_classes=2), tmp_path / "best", label_names=["a", "b"])
    rows = [
        dict(epoch=n, val_accuracy=a, val_loss=1 - a, val_top5=1.0, val_images=20) for n, a in ((1, 0.7), (2, 0.85))
    ]
    rows.append(dict(epoch=3, val_accuracy=0.8, val_loss=0.3, val_top5=1.0, val_images=20))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def write_run(folder, **changes):
    (folder / "run.json").write_text(json.dumps({**RUN, **changes}))
    return ModelCard(card(folder / "best", "user/things"))


def test_metadata_and_numbers(run):
    got = write_run(run)
    data = got.data.to_dict()
    assert data["license"] == "apache-2.0" and data["library_name"] == "timm"
    assert data["pipeline_tag"] == "image-classification" and {"timm", "transformers", "cbam2"} <= set(data["tags"])
    assert data["base_model"] == "timm/test_resnet.r160_in1k" and data["datasets"] == ["someone/things"]
    (result,) = got.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 85.0, "someone/things")
    assert "85.00 %" in got.text and "after epoch 2" in got.text and "| seed | 7 |" in got.text
    assert "gate='unit_sigmoid'" in got.text and "/secret" not in got.content


def test_from_nothing_and_from_a_path(run):
    got = write_run(run, pretrained=False, data="/secret/place/flowers")
    assert got.data.base_model is None and got.data.datasets is None
    assert got.data.eval_results[0].dataset_name == "flowers" and "/secret" not in got.content


@pytest.mark.parametrize(
    "license_name, metadata",
    [("cc-by-nc-4.0", ("cc-by-nc-4.0", None)), ("dinov3-license", ("other", "dinov3-license"))],
)
def test_the_sources_licence_goes_along(run, license_name, metadata):
    path = run / "best/config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["license"] = license_name
    path.write_text(json.dumps(config))
    data = write_run(run).data
    assert (data.license, data.get("license_name")) == metadata
    assert f"The licence `{license_name}`" in card(run / "best")


def test_a_persons_own_words_stay(run):
    readme = run / "best/README.md"
    assert MARK in readme.read_text()
    readme.write_text("my words")
    write_card(run / "best")
    save(timm.create_model("test_resnet_cbam2", num_classes=2), run / "best")
    assert readme.read_text() == "my words"


def test_the_code_runs(script, run):
    """Each block as it stands, with the repository's name replaced by the folder."""
    write_run(run)
    blocks = re.findall(r"```python\n(.*?)```", card(run / "best", "user/things"), flags=re.DOTALL)
    assert len(blocks) == 2 and all("user/things" in block for block in blocks)
    folder = str(run / "best")
    timm_code = blocks[0].replace("hf-hub:user/things", f"local-dir:{folder}") + "\nfirst = output\n"
    code = timm_code + blocks[1].replace("user/things", folder)
    code += "\nassert torch.equal(first, output) and output.shape == (1, 2) and len(masks) == 4\n"
    done = script(code, cwd=ROOT)
    assert done.code == 0, done.err
