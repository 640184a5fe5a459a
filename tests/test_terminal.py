"""Names are data: shown on a terminal and on pages, they neither steer the one nor become part of the other."""

import os
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import timm_cbam2
from timm_cbam2.errors import one_line
from timm_cbam2.terminal import say, visible

# A colour, a second line, a formula for matplotlib, a script for a browser, bytes of no text, text turned around.
NAMES = [b"\x1b[31mred\x1b[0m", b"two\nlines", b"$x_{$", b"<img src=x onerror=a>", b"\xff\xfe", "\u202egnp".encode()]
FILE = os.fsdecode(b"%d\x1b]0;title\x07\n<u>\xff.png")


@pytest.mark.parametrize(
    "text, seen",
    [
        ("Ärger, 犬 and 🐈", "Ärger, 犬 and 🐈"),
        ("a\x1b[2Jb\r\n\t\x00\x7f\x9b", "a\\x1b[2Jb\\r\\n\\t\\x00\\x7f\\x9b"),
        ("a\u2028b\u2029c\u202ed\u2066e", "a\\u2028b\\u2029c\\u202ed\\u2066e"),
        (os.fsdecode(b"\xffname"), "\\udcffname"),
        (Path("a\nb"), "a\\nb"),
    ],
)
def test_what_cannot_be_seen_is_spelled_out(text, seen, capsys):
    assert visible(text) == seen
    say(text, "second")
    assert capsys.readouterr().out == f"{seen}\nsecond\n"


def test_errors_too():
    assert one_line("a\nb \x1b[31m\u202ec") == "a b \\x1b[31m\\u202ec"


def test_no_command_prints_names_as_they_are():
    """`say` is what shows text; `print` is left to what is made of numbers and our own words alone."""
    allowed = {"finish.py": "print(summary(rows, best))", "recipe.py": "print(list_recipes())"}
    for room in ("data", "training", "hub", "insertion", "seeing"):
        for file in (Path(timm_cbam2.__file__).parent / room).rglob("*.py"):
            found = re.findall(r"(?<![\w.])print\(.*|accelerator\.print\(.*", file.read_text())
            assert set(found) <= {allowed.get(file.name)}, (file, found)


@pytest.fixture(scope="module")
def images(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("names") / "data"
    pixels, labels = digits
    for digit, name in enumerate(NAMES):
        where = folder / os.fsdecode(name)
        where.mkdir(parents=True)
        for number, index in enumerate(np.flatnonzero(labels == digit)[:10]):
            Image.fromarray(pixels[index]).save(where / FILE.replace("%d", str(number)))
    return folder


def test_every_command(run, refused, images, tmp_path):
    runs = tmp_path / "run"
    quick = ("--model", "resnet20_cbam2", "--no-pretrained", "--img-size", "8", "--workers", "0", "--epochs", "1")
    files = sorted(images.rglob("3*"))
    commands = {
        "finetune": ("--data", images, *quick, "--output", runs),
        "evaluate": (runs,),
        "predict": (runs, *files, "--output", tmp_path / "answers.csv"),
        "explain": (runs, *files, "--output", tmp_path / "explained"),
        "report": (runs,),
        "push": (runs, "me/model", "--dry-run"),
    }
    shown = {}
    for name, args in commands.items():
        result = run(name, *args)
        assert result.code == 0, (name, result)
        shown[name] = result.out
        for character in result.out + result.err:
            assert character == "\n" or visible(character) == character, (name, result)
    lines = shown["predict"].splitlines()
    assert len(lines) == len(files) + 1 and all(f"data/{visible(p.parent.name)}/3" in shown["predict"] for p in files)
    assert all(f"    {visible(os.fsdecode(name))}  " in shown["evaluate"] for name in NAMES)
    pages = {runs / "report.html": "<img src=x onerror=a>", tmp_path / "explained" / "index.html": "<u>"}
    for page, name in pages.items():
        text = page.read_text()
        assert "<img src=x" not in text and "<u>" not in text
        assert name in unescape(text)
    card = (runs / "best" / "README.md").read_text()
    assert "<img" not in card and "\x1b" not in card
    broken = images / os.fsdecode(NAMES[0]) / FILE.replace("%d", "9")
    broken.write_bytes(b"no image")
    line = refused("predict", runs, broken, words=("cannot read", visible(broken.name)[:10]))
    assert visible(line) == line
