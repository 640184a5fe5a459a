"""Commands run as a user runs them, and folders of real images to run them on."""

import gc
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import removals
import torch
from PIL import Image
from warm import COMMAND, MODULES, Server, make_bare_python

gc.disable()  # until the tests are collected, with all that they import
# The models here are tiny: one thread each, so that several processes share the cores without waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
WATCH = str(ROOT / "tests" / "removals")  # its sitecustomize
# Not what reads the environment while it is imported, such as huggingface_hub.
LIBRARIES = ("torch", "torchvision", "scipy.optimize")
LONG = (
    *(
        "test_nothing_runs",
        "test_several_machines",
        "test_resume",
        "test_gpu_day",
        "test_package",
        "test_app",
        "test_ablation",
        "test_export",
        "test_readme",
        "test_training",
    ),
    *("test_folds", "test_automatic", "test_balance", "test_multi_label", "test_distill", "test_many_images"),
    *("test_benchmark", "test_streaming_resume", "test_models", "test_compile", "test_explain", "test_transformers"),
    *("test_hub", "test_cbam2", "test_push_run", "test_finetune", "test_cpu_kernel", "test_warm_start", "test_insert"),
    *("test_launch_configs", "test_run_report", "test_cli", "test_fused", "test_run_options", "test_remote_code"),
    *("test_repeated", "test_evaluate_predict", "test_data", "test_checkpoints"),
)


def pytest_configure(config):
    if not config.getoption("pythonwarnings"):
        for line in removals.pytest_filters():
            config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.module.__name__) if item.module.__name__ in LONG else len(LONG))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def same_numbers_every_time():
    """Random images and weights that a test does not seed: a failure must come again when the test is run again."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def removals_file(request, tmp_path_factory):
    """Where the processes of tests write what warned of a removal; None where `-W` was given."""
    if request.config.getoption("pythonwarnings"):
        return None
    file = tmp_path_factory.mktemp("removals") / "warnings.txt"
    file.touch()
    return file


def _watched(file):
    """What the environment of a process says so that `removals` watches it."""
    return {} if file is None else {removals.FILE: str(file), "PYTHONPATH": WATCH}


@pytest.fixture(autouse=True)
def nothing_will_be_removed(removals_file):
    """No process that the test started, or a fixture before it, warned that what was called will be removed."""
    yield
    if removals_file is not None and removals_file.stat().st_size:
        found = removals_file.read_text(encoding="utf-8")
        removals_file.write_text("")
        pytest.fail(f"a process warned of a removal:\n{found}", pytrace=False)


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """The interpreter of a fresh environment that has all this one has, except timm_cbam2."""
    return make_bare_python(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def environment(tmp_path_factory, removals_file):
    """Of every command: this checkout, no network, a cache of its own; a warning of a removal is written down."""
    cache = str(tmp_path_factory.mktemp("cache"))
    watched = _watched(removals_file)
    path = os.pathsep.join(filter(None, (str(ROOT), watched.get("PYTHONPATH"), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", **watched, "PYTHONPATH": path}
    # Threads that spin while they wait make two busy processes crawl.
    return {**os.environ, **offline, "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="session")
def start_python(environment):
    """`start_python(*args, cwd=..., env={})` starts `python ARGS`, like a user, with all that the commands import."""
    server = Server(sys.executable, MODULES, environment)
    yield server.start
    server.close()


@pytest.fixture(scope="session")
def start(start_python):
    """`start(*args, **more)` starts `timm-cbam2 ARGS` in a process of its own; `more` is that of `Server.start`.

    It ends briefly unless told otherwise: that saves half a second each time.
    """

    def call(*args, brief=True, **kwargs):
        return start_python("-c", COMMAND, *args, brief=brief, **kwargs)

    return call


def _scripts(python, removals_file):
    others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    server = Server(python, LIBRARIES, {**others, **_watched(removals_file)})

    def call(code, *args, cwd=None, env=None):
        return server.start("-c", code, *args, cwd=cwd, env=dict(env or os.environ), add=False, brief=True).wait()

    yield call
    server.close()


@pytest.fixture(scope="session")
def script(removals_file):
    """`script(code, *args, cwd=..., env=...)` runs `python -c CODE ARGS`, in no other environment than `env`.

    Nothing that reads the environment has been imported, nor this package, nor what it must not import.
    """
    yield from _scripts(sys.executable, removals_file)


@pytest.fixture(scope="session")
def bare_script(bare_python, removals_file):
    """The same where timm_cbam2 is not installed."""
    yield from _scripts(bare_python, removals_file)


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
    result = run("finetune", "--data", data, *QUICK, "--output", base / "run", brief=False)
    assert result.code == 0, result
    assert result.err == ""
    return base / "run", data
