"""A warning of a removal does fail a test, wherever it comes up; what one library tells another on import does not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PLANTED = '''
import warnings

import pytest

KINDS = [FutureWarning, DeprecationWarning, PendingDeprecationWarning]
CALL = """
import sys, warnings, timm_cbam2.hub.zoo as zoo
def old(*args, **kwargs):
    warnings.warn("list_models goes", {kind}, stacklevel={level})
    return []
zoo.timm.list_models = old
zoo.names()
"""


@pytest.mark.parametrize("kind", KINDS)
def test_here(kind):
    warnings.warn("this goes", kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [1, 2])
def test_by_our_call_in_a_process(start_python, kind, level):
    code = CALL.format(kind=kind.__name__, level=level)
    assert start_python("-c", code, brief=True).wait().code == 0


def test_logged(start_python):
    code = "import logging, transformers; logging.getLogger('transformers.x').warning('`y` is deprecated')"
    assert start_python("-c", code, brief=True).wait().code == 0


@pytest.fixture
def libraries(tmp_path):
    """One that warns while it is imported and has a function that goes, and another that calls it."""
    place = tmp_path / "site-packages"
    place.mkdir()
    warn = "import warnings; warnings.warn('{} goes', DeprecationWarning)"
    text = warn.format("z") + "\\ndef old():\\n    " + warn.format("old")
    (place / "one.py").write_text(text)
    (place / "other.py").write_text("import one\\ndef call():\\n    one.old()")
    return f"import sys; sys.path.insert(0, {str(place)!r}); import warnings, one, other; "


def test_called_by_a_test(start_python, libraries):
    assert start_python("-c", libraries + "one.old()", brief=True).wait().code == 0


def test_harmless(start_python, libraries):
    result = start_python("-c", libraries + "other.call(); warnings.warn('mind this')", brief=True).wait()
    assert result.code == 0 and "mind this" in result.err and "goes" not in result.err
'''


def outcomes(tmp_path, *args):
    """What pytest says of each planted test under this repository's settings, as {name: "PASSED" or other}."""
    (tmp_path / "test_planted.py").write_text(PLANTED)
    plain = ("-n", "0", "-p", "no:cacheprovider", "-p", "conftest", "-vrN", "--rootdir", ROOT, "-c")
    command = [sys.executable, "-m", "pytest", *plain, ROOT / "pyproject.toml", tmp_path / "test_planted.py", *args]
    path = os.pathsep.join(filter(None, (str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True)
    lines = [line.partition("::")[2].split() for line in done.stdout.splitlines() if "::" in line and "%]" in line]
    # A process is looked at after the test, whose own outcome comes before it.
    return {words[0]: words[1] for words in lines}, done


def test_planted_warnings(tmp_path):
    found, done = outcomes(tmp_path)
    assert len(found) == 12, done
    assert {name for name, outcome in found.items() if outcome == "PASSED"} == {"test_harmless"}, done
    assert "a process warned of a removal" in done.stdout and "FutureWarning: list_models goes" in done.stdout
    assert "transformers.x: `y` is deprecated" in done.stdout
    found, done = outcomes(tmp_path, "-W", "default")
    assert len(found) == 12 and set(found.values()) == {"PASSED"}, done
