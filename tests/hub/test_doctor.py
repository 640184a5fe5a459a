"""`timm-cbam2 doctor` tells what is there, and what to do about what is not."""

import importlib.metadata

import pytest
import typer

from timm_cbam2.hub import doctor as module
from timm_cbam2.hub.doctor import doctor


def test_it_tells_what_is_here(run):
    result = run("doctor", env={"HF_TOKEN": "hf_test"})
    assert result.code == 0 and result.err == "", result
    lines = result.out.splitlines()
    assert lines[0].startswith("Python 3.") and len(lines) < 24
    for package in ("torch", "timm", "transformers", "accelerate"):
        assert f"{package} {importlib.metadata.version(package)}" in result.out
    assert "Hub: offline, as HF_HUB_OFFLINE asks; a token is set" in result.out
    assert any(line.startswith("cache: ") and line.endswith("GB free there") for line in lines)


def test_it_says_what_to_do(monkeypatch, capsys):
    asked = ["torch>=1.0", "timm>=999", "nothing_called_so>=1; extra == 'app'", "timm_cbam2[app]; extra == 'test'"]
    monkeypatch.setattr(module, "requires", lambda name: asked)
    monkeypatch.setattr(module, "unreachable", lambda: "the.hub")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1e9}))
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(typer.Exit) as ended:
        doctor()
    assert ended.value.exit_code == 1
    out = capsys.readouterr().out
    assert "(needs >=999)" in out and "nothing_called_so missing" in out and "the.hub cannot be reached" in out
    todo = [line for line in out.splitlines() if line.startswith("to do: ")]
    for words in (
        "pip install --upgrade timm_cbam2",
        'pip install "timm_cbam2[app]"',
        "check the network",
        "make room",
    ):
        assert any(words in line for line in todo), (words, todo)
    monkeypatch.setattr(module, "requires", lambda name: asked[:1])
    doctor()


def test_it_runs_where_the_package_is_not_installed(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    doctor()
    assert "timm_cbam2 is not installed, and runs from a folder" in capsys.readouterr().out


def test_the_cpu_kernel_as_kernels_status_tells_it(monkeypatch, capsys):
    whole = {"in_use": False, "built": False, "can_build": True, "library": "lib.so", "compiler": "c++", "ninja": "n"}
    for now, says, advised in (
        ({"in_use": True}, "CPU kernel: on", False),
        ({}, "CPU kernel: off; it can be built", "after a minute or two once"),
        ({"built": True, "can_build": False, "ninja": None}, "CPU kernel: off; it is built (lib.so)", "on CPUs"),
        ({"can_build": False, "ninja": None}, "CPU kernel: off; it needs ninja", False),
        ({"can_build": False, "compiler": None, "ninja": None}, "it needs a C++ compiler and ninja", False),
    ):
        monkeypatch.setattr(module, "status", lambda now=now: whole | now)
        doctor()
        out = capsys.readouterr().out
        assert says in out and ("TIMM_CBAM2_CPU_KERNEL=1" in out) == bool(advised) and (advised or "") in out, out


def test_ninja_of_an_environment_that_is_not_activated(script, environment, tmp_path):
    """Commands are also called as .venv/bin/timm-cbam2, which puts nothing on the path."""
    interpreter = tmp_path / "python"
    interpreter.touch()
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    code = "import sys, timm_cbam2.kernels; sys.executable = sys.argv[1]; print(timm_cbam2.kernels.status()['ninja'])"
    assert script(code, interpreter, env={**environment, "PATH": "/nowhere"}).out == f"{tmp_path / 'ninja'}\n"
