"""`finetune --push-to`: the real client against a loopback server, and what a failure at the end costs."""

import json
import socket
import sys

import pytest
from hub_server import Hub
from warm import COMMAND, MODULES, Server


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def online(hub, environment, tmp_path_factory):
    """`online(*args, **env)` starts a command for which the stand-in is the Hub."""
    home = tmp_path_factory.mktemp("home")
    env = {**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1"}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        env.pop(name, None)
    server = Server(sys.executable, [*MODULES, "timm_cbam2.hub.push"], env)

    def call(*args, **env):
        return server.start("-c", COMMAND, *args, cwd=home, env=env, brief=True)

    yield call
    server.close()


TOKEN = {"HF_TOKEN": "hf_test"}
FILES = {"config.json", "model.safetensors", "README.md"}


def test_the_best_model_goes_up(hub, online, small_run, quick, tmp_path):
    args = ("finetune", "--data", small_run[1], *quick, "--output", tmp_path / "run", "--push-to", "user/digits")
    result = online(*args, **TOKEN).wait()
    assert result.code == 0 and "Traceback" not in result.err, result
    up = hub.repos["user/digits"]["main"]
    assert up.keys() > FILES
    assert up["model.safetensors"] == (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(row["val_accuracy"] for row in rows)
    assert f"{100 * best:.2f} %" in up["README.md"].decode() and 'hf-hub:user/digits"' in up["README.md"].decode()
    assert "done: " in result.out and "user/digits" in result.out
    assert result.out.index("best validation accuracy") < result.out.index("model user/digits:")


@pytest.mark.parametrize("fault", ["no server", "no write access"])
def test_a_failing_push_costs_nothing(hub, online, run, small_run, quick, tmp_path, fault):
    """One line, a whole run, and the line's own command sends it later."""
    folder, repo = tmp_path / "run", f"user/{fault.replace(' ', '-')}"
    args = ("finetune", "--data", small_run[1], *quick, "--epochs", "1", "--output", folder, "--push-to", repo)
    if fault == "no server":
        hub.fault("POST /api/repos/create", "cut", times=10)
    else:
        hub.fault("POST .*/commit/", 403)
    result = online(*args, **TOKEN).wait()
    hub.faults.clear()
    assert result.code == 2, result
    line = result.err.splitlines()[-1]  # after the client's own progress bars
    again = f"timm-cbam2 push {folder} {repo}"
    assert "Traceback" not in result.err and "the run is complete, but --push-to failed" in line, result
    assert line.endswith(f"try again with: {again}")
    files = {path.name for path in folder.iterdir()}
    assert {"best", "last", "checkpoints", "metrics.jsonl", "report.html", "run.json"} <= files
    assert run("evaluate", folder).code == 0
    result = online(*again.split()[1:], **TOKEN).wait()
    assert result.code == 0, result
    sent = hub.repos[repo]["main"]["model.safetensors"]
    assert sent == (folder / "best" / "model.safetensors").read_bytes()


def test_what_the_upload_needs_is_asked_before_the_training(refused, online, small_run, quick, tmp_path):
    args = ("finetune", "--data", small_run[1], *quick, "--output", tmp_path / "run", "--push-to")
    result = online(*args, "user/model").wait()
    assert result.code == 2 and "no Hub token" in result.err and result.err.count("\n") == 1, result
    refused(*args, "user/model", words=("HF_HUB_OFFLINE is set",))
    refused(*args, "user/a b", words=("user/a b", "write user/name"))
    assert not (tmp_path / "run").exists()


def test_two_processes_push_once(hub, online, small_run, quick, tmp_path):
    args = ("finetune", "--data", small_run[1], *quick, "--epochs", "1", "--output", tmp_path / "run")
    args += ("--push-to", "user/two")
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        common["MASTER_PORT"] = str(probe.getsockname()[1])
    before = len(hub.commits)
    both = [online(*args, **TOKEN, **common, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)]
    assert [p.wait().code for p in both] == [0, 0]
    assert [repo for repo, *_ in hub.commits[before:]] == ["user/two"]
