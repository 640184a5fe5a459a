"""The public names are typed: mypy passes on them, and a program that uses one wrongly does not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RIGHT = """
import timm_cbam2
from pathlib import Path
block: timm_cbam2.Cbam2 = timm_cbam2.Cbam2(64, fusion="static")
folder: Path = timm_cbam2.save(block, "folder", label_names=["cat", "dog"])
names: list[str] = timm_cbam2.suggest("resnet50")
"""
WRONG = """
timm_cbam2.save(block, 3)
timm_cbam2.suggest("resnet50", 2.5).upper()
timm_cbam2.Cbam2("64")
"""


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    pytest.importorskip("mypy", reason="mypy is in the extra `test`")
    cache = tmp_path_factory.mktemp("mypy")

    def call(*args):
        settings = ["--config-file", "pyproject.toml", "--untyped-calls-exclude=safetensors"]  # 0.6 types none of them
        command = [sys.executable, "-m", "mypy", *settings, "--cache-dir", cache, *args]
        done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
        return [line for line in done.stdout.splitlines() if ": error:" in line], done

    return call


def test_the_public_names(mypy):
    errors, done = mypy()
    assert not errors and done.returncode == 0 and "no issues found" in done.stdout, done


def test_a_program_that_uses_them(mypy, tmp_path):
    assert (ROOT / "timm_cbam2" / "py.typed").is_file()
    program = tmp_path / "program.py"
    program.write_text(RIGHT)
    assert mypy(program)[0] == []
    program.write_text(RIGHT + WRONG)
    wrong = [line.split(":")[1] for line in mypy(program)[0]]
    first = RIGHT.count("\n") + 2
    assert set(wrong) == {str(first + number) for number in range(3)}
