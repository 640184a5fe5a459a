"""The experiment runner: a grid is checked, killed at any moment it goes on, and its numbers are what they say."""

import json
import signal
import time
from functools import partial

import numpy as np
import pytest
import timm
import torch
from transformers import AutoModelForImageClassification

from timm_cbam2 import Cbam2, save
from timm_cbam2.errors import UserError
from timm_cbam2.evidence.ablation.grid import Job, read_grid
from timm_cbam2.evidence.ablation.results import RESULTS, Results, compare, estimate
from timm_cbam2.evidence.ablation.table import markdown

TINY = """
recipes:
  small: {data: images, img_size: 8, epochs: 3, batch_size: 16, lr: 0.003, val_split: 0.2, cache_images: true}
variants:
  plain: {model: resnet20}
  more: {start: {run: plain, model: resnet20_cbam2}, epochs: 1, about: attention put in}
questions:
  gain: {asks: "does it help?", control: plain, variants: [more], seeds: [0]}
"""


@pytest.fixture
def ablation(start_python, tmp_path):
    """`ablation(*args)` starts `python -m timm_cbam2.ablation ARGS`, at the head of a process group of its own."""
    return partial(start_python, "-m", "timm_cbam2.ablation", cwd=tmp_path, brief=True)


def finish(process):
    result = process.wait()
    assert result.code == 0, result
    return result.out


def wait_for(what, process):
    while not what():
        assert process.alive, process.wait()
        time.sleep(0.02)


