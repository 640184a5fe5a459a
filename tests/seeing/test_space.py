"""What a visitor of the page may load, and the Space that is made of the page."""

import io
import json
import os
import urllib.request
from pathlib import Path

import pytest
from hub_scenario import scenario
from pages import bomb, free_port, serve, stop
from PIL import Image

from timm_cbam2.errors import UserError

pytest.importorskip("gradio", reason='the page needs gradio: pip install "timm_cbam2[app]"')

ROOT = Path(__file__).resolve().parents[2]
CAT = ROOT / "timm_cbam2" / "examples" / "cat.jpg"


def test_models_that_a_visitor_may_load(tmp_path):
    from timm_cbam2.seeing.page.served import Models, check_image

    models = Models(["resnet20_cbam2", "resnet20_cbam2"])
    assert models.given == ["resnet20_cbam2"]
    assert len(models.explain("resnet20_cbam2", CAT).answers) == 5
    for name, words in (
        (str(ROOT / "checkpoints" / "resnet20_cbam2.cifar10"), "no model is called"),
        ("../run", "no model is called"),
        ("resnet50", "did you mean"),
        ("convnext_xxlarge_cbam2", "this page loads 200 M"),
        ("x" * 500, "^.{0,250}$"),
    ):
        with pytest.raises(UserError, match=words):
            models.explain(name, CAT)
    (tmp_path / "bomb.png").write_bytes(bomb(8000))
    with pytest.raises(UserError, match="8000 x 8000 pixels are too many"):
        check_image(tmp_path / "bomb.png")
    Image.open(io.BytesIO(CAT.read_bytes())).save(tmp_path / "fine.webp")
    check_image(tmp_path / "fine.webp")


def test_models_from_the_hub_run_no_code(script, tmp_path):
    """A repository with code that would leave a trace, and one that offers a pickle only."""
    scenario(
        script,
        tmp_path,
        f"""
from timm_cbam2.seeing.page.served import Models
push_files = {{path.name: path.read_bytes() for path in folder.iterdir()}}
trace = home / "trace"
evil = f"open({{str(trace)!r}}, 'w').close()".encode()
hub.add("user/model", {{**push_files, "modeling_cbam2.py": evil, "configuration_cbam2.py": evil}})
explanation = Models([]).explain("hf-hub:user/model", {str(CAT)!r})
assert len(explanation.answers) == 5 and explanation.blocks and not trace.exists()
hub.add("user/pickle", {{"config.json": push_files["config.json"], "pytorch_model.bin": b"x"}})
fails("pickle", Models([]).explain, "hf-hub:user/pickle", {str(CAT)!r})
fails("no such repository", Models([]).explain, "hf-hub:user/none", {str(CAT)!r})
""",
    )


def test_a_space(script, tmp_path, bare_python, environment):
    """Pushed to the stand-in Hub, fetched, and served where the package is not installed."""
    pytest.importorskip("importlib.metadata").version("timm_cbam2")
    code = """
import json
fails("USER/NAME", push, folder)
fails("write user/name", push, space="demo")
push(space="user/demo", dry_run=True)
os.environ["HF_TOKEN"] = "hf_test"
push(space="user/plain")
push(folder, "user/model", space="user/demo")
push(folder, "user/model", space="user/demo")  # again: the Space is there already
doors("user/model")
files = hub.repos["spaces/user/demo"]["main"]
assert set(files) - set(hub.repos["spaces/user/plain"]["main"]) == {
    "model/model/config.json", "model/model/model.safetensors"}
for name, data in files.items():
    path = home / "space" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
"""
    scenario(script, tmp_path, code)
    space = tmp_path / "space"
    card = (space / "README.md").read_text()
    head = card.split("---")[1]
    for line in ("sdk: gradio", "app_file: app.py", "title: demo", "- user/model", "license: apache-2.0"):
        assert line in head, head
    wanted = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("gradio>=") for line in wanted) and any(line.startswith("timm>=") for line in wanted)
    assert not any("timm_cbam2" in line or "pytest" in line or "extra" in line for line in wanted)
    assert (space / "app.py").read_bytes() == (ROOT / "timm_cbam2" / "seeing" / "page" / "app.py").read_bytes()

    shown = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    shown.update(SPACE_ID="user/demo", GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT=str(free_port()))
    process, url = serve([bare_python, "app.py"], space, shown)
    try:
        config = json.loads(urllib.request.urlopen(f"{url}/config", timeout=60).read())
        (first, *_) = (c["props"] for c in config["components"] if c["props"].get("label") == "Model")
        assert first["value"] == "model/model"
    finally:
        stop(process)
    loaded = list(space.glob("timm_cbam2/seeing/__pycache__/explain.*.pyc"))
    assert loaded or os.environ.get("PYTHONDONTWRITEBYTECODE")
