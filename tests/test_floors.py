"""tests/floors.txt pins the oldest versions that pyproject.toml allows, neither more nor fewer."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Of tests, trackers and checks.
TOOLS = {"pytest", "pytest-xdist", "playwright", "hatchling", "build", "mypy", "trackio", "openvino"}


def test_the_floors_are_pinned():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = dict(
        re.findall(r'"([a-z-]+)>=([\d.]+)"', text[text.index("\ndependencies") : text.index("[project.scripts]")])
    )
    pinned = dict(re.findall(r"^([a-z-]+)==([\d.]+)$", (ROOT / "tests" / "floors.txt").read_text(), re.MULTILINE))
    for name in asked.keys() - TOOLS:
        assert pinned[name] == asked[name] or pinned[name].removesuffix(".0") == asked[name], name
    assert pinned.keys() - asked.keys() == {"numpy", "pyarrow"}
