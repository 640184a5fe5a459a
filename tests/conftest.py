"""Commands run as a user runs them, and folders of real images to run them on."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# The models here are tiny: one thread each, so that several processes share the cores without waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

Result = namedtuple("Result", "code out err")
ROOT = Path(__file__).resolve().parent.parent

# Importing torch takes seconds, so one process imports and then forks a fresh one for each command.
SERVER = """
import gc, json, os, resource, sys
gc.disable()
import accelerate, datasets, matplotlib.figure, sklearn.datasets
from timm_cbam2 import cli, loop, prepare
gc.freeze()
gc.enable()
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
        for fd in (1, 2):
            os.dup2(os.open(job["files"][fd - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.argv = ["timm-cbam2", *job["args"]]
        cli.main()
    print(child, flush=True)
"""


class Started:
    """A command that runs in a process of its own."""

    def __init__(self, server, pid, files):
        self.server, self.pid, self.files = server, pid, files

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    @property
    def alive(self):
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def out(self):
        return Path(self.files[0]).read_text()

    def wait(self):
        """Exit code, stdout and stderr when it has ended."""
        return Result(int(ask(self.server, {"wait": self.pid})), *(Path(file).read_text() for file in self.files))


def ask(server, job):
    server.stdin.write(json.dumps(job) + "\n")
    server.stdin.flush()
    return server.stdout.readline()


LONG = ("test_readme", "test_resume", "test_package", "test_app", "test_training", "test_finetune", "test_hub")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.module.__name__) if item.module.__name__ in LONG else len(LONG))


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """The interpreter of a fresh environment that has all this one has, except timm_cbam2."""
    import sysconfig
    import venv

    folder = tmp_path_factory.mktemp("bare")
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "timm_cbam2" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    (Path(site) / "packages.pth").write_text(f"{packages}\n")
    return python


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of every command: this checkout, no network, a cache of its own."""
    cache = str(tmp_path_factory.mktemp("cache"))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    # Threads that spin while they wait make two busy processes crawl.
    return {**os.environ, **offline, "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="session")
def start(environment, tmp_path_factory):
    """`start(*args, cwd=..., env={}, largest_file=None)` starts `timm-cbam2 ARGS` in a process of its own."""
    folder = tmp_path_factory.mktemp("output")
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdout.readline() == "ready\n"
    count = itertools.count()

    def call(*args, cwd=folder, env=None, largest_file=None):
        number = next(count)
        files = [str(folder / f"stdout{number}"), str(folder / f"stderr{number}")]
        job = {"args": [str(a) for a in args], "cwd": str(cwd), "files": files, "env": env or {}}
        return Started(server, int(ask(server, {**job, "largest_file": largest_file})), files)

    yield call
    server.stdin.close()
    server.wait(30)


@pytest.fixture(scope="session")
def start_group(start):
    """`start_group(processes, *args)` starts one command in several processes, as torchrun does."""

    def call(processes, *args, **kwargs):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        return [
            start(*args, env={k: str(v) for k, v in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}, **kwargs)
            for rank in range(processes)
        ]

    return call


@pytest.fixture(scope="session")
def run(start):
    """`run(*args, cwd=...)` runs `timm-cbam2 ARGS` in a process of its own: exit code, stdout and stderr."""

    def call(*args, **kwargs):
        return start(*args, **kwargs).wait()

    return call


@pytest.fixture(scope="session")
def refused(run):
    """`refused(*args, words=...)` checks that a command ends with one line on stderr and exit code 2."""

    def call(*args, words=(), **kwargs):
        result = run(*args, **kwargs)
        assert result.code == 2, result
        lines = result.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("timm-cbam2: "), result.err
        for word in words:
            assert str(word) in lines[0], (word, lines[0])
        return lines[0]

    return call


@pytest.fixture(scope="session")
def digits():
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.round(loaded.images * (255 / 16)).astype(np.uint8), loaded.target


@pytest.fixture(scope="session")
def write_folder(digits):
    """`write_folder(folder, classes, count, start=0)` writes PNG files of digits, a folder for each class."""

    def write(folder, classes=(0, 1, 2), count=12, start=0):
        pixels, labels = digits
        for digit in classes:
            where = Path(folder) / f"digit{digit}"
            where.mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(labels == digit)[start : start + count]):
                Image.fromarray(pixels[index]).save(where / f"{number:03}.png")
        return Path(folder)

    return write


@pytest.fixture
def truncate():
    """Cut a real JPEG in half: its header is fine, its pixels are not."""

    def cut(path):
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return cut


QUICK = ("--model", "resnet20_cbam2", "--img-size", "8", "--batch-size", "16", "--workers", "0", "--epochs", "2")


@pytest.fixture(scope="session")
def quick():
    """Options of a run of a second or two."""
    return QUICK


@pytest.fixture(scope="session")
def small_run(run, write_folder, tmp_path_factory):
    """A finished run on three digits, and the folder it was trained on."""
    base = tmp_path_factory.mktemp("small")
    data = write_folder(base / "images")
    result = run("finetune", "--data", data, *QUICK, "--output", base / "run")
    assert result.code == 0, result
    assert result.err == ""
    return base / "run", data
