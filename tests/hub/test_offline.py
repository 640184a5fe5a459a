"""Without a network, a name that needs the Hub says so at once; what is cached opens as ever."""

import json
import os
import socket
from pathlib import Path

import pytest
import timm
import torch
from hf_cache import add_to_cache
from randomise import randomise

import timm_cbam2

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json, timm, torch, timm_cbam2
from pathlib import Path
from timm_cbam2.data.sources import find_images
from timm_cbam2.data.stream import find_stream
from timm_cbam2.hub.push import check_push, pull
from timm_cbam2.hub.zoo import load
from timm_cbam2.insertion.read import read_source

said = {}
for name, call in {
    "load": lambda: load("hf-hub:user/x"),
    "tag": lambda: load("resnet18_cbam2.from_a1_in1k"),
    "plain tag": lambda: load("resnet18.a1_in1k"),
    "timm": lambda: timm.create_model("resnet18_cbam2.from_a1_in1k", pretrained=True),
    "transformers": lambda: timm_cbam2.Cbam2Model.from_pretrained("user/x"),
    "start": lambda: read_source("hf-hub:user/x"),
    "pull": lambda: pull("user/x", Path("pulled")),
    "push": lambda: check_push("user/x"),
    "data": lambda: find_images("user/set"),
    "stream": lambda: find_stream("user/set", None, None, "0.2"),
}.items():
    try:
        call()
        said[name] = "no error"
    except (OSError, RuntimeError, ValueError) as error:
        said[name] = str(error)
model = load("hf-hub:user/cached").eval()
same = timm_cbam2.Cbam2ForImageClassification.from_pretrained("user/cached").eval()
images = torch.ones(1, 3, 64, 64)
said["cached"] = model(images).tolist() + same(images).logits.tolist()
print(json.dumps(said))
"""


@pytest.fixture
def nowhere():
    """An address of this machine at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_hub_that_cannot_be_reached_is_not_tried_again_and_again(script, nowhere, tmp_path):
    model = randomise(timm.create_model("test_resnet_cbam2", num_classes=3)).eval()
    timm_cbam2.save(model, tmp_path / "model")
    add_to_cache(tmp_path / "model", tmp_path / "hf", "user/cached")
    env = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env.update(
        HF_ENDPOINT=nowhere, HF_HOME=str(tmp_path / "hf"), PYTHONPATH=str(ROOT), NO_PROXY="127.0.0.1", HF_TOKEN="x"
    )
    result = script(CODE, cwd=tmp_path, env=env)
    assert result.code == 0, result
    assert "Retry" not in result.err
    said = json.loads(result.out.splitlines()[-1])
    with torch.no_grad():
        assert said.pop("cached") == 2 * model(torch.ones(1, 3, 64, 64)).tolist()
    assert "Go online once to cache them, or pass pretrained=False" in said.pop("timm")
    assert "user/x" in said.pop("transformers")
    assert all("127.0.0.1 cannot be reached" in text for text in said.values()), said
    assert not (tmp_path / "pulled").exists()
