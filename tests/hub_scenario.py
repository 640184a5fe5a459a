"""Code that runs against a stand-in Hub on this machine, in a process whose environment points to it."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
PRELUDE = """
import os, sys
from pathlib import Path
sys.path[:0] = [TESTS, ROOT]
from hub_server import Hub
hub = Hub().__enter__()
home = Path(HOME)
os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(home / "hf"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
    os.environ.pop(name, None)
import huggingface_hub, pytest, timm, torch
from transformers import AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification
import timm_cbam2
from timm_cbam2.errors import UserError
from timm_cbam2.hub.folder import save
from timm_cbam2.hub.push import pull, push
from randomise import randomise

model = randomise(timm.create_model(ARCHITECTURE, num_classes=5)).eval()
folder = save(model, home / "model", label_names=list("abcde"))
images = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    logits = model(images)

def doors(name):
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"hf-hub:{name}", pretrained=True).eval()(images), logits)
        assert torch.equal(AutoModelForImageClassification.from_pretrained(name)(images).logits, logits)

def fails(words, function, *args, kind=UserError, **kwargs):
    with pytest.raises(kind, match=words) as caught:
        function(*args, **kwargs)
    assert "\\n" not in str(caught.value) or kind is not UserError
"""


def scenario(script, tmp_path, code, architecture="test_resnet_cbam2"):
    names = dict(TESTS=str(TESTS), ROOT=str(TESTS.parent), HOME=str(tmp_path), ARCHITECTURE=architecture)
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    (tmp_path / "scenario.py").write_text(head + PRELUDE + code)
    done = script("import runpy; runpy.run_path('scenario.py', run_name='__main__')", cwd=tmp_path)
    assert done.code == 0, f"{done.out[-3000:]}\n{done.err[-5000:]}"
    return done
