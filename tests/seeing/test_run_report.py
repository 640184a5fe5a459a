"""`report.html` of a run: true to the run, whole in one file, safe with any name, written whatever is missing."""

import json
import re
import shlex
import shutil
from html import unescape
from html.parser import HTMLParser

import pytest
import timm
import torch
from PIL import Image

from timm_cbam2.data.loading import build_transform, data_config
from timm_cbam2.data.reading import read_image
from timm_cbam2.seeing.report import command

TIMES = ("seconds", "images_per_second")


class Page(HTMLParser):
    """Tags with their attributes, and the text, of an HTML file."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag, attribute):
        return [attributes.get(attribute) for name, attributes in self.tags if name == tag]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def copied(small_run, tmp_path):
    return shutil.copytree(small_run[0], tmp_path / "copy")


def check_whole(page, folder):
    """Nothing is fetched, nothing is run, every link leads to a file of the run."""
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert page.of("img", "src") and all(source.startswith("data:image/") for source in page.of("img", "src"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "http://" not in page.source and "https://" not in page.source
    assert all((folder / link).exists() for link in page.of("a", "href"))


def test_a_run_ends_with_one(small_run):
    folder, data = small_run
    page = Page(folder / "report.html")
    check_whole(page, folder)
    best = max(rows(folder), key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert f"{100 * best['val_accuracy']:.2f} %" in page.text and f"after epoch {best['epoch']} of 2" in page.text
    assert {"best/", "last/", "curves.png", "confusion.png"} <= set(page.of("a", "href"))
    assert "images/s in training" in page.text and f"{best['val_images']} validation images" in page.text
    assert Image.open(folder / "confusion.png").size[0] > 300

    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    transform = build_transform(data_config(model))
    losses = {}
    for index, name in enumerate(model.pretrained_cfg["label_names"]):
        for path in (data / name).iterdir():
            with torch.no_grad():
                logits = model(transform(read_image(path))[None])[0]
            said = model.pretrained_cfg["label_names"][logits.argmax()]
            losses[said, name, path.name] = -logits.log_softmax(0)[index].item()
    mistakes = re.findall(
        r"Taken for <b>(.*?)</b>.*?, is <b>(.*?)</b>.*?<span class=\"note\">(.*?)</span>", page.source
    )
    wrong = round((1 - best["val_accuracy"]) * best["val_images"])
    assert len(mistakes) == min(wrong, 10) and all(said != truth for said, truth, _ in mistakes)
    found = [losses[mistake] for mistake in mistakes]  # a name that is not there, or said otherwise, is a KeyError
    assert found == sorted(found, reverse=True)


def test_the_command_in_it_makes_the_same_run(run, small_run, tmp_path):
    folder, _ = small_run
    (command,) = re.findall(r"<pre>(.*?)</pre>", (folder / "report.html").read_text(), re.DOTALL)
    program, *arguments = shlex.split(unescape(command))
    assert program == "timm-cbam2"
    assert run(*arguments, "--output", tmp_path / "again").code == 0
    one, two = rows(folder), rows(tmp_path / "again")
    for row in (*one, *two):
        for key in TIMES:
            row.pop(key)
    assert one == two


def test_the_command_says_how_many_processes_a_launcher_started(small_run):
    settings = json.loads((small_run[0] / "run.json").read_text())
    assert "--num-processes" not in command(settings)
    assert "--num-processes 4" in command(settings | dict(processes=4))
    assert "--num-processes 2" in command(settings | dict(processes=2, num_processes=2))


def test_any_name_is_only_a_name(run, write_folder, quick, tmp_path):
    """Names that would be code in HTML, a formula in matplotlib, or an option on a command line."""
    data = write_folder(tmp_path / "a <b>&'\" $x", classes=(0, 1))
    (data / "digit0").rename(data / "<img src=x onerror=alert(1)>")
    (data / "digit1").rename(data / "$\\frac{ 数字")
    result = run("finetune", "--data", data, *quick, "--epochs", "1", "--output", tmp_path / "run")
    assert result.code == 0 and result.err == "", result
    page = Page(tmp_path / "run" / "report.html")
    check_whole(page, tmp_path / "run")
    assert "<img src=x onerror=alert(1)>" in page.text and "$\\frac{ 数字" in page.text


def told(rows, warnings):
    """Rows with the health of two blocks."""
    block = dict(
        fusion=[0.25, 0.75], fusion_spread=0.1, fusion_entropy=0.8,
        branches=[0.7, 0.2, 0.1], branches_spread=0.2, branches_entropy=0.73,
        branch_names=["3x3", "7x7", "3x3 dilated 3"],
        channel_saturated=0.1, spatial_saturated=0.0, temperatures=[1.0, 0.9],
    )  # fmt: skip
    blocks = {"layer1.0.se": block, "layer2.0.se": {**block, "fusion": None}}
    return [{**row, "health": {"blocks": blocks, "warnings": list(w)}} for row, w in zip(rows, warnings)]


def write_rows(folder, rows):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_health(run, copied):
    without = [{**row, "health": None} for row in rows(copied)]
    write_rows(copied, without)
    assert run("report", copied).code == 0
    assert "Routers and gates" not in Page(copied / "report.html").text and not (copied / "health.png").exists()

    write_rows(copied, told(without, [["layer1.0.se: early <trouble>"], ["layer2.0.se: the branch '3x3' takes all"]]))
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "val_acc')  # of a run that was killed
    result = run("report", copied)
    assert result.code == 0 and str(copied / "report.html") in result.out, result
    page = Page(copied / "report.html")
    check_whole(page, copied)
    after = page.text[page.text.index("Routers and gates") :]
    assert "After epoch 2:layer2.0.se: the branch '3x3' takes all" in after and "layer1.0.se: early <trouble>" in after
    assert "width:70.00%" in page.source and "7x7: 20.0 %" in page.of("span", "title")
    assert page.of("span", "title").count("maximum: 75.0 %") == 1  # the other block adds, and has no bar
    assert Image.open(copied / "health.png").size[0] > 900

    write_rows(copied, told(without, [["layer1.0.se: early"], []]))
    assert run("report", copied).code == 0
    assert "No warnings after epoch 2" in Page(copied / "report.html").text


def test_what_is_missing_is_said(run, refused, copied, tmp_path):
    settings = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**settings, "data": str(tmp_path / "moved")}))
    assert run("report", copied).code == 0
    text = Page(copied / "report.html").text
    assert "Not measured" in text and "moved" in text and "Curves" in text
    (copied / "metrics.jsonl").unlink()
    refused("report", copied, words=["no epoch to report on"])
    refused("report", tmp_path / "nowhere", words=["nowhere", "no run"])


def test_a_report_that_cannot_be_written_stops_no_run(run, refused, write_folder, quick, tmp_path):
    data = write_folder(tmp_path / "images", classes=(0, 1))
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    result = run("finetune", "--data", data, *quick, "--epochs", "1", "--output", tmp_path / "run")
    assert result.code == 0 and result.err == "", result
    assert "no report: " in result.out and "best model" in result.out
    refused("report", tmp_path / "run", words=["report.html", "cannot be written"])
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [".lock"]


def test_a_model_without_attention(run, write_folder, quick, tmp_path):
    data = write_folder(tmp_path / "images", classes=(3, 8))
    options = [*quick, "--model", "resnet20", "--epochs", "1", "--lr", "1e-9"]
    assert run("finetune", "--data", data, *options, "--output", tmp_path / "run").code == 0
    page = Page(tmp_path / "run" / "report.html")
    check_whole(page, tmp_path / "run")
    assert "Taken for" in page.text and "spatial mask" not in page.text
