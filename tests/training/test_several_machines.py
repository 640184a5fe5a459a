"""More than one process, machine or life, on loopback with gloo: what FSDP divides, who dies, and what stays equal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_cbam2.training.recipe import RECIPES

# Accelerate takes FSDP for GPUs only, though torch's runs on CPUs as well: this makes it take it here. There, gloo of
# torch 2.8 gives the sum of gradients where their mean is asked for; dividing is then left to FSDP itself.
DIVIDED = """
import sys
import torch.distributed.fsdp as fsdp
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
begin = AcceleratorState.__init__
def divided(self, *args, fsdp_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        PartialState().distributed_type = DistributedType.FSDP
AcceleratorState.__init__ = divided
shard = fsdp.fully_shard
def dividing(modules, **kwargs):
    made = shard(modules, **kwargs)
    for module in made if isinstance(made, list) else [made]:
        module.set_force_sum_reduction_for_comms(True)
    return made
fsdp.fully_shard = dividing
from timm_cbam2.cli import main
sys.argv[0] = "timm-cbam2"
main()
"""
FSDP = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="SIZE_BASED_WRAP")
FSDP |= dict(FSDP_MIN_NUM_PARAMS="5000", FSDP_RESHARD_AFTER_FORWARD="true", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT")
QUICK = ("--model", "resnet20_cbam2", "--no-pretrained", "--img-size", "8", "--workers", "0", "--batch-size", "4")
QUICK += ("--epochs", "2", "--augment", "none", "--save-every", "1 step")


# Rank 0 starts late when torchrun begins again: rank 1 must not take an address that the ended one left in the store.
LATE = """
import os, sys, time
if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
    time.sleep(3)
from timm_cbam2.cli import main
sys.argv[0] = "timm-cbam2"
main()
"""
STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # pytorch/pytorch#135712


@pytest.fixture(scope="module")
def images(write_folder, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data"), count=20)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start_divided(start_python):
    def call(*args):
        common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        common |= {"ACCELERATE_USE_CPU": "true", **FSDP}
        environments = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in range(2)]
        return [
            start_python("-c", DIVIDED, *args, env={k: str(v) for k, v in env.items()}, brief=True)
            for env in environments
        ]

    return call


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in lines]


def newest(folder):
    return max((folder / "checkpoints").glob("step-*"), default=None)


def weights(folder):
    return load_file(folder / "last" / "model.safetensors")


def wait_for(folder, step, alive):
    while newest(folder) is None or int(newest(folder).name[5:]) < step:
        assert alive(), "it ended before that"
        time.sleep(0.01)


def test_divided_model(start_divided, start_group, run, images, tmp_path):
    """FSDP2 with sharded checkpoints: killed and resumed bit for bit, equal to DDP within rounding, opened by timm."""
    args = ("finetune", "--data", images, *QUICK, "--opt", "sgd", "--lr", "0.05", "--resume", "auto", "--output")
    whole, killed, copies = tmp_path / "whole", tmp_path / "killed", tmp_path / "copies"
    for result in [p.wait() for p in start_divided(*args, whole)]:
        assert result.code == 0, result
    assert json.loads((whole / "run.json").read_text())["distributed_type"] == "FSDP"
    running = start_divided(*args, killed)
    wait_for(killed, 3, lambda: all(p.alive for p in running))
    for process in running:
        process.kill()
        process.wait()
    shards = [path.name for path in (newest(killed) / "model").iterdir()]
    assert sorted(name[:11] for name in shards) == ["shard-00001", "shard-00002", "tree.json"]
    running = start_divided(*args, killed)
    for result in [p.wait() for p in running]:
        assert result.code == 0, result
    assert "going on from" in running[0].out()
    for row, again in zip(rows(whole), rows(killed), strict=True):
        assert {k: (v, again[k]) for k, v in row.items() if v != again[k] and k != "health"} == {}
        assert row["health"] == again["health"]
    assert (killed / "last" / "model.safetensors").read_bytes() == (whole / "last" / "model.safetensors").read_bytes()
    for result in [p.wait() for p in start_group(2, *args, copies)]:
        assert result.code == 0, result
    for name, value in weights(copies).items():
        torch.testing.assert_close(weights(whole)[name], value, rtol=1e-3, atol=1e-5)
    model = timm.create_model(f"local-dir:{whole / 'last'}", pretrained=True)
    assert torch.isfinite(model.eval()(torch.zeros(1, 3, 8, 8))).all()
    assert run("evaluate", whole).code == 0


@pytest.fixture(scope="module")
def python(environment):
    """`python(*args)` starts an interpreter of its own, as launchers need."""

    def call(*args, **env):
        env = {**environment, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **env}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return subprocess.Popen([sys.executable, *map(str, args)], env=env, start_new_session=True, **pipes)

    return call


def ended(process):
    out, _ = process.communicate(timeout=600)
    return process.returncode, out


def test_two_machines(python, start, images, tmp_path):
    """Two launchers of two processes each, with the shipped configuration: the gradients are those of one process."""
    common = ("finetune", "--data", images, *QUICK, "--model", "test_convnext_cbam2", "--img-size", "32")
    common += ("--opt", "sgd", "--lr", "0.05", "--epochs", "1", "--save-every", "never")
    alone = start(*common, "--batch-size", "16", "--output", tmp_path / "one").wait()
    assert alone.code == 0, alone
    config, port = RECIPES / "accelerate" / "gpus_4x8.yaml", free_port()
    launch = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "--num_machines",
        "2",
        "--num_processes",
        "4",
    )
    launch += ("--mixed_precision", "no", "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    machines = [
        python(*launch, "--machine_rank", rank, "-m", "timm_cbam2.finetune", *common[1:], "--output", tmp_path / "two")
        for rank in (0, 1)
    ]
    for code, out in map(ended, machines):
        assert code == 0, out
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 4
    # Sums of gradients in another order, over three steps of plain SGD.
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-4, atol=1e-6)


def test_a_worker_dies_and_all_start_again(python, start_group, images, tmp_path):
    """torchrun --max-restarts: the last checkpoint is gone on from, and the end is the same bit by bit."""
    folder, late = tmp_path / "run", tmp_path / "late.py"
    late.write_text(LATE)
    args = ("--data", images, *QUICK, "--resume", "auto", "--output")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    elastic = python(*torchrun, late, "finetune", *args, folder, **STORE)
    wait_for(folder, 3, lambda: elastic.poll() is None)
    workers = subprocess.run(["pgrep", "-P", str(elastic.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    code, out = ended(elastic)
    assert code == 0 and out.count("going on from") == 1, out
    for result in [p.wait() for p in start_group(2, "finetune", *args, tmp_path / "whole")]:
        assert result.code == 0, result
    assert rows(folder) == rows(tmp_path / "whole")
    assert all(torch.equal(value, weights(folder)[name]) for name, value in weights(tmp_path / "whole").items())
