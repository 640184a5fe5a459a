"""Nothing is lost: killed anywhere, stopped, damaged, out of disk, a run goes on, or says why not."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from timm_cbam2.training.states import read_state

# Everything with randomness or memory of its own: dropped paths, mixing, an average of the weights, accumulation.
FULL = (
    *("--model", "resnet20_cbam2", "--no-pretrained", "--img-size", "8", "--workers", "0", "--epochs", "2"),
    *("--model-kwargs", "drop_path_rate=0.2", "drop_rate=0.1", "--mixup", "0.2", "--cutmix", "1.0", "--ema", "0.9"),
    *("--augment", "standard", "--random-erasing", "0.3", "--clip-grad", "1", "--layer-decay", "0.8"),
    *("--batch-size", "4", "--accumulate", "2", "--save-every", "1 step"),
)
STEPS = 12  # of the whole run: 48 images, 12 batches, 6 steps an epoch


@pytest.fixture(scope="module")
def images(write_folder, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), count=20)


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in lines]


def steps(folder):
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))


def same(one, other):
    """Whether two states are equal, bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        times = ("seconds", "images_per_second")
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one if k not in times)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def assert_same_run(one, other):
    """Weights, average, optimizer, position, generators of every process, kept models and metrics."""
    for row, again in zip(rows(one), rows(other), strict=True):
        assert {k: (v, again[k]) for k, v in row.items() if v != again[k]} == {}
    (a,), (b,) = ((folder / "checkpoints").glob("step-*") for folder in (one, other))
    assert a.name == b.name
    names = sorted(p.name for p in a.iterdir())
    assert names == sorted(p.name for p in b.iterdir())
    states = {"model", "optimizer", "ema", "position", "random_0"}
    assert {*(f"{name}.safetensors" for name in states), "checkpoint.json", "SHA256SUMS"} <= set(names)
    for name in names:
        if name.endswith(".safetensors"):
            assert same(read_state(a / name), read_state(b / name)), name
    for name in ("best", "last"):
        assert (one / name / "model.safetensors").read_bytes() == (other / name / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(start_group, run, images, tmp_path_factory):
    """Runs that nothing interrupted, by their number of processes."""
    folders = {}
    for processes in (1, 2):
        folder = folders[processes] = tmp_path_factory.mktemp("whole") / "run"
        args = ("finetune", "--data", images, *FULL, "--output", folder)
        for result in [p.wait() for p in start_group(processes, *args)] if processes > 1 else [run(*args)]:
            assert result.code == 0 and result.err == "", result
    assert rows(folders[1])[-1]["step"] == STEPS and rows(folders[1]) != rows(folders[2])
    return folders


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_points(start_group, start, images, whole, tmp_path, processes):
    """SIGKILL again and again, at steps drawn by a seed and a moment later: the end is the same, bit by bit."""
    seed = int(os.environ.get("KILL_SEED", "5")) + processes
    draw = random.Random(seed)
    total = STEPS if processes == 1 else -(-STEPS // 2)
    targets = sorted(draw.sample(range(1, total), 3))
    print(f"seed {seed}: killed after steps {targets}")
    folder = tmp_path / "run"
    args = ("finetune", "--data", images, *FULL, "--output", folder, "--resume", "auto")

    def launch():
        return start_group(processes, *args) if processes > 1 else [start(*args)]

    for target in targets:
        running = launch()
        while max(steps(folder), default=0) < target:
            assert all(p.alive for p in running), [p.wait() for p in running]
            time.sleep(0.005)
        time.sleep(draw.random() * 0.08)
        victim = draw.choice(running)
        victim.kill()
        for process in running:
            result = process.wait()
            if process is victim:
                assert result.code == -signal.SIGKILL
            else:  # it does not hang, and says why it ends
                assert result.code == 2 and "another process of this run" in result.err, result
    for result in [p.wait() for p in launch()]:
        assert result.code == 0 and result.err == "", result
    assert "going on from" in running[0].out()
    assert_same_run(whole[processes], folder)


def test_killed_before_the_first_checkpoint(refused, run, images, whole, tmp_path):
    """A row is written before the checkpoint that follows it: such a run begins anew, another one's is left alone."""
    folder = shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    args = ("finetune", "--data", images, *FULL, "--output", folder, "--resume", "auto")
    refused(*args, "--seed", "9", words=("other settings", "no checkpoint"))
    assert rows(folder) == rows(whole[1])
    result = run(*args)
    assert result.code == 0 and "begins anew" in result.out, result
    assert_same_run(whole[1], folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop(start, run, images, whole, tmp_path, number):
    """A signal: all is saved, exit code 75; the folder alone is enough to go on."""
    folder = tmp_path / "run"
    args = [arg if arg != "1 step" else "never" for arg in FULL]
    running = start("finetune", "--data", images, *args, "--output", folder)
    while not (folder / "metrics.jsonl").exists():
        assert running.alive, running.wait()
        time.sleep(0.005)
    running.kill(number)
    result = running.wait()
    assert result.code == 75 and result.err.count("\n") == 1, result
    assert number.name in result.err and f"--resume {folder}" in result.err
    assert len(steps(folder)) == 1
    if number == signal.SIGTERM:
        assert run("evaluate", folder).code == 0
    result = run("finetune", "--resume", folder)
    assert result.code == 0 and result.err == "", result
    assert_same_run(whole[1], folder)
    if number == signal.SIGTERM:
        result = run("finetune", "--resume", folder)  # once more: there is nothing left to do
        assert result.code == 0 and "done in" in result.out, result


def test_a_live_run_is_left_alone(start, refused, run, images, tmp_path):
    folder = tmp_path / "run"
    args = ("finetune", "--data", images, *FULL, "--output", folder)
    running = start(*args, "--epochs", "1000")
    while not steps(folder):
        assert running.alive, running.wait()
        time.sleep(0.01)
    refused(*args, "--resume", "auto", words=(folder, "a run that is alive"))
    running.kill()
    running.wait()
    refused(*args, words=(folder, "already holds a run", "--resume auto"))


@pytest.fixture(scope="module")
def killed(start, images, tmp_path_factory):
    """A run that was killed after some steps."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    running = start("finetune", "--data", images, *FULL, "--output", folder)
    while max(steps(folder), default=0) < 8:
        assert running.alive, running.wait()
        time.sleep(0.005)
    running.kill()
    running.wait()
    return folder


@pytest.fixture
def half(killed, images, tmp_path):
    """A copy of it, and the command that goes on with it."""
    folder = shutil.copytree(killed, tmp_path / "run")
    return folder, ("finetune", "--data", images, *FULL, "--output", folder, "--resume", "auto")


@pytest.mark.parametrize("fault", ["cut off", "flipped", "sums", "missing"])
def test_a_damaged_checkpoint(run, half, whole, fault):
    """It is named, set aside, and the one before is used."""
    folder, args = half
    newest = folder / "checkpoints" / f"step-{steps(folder)[-1]:08}"
    file = newest / ("SHA256SUMS" if fault == "sums" else "optimizer.safetensors")
    content = bytearray(file.read_bytes())
    if fault == "cut off":
        file.write_bytes(content[: len(content) // 2])
    elif fault == "missing":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    if fault == "flipped":  # one of the same step was set aside before
        shutil.copytree(newest, newest.with_name(f"damaged-{newest.name}"))
    result = run(*args)
    assert result.code == 0, result
    (line,) = [line for line in result.out.splitlines() if str(newest) in line]
    assert f"step-{steps_before(newest):08}" in line and ("damaged" in line or "missing" in line), line
    assert (folder / "checkpoints" / f"damaged-{newest.name}").is_dir()
    assert_same_run(whole[1], folder)


def steps_before(path):
    return int(path.name[5:]) - 1


def test_from_another_directory(run, refused, small_run, images, quick, tmp_path):
    """A run that started from a folder's model, by a relative path, goes on from anywhere, in its own folder only."""
    shutil.copytree(small_run[0] / "best", tmp_path / "first")
    args = ("finetune", "--data", images, *quick, "--model", "first", "--epochs", "1", "--output", "run")
    result = run(*args, cwd=tmp_path)
    assert result.code == 0, result
    (tmp_path / "elsewhere").mkdir()
    again = ("finetune", "--resume", "../run", "--epochs", "2")
    refused(*again, "--output", "new", words=("--resume ../run", "leave --output new out"), cwd=tmp_path / "elsewhere")
    result = run(*again, cwd=tmp_path / "elsewhere")
    assert result.code == 0 and "going on from" in result.out, result
    assert not (tmp_path / "elsewhere" / "new").exists()


def test_no_whole_checkpoint_is_left(refused, half):
    folder, args = half
    for path in (folder / "checkpoints").glob("step-*"):
        (path / "model.safetensors").write_bytes(b"")
    refused(*args, words=("model.safetensors", "no other is left"))


def test_the_disk_is_full(run, half, whole):
    """A limit on the size of files stands for it: torch and safetensors fail alike."""
    folder, args = half
    before = {p.name: hashlib.sha256((p / "optimizer.safetensors").read_bytes()).digest() for p in checkpoints(folder)}
    size = (checkpoints(folder)[0] / "model.safetensors").stat().st_size
    for largest in (size // 2, size + 1000):  # the weights do not fit, or only the optimizer's state does not
        result = run(*args, largest_file=largest)
        assert result.code == 2 and result.err.count("\n") == 1, result
        assert "cannot write the checkpoint" in result.err and f"step-{steps(folder)[-1]:08}" in result.err, result.err
        assert "File too large" in result.err or "make room" in result.err
    after = {p.name: hashlib.sha256((p / "optimizer.safetensors").read_bytes()).digest() for p in checkpoints(folder)}
    assert before == after and not list((folder / "checkpoints").glob(".*"))
    assert run(*args).code == 0
    assert_same_run(whole[1], folder)


def checkpoints(folder):
    return sorted((folder / "checkpoints").glob("step-*"))


def test_what_may_change_between_the_parts_of_a_run(run, refused, start_group, half, images, write_folder, tmp_path):
    folder, args = half
    refused(*args, "--lr", "0.5", words=("cannot resume", "--lr was 0.002 and is now 0.5"))
    refused(*args, "--model", "resnet20", words=("cannot resume", "--model was resnet20_cbam2"))
    other = write_folder(tmp_path / "other", count=21)
    refused(*args, "--data", other, words=("cannot resume", "the data changed"))
    both = [p.wait() for p in start_group(2, *args)]
    assert {r.code for r in both} == {2} and "give --batch-size 2" in both[0].err, both
    both = [p.wait() for p in start_group(2, *args, "--batch-size", "2", "--epochs", "3", "--mixup", "0.2")]
    assert {r.code for r in both} == {0}, both
    assert "--epochs was 2 and is now 3" in both[0].out and "not bit-identical" in both[0].out, both[0]
    refused("finetune", "--resume", tmp_path, words=("is no run folder",))
    refused("finetune", "--resume", "auto", words=("--output",))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_num_processes(start, images, tmp_path, number):
    """One command starts two processes; told to stop it exits with 75, and when one dies it says so and ends."""
    folder = tmp_path / "run"
    args = ("finetune", "--data", images, *FULL, "--output", folder)
    process = start(*args, "--num-processes", "2", "--resume", "auto", "--epochs", "1000")
    while "epoch   1/" not in process.out():
        assert process.alive, process.wait()
        time.sleep(0.02)
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    if number == signal.SIGTERM:
        process.kill(number)
    else:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[-1]), number)
    code, _, err = process.wait()
    lines = err.splitlines()
    assert len(lines) == 1, err
    if number == signal.SIGTERM:
        assert code == 75 and "all is saved" in lines[0], err
        assert len(steps(folder)) >= 1
    else:
        assert code == 2 and "of 2 died (SIGKILL" in lines[0] and "--resume auto" in lines[0], err
