"""The notebook from install to a picture runs as it stands, and what it shows is what comes out."""

import json
import re
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent.parent / "timm_cbam2" / "examples"
NOTEBOOK = json.loads((FOLDER / "from_install_to_a_picture.ipynb").read_text(encoding="utf-8"))
COMMAND = re.compile(r"^!timm-cbam2 (.*)$", re.MULTILINE)


def cells():
    """(source, kept text) of each code cell but the one that installs, which .ci/run does in its own way."""
    found = []
    for cell in NOTEBOOK["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%pip install"):
            kept = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
            found.append((source, kept))
    return found


def test_it_runs(run, script, environment, tmp_path):
    """Python in one process from the top, as far as the next command; commands as a user types them."""
    python = kept = done = ""
    for source, shown in [*cells(), ("!", "")]:
        if not source.startswith("!"):
            python, kept = f"{python}{source}\n", kept + shown
            continue
        if python != done:
            result = script(python, cwd=tmp_path, env=environment)
            assert result.code == 0 and result.out == kept, result
            done = python
        if command := COMMAND.match(source):
            result = run(*command[1].split(), cwd=tmp_path, brief=False)
            assert result.code == 0 and result.err == "", result
    assert Image.open(tmp_path / "pictures" / "zero.png").size[0] > 500
    assert (tmp_path / "digits_run" / "report.html").is_file()


def test_its_outputs_are_kept():
    shown = [kind for cell in NOTEBOOK["cells"] for out in cell.get("outputs", ()) for kind in out.get("data", ())]
    assert "image/png" in shown and sum(bool(kept) for _, kept in cells()) >= 4
    assert (FOLDER / "from_install_to_a_picture.ipynb").stat().st_size < 300_000