def measured(path):
    """The results without what differs from run to run."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in rows]


def test_killed_at_any_moment_it_goes_on(ablation, write_folder, tmp_path):
    write_folder(tmp_path / "images", count=80)
    grid = tmp_path / "grid.yaml"
    grid.write_text(TINY)
    out = finish(ablation("run", "--grid", grid, "--runs", "whole"))
    assert "2 to go" in out and "plain-seed0" in out and "more-seed0" in out
    whole = measured(tmp_path / "whole" / "results.jsonl")
    assert [row["variant"] for row in whole] == ["plain", "more"] and len(whole[0]["val_accuracy"]) == 3
    assert whole[1]["start_accuracy"] == whole[0]["accuracy"]  # put in at the identity
    assert whole[0]["accuracy"] == pytest.approx(whole[0]["val_accuracy"][-1], abs=1e-9)
    assert whole[0]["parameters"] < whole[1]["parameters"] and whole[1]["health"]

    command = ("run", "--grid", grid, "--runs", "killed")
    metrics = tmp_path / "killed" / "plain-seed0" / "metrics.jsonl"
    first = ablation(*command)
    wait_for(metrics.exists, first)
    first.kill_group()  # the runner and the training, in the middle of an epoch
    first.wait()
    second = ablation(*command)
    wait_for(lambda: (tmp_path / "killed" / "more-seed0" / "run.json").exists(), second)
    second.kill()  # the runner alone: the training lives on
    second.wait()
    out = finish(ablation(*command))
    assert "1 finished before, 1 to go" in out
    assert measured(tmp_path / "killed" / "results.jsonl") == whole
    assert json.loads((tmp_path / "whole" / "results.jsonl").read_text().splitlines()[0])["cpu_seconds"] > 0
    assert "0 to go" in finish(ablation(*command))

    grid.write_text(TINY.replace("lr: 0.003", "lr: 0.3"))  # what is there must not pass for this
    for arguments in (command, (*command, "--results", "new.jsonl"), ("table", "--results", "killed/results.jsonl")):
        result = ablation(*arguments, "--grid", grid).wait()
        assert result.code == 2 and len(result.err.splitlines()) == 1, result
    assert measured(tmp_path / "killed" / "results.jsonl") == whole and not (tmp_path / "new.jsonl").exists()
    grid.write_text(TINY)

    out = finish(ablation("table", "--grid", grid, "--results", "killed/results.jsonl", "-o", "picture.png"))
    assert "| plain |" in out and "(one pair)" in out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_saves_and_says_how_to_go_on(ablation, write_folder, tmp_path):
    write_folder(tmp_path / "images")
    (tmp_path / "grid.yaml").write_text(TINY.replace("epochs: 3", "epochs: 500"))
    process = ablation("run", "--grid", "grid.yaml", "--runs", "runs")
    wait_for((tmp_path / "runs" / "plain-seed0" / "metrics.jsonl").exists, process)
    process.kill(signal.SIGTERM)
    result = process.wait()
    assert result.code == 130 and "stopped in plain-seed0: the same command goes on" in result.err, result
    assert not (tmp_path / "runs" / "results.jsonl").exists()


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("model: resnet20}", "modle: resnet20}", ("variant plain", "modle", "model")),
        ("epochs: 3", "epoch: 3", ("epoch", "epochs")),
        ("run: plain", "run: plian", ("plian", "plain")),
        ("[more]", "[mroe]", ("mroe", "more")),
        ("control: plain, ", "", ("gain", "lacks control")),
        ("seeds: [0]", "seeds: 3", ("seeds", "[0, 1, 2]")),
        ("epochs: 3, ", "", ("plain", "epochs None")),
        ("epochs: 1,", "epochs: 0,", ("more", "epochs 0")),
        ("start: {run: plain, model: resnet20_cbam2}", "start: plain", ("more: start", "'plain'")),
        ("plain: {model: resnet20}", "plain: 3", ("variants: plain is 3",)),
        ("questions:", "question:", ("questions",)),
        ("recipes:", "recipes: [", ("cannot be read",)),
    ],
)
def test_a_mistake_in_the_grid_is_one_line(tmp_path, old, new, words):
    path = tmp_path / "grid.yaml"
    path.write_text(TINY.replace(old, new))
    with pytest.raises(UserError) as error:
        read_grid(path)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_what_is_asked_for_is_found_or_refused():
    grid = read_grid()
    jobs = list(grid.jobs("x.parquet", ["controls"]))
    assert [j.seed for j in jobs] == sorted(j.seed for j in jobs) and len(
        jobs
    ) == 24  # every control before a next seed
    assert {j.name for j in grid.jobs("x", ["controls"], ["plain"], [1])} == {"plain-seed1"}
    every = [j.name for j in grid.jobs("x")]
    assert len(set(every)) == len(every)
    for arguments, word in (
        ((["control"], (), ()), "controls"),
        (((), ["cbma"], ()), "cbam"),
        (((), (), [99]), "seed"),
    ):
        with pytest.raises(UserError, match=word):
            list(grid.jobs("x", *arguments))


def row(variant, seed, accuracy, **options):
    return dict(variant=variant, seed=seed, accuracy=accuracy, epochs=2, parameters=5, options=options)


def test_results_survive_a_torn_line_and_are_not_mixed(tmp_path):
    path = tmp_path / "results.jsonl"
    results = Results(path)
    results.append(row("a", 0, 0.5, lr=1.0, data="x"))
    with path.open("a") as file:
        file.write('{"variant": "a", "se')  # killed while writing
    results = Results(path)
    assert len(results.rows) == 1
    results.append(row("a", 1, 0.6, lr=1.0, data="x"))
    assert [r["seed"] for r in Results(path).rows] == [0, 1]
    assert results.find(Job("a", 1, {"lr": 1.0, "data": "/some/where/x.parquet"}))["accuracy"] == 0.6
    assert results.find(Job("a", 2, {"lr": 1.0, "data": "x"})) is None
    with pytest.raises(UserError, match="a-seed1 with lr=1.0, the grid says 2.0"):
        results.find(Job("a", 1, {"lr": 2.0, "data": "x"}))
    path.write_text('{"variant": "a"}\n')
    with pytest.raises(UserError, match="line 1, is not a result"):
        Results(path)


def test_intervals_and_pairs(tmp_path):
    found = estimate([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.half == pytest.approx(
        4.302653 * np.std([1, 2, 4], ddof=1) / 3**0.5
    )
    assert estimate([3.0]).half is None and estimate([]) is None
    path = tmp_path / "grid.yaml"
    path.write_text(TINY.replace("[0]", "[0, 1, 2]"))
    grid = read_grid(path)
    values = {("plain", 0): 0.80, ("plain", 1): 0.82, ("more", 0): 0.81, ("more", 1): 0.85, ("more", 2): 0.70}
    rows = [row(*key, value) for key, value in values.items()] + [row("more", 7, 0.0)]
    control, other = compare(grid, grid.questions[0], rows)
    assert control.difference is None and control.accuracy.count == 2
    assert other.accuracy.count == 3 and other.difference.count == 2  # only seeds that both have
    assert other.difference.mean == pytest.approx(2.0) and other.difference.half == pytest.approx(12.7062, rel=1e-4)
    table = markdown(grid, grid.questions[0], rows)
    assert "+2.00 ± 12.71" in table and "3 of 3" in table and "| control |" in table


def test_the_committed_results_are_of_the_committed_grid():
    results, grid = Results(RESULTS), read_grid()
    assert results.rows
    for found in results.rows:
        job = grid.job(found["variant"], found["seed"], "cifar10_jpeg/train.parquet")
        assert results.find(job) is found
        assert len(found["val_accuracy"]) == found["epochs"] == job.options["epochs"]
    assert len({(r["variant"], r["seed"]) for r in results.rows}) == len(results.rows)


def test_a_mistake_on_the_command_line_is_one_line(ablation, tmp_path):
    result = ablation("run", "--question", "control").wait()
    assert (result.out, result.err.splitlines()) == (
        "",
        ["timm-cbam2: no question is called control; there are controls, sgd, position, parts, further, convnext"],
    )
    assert result.code == 2
    (tmp_path / "file").write_text("x")
    for arguments in (
        ("table", "--results", tmp_path),
        ("table", "-o", tmp_path / "none" / "x.png"),
        ("run", "--data", "x.parquet", "--runs", tmp_path / "file"),
        ("position", "-o", tmp_path),
    ):
        result = ablation(*arguments).wait()
        assert result.code == 2 and len(result.err.splitlines()) == 1, result
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name, stages", [("resnet20_cbam2", [1, 2]), ("test_convnext_cbam2", [0])])
def test_attention_in_some_stages_only(name, stages, tmp_path):
    model = timm.create_model(name, num_classes=3, cbam2_stages=stages).eval()
    blocks = {
        n.split(".")[1 if "convnext" in name else 0][-1] for n, m in model.named_modules() if isinstance(m, Cbam2)
    }
    assert blocks == {str(stage + ("resnet" in name)) for stage in stages}
    save(model, tmp_path / "model")
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    for again in (
        timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval(),
        AutoModelForImageClassification.from_pretrained(tmp_path / "model"),
    ):
        assert torch.equal(getattr(again(images), "logits", again(images)), model(images))
    for wrong in ([], [4], [True], 1):
        with pytest.raises(ValueError, match="cbam2_stages"):
            timm.create_model(name, cbam2_stages=wrong)
