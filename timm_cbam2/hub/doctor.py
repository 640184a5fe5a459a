"""`timm-cbam2 doctor`: what is installed here, what is missing, and what to do about it, on one screen."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import typer
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from ..kernels import status
from ..models.reach_cbam2 import unreachable
from ..terminal import say

__all__ = ["doctor"]

PACKAGE = "timm_cbam2"
SKIPPED = ("test",)  # extras of those who change this package
GIGABYTE = 1e9


def doctor() -> None:
    """Look at this machine: packages, GPU, CPU kernel, the Hub's login and cache, and what is missing.

    It changes nothing. Exit code 1 where a package that everything needs is missing or too old, otherwise 0.
    """
    advice: list[str] = []
    say(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {_cpus()} CPUs")
    broken = _packages(advice)
    _devices(advice)
    _kernel(advice)
    _triton()
    _hub(advice)
    say("", *(f"to do: {line}" for line in advice) if advice else ["nothing to do"])
    if broken:
        raise typer.Exit(1)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _packages(advice: list[str]) -> bool:
    """The packages that this one names, a line for those that it always needs and one for each extra.

    Returns:
        Whether one that it always needs is missing or too old.
    """
    try:
        say(f"timm_cbam2 {version(PACKAGE)}")
        named = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:
        say("timm_cbam2 is not installed, and runs from a folder")
        advice.append("install it, so that what it needs can be looked at: pip install FOLDER")
        return False
    extras: dict[str, list[Requirement]] = {}
    for requirement in named:
        marker = str(requirement.marker or "")
        found = marker.partition("extra == ")[2].strip("\"' )")
        if requirement.name.replace("-", "_") != PACKAGE:
            extras.setdefault(found, []).append(requirement)
    broken = False
    for extra, requirements in extras.items():
        if extra in SKIPPED:
            continue
        states = [_state(requirement) for requirement in requirements]
        say(f"  {extra or 'needed':8} " + ", ".join(text for text, _ in states))
        if not all(fits for _, fits in states):
            broken |= not extra
            what = f'"timm_cbam2[{extra}]"' if extra else "--upgrade timm_cbam2"
            advice.append(f"pip install {what}" + (f"  (only for what needs it: {extra})" if extra else ""))
    return broken


def _state(requirement: Requirement) -> tuple[str, bool]:
    """What is installed of a requirement, in words, and whether that will do."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} missing", False
    fits = requirement.specifier.contains(found, prereleases=True)
    return f"{requirement.name} {found}" + ("" if fits else f" (needs {requirement.specifier})"), fits


def _devices(advice: list[str]) -> None:
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(number)
            say(f"GPU {number}: {known.name}, {known.total_memory / GIGABYTE:.0f} GB")
    elif torch.backends.mps.is_available():
        say("GPU: Apple's, by MPS")
    else:
        built = f"torch is built for CUDA {torch.version.cuda}, and finds no GPU" if torch.version.cuda else ""
        say("GPU: none" + (f" ({built})" if built else " (this torch is built without CUDA)"))
        if shutil.which("nvidia-smi"):
            advice.append(
                "there is an NVIDIA driver, but torch sees no GPU: install the torch for it, from pytorch.org"
            )


def _kernel(advice: list[str]) -> None:
    """The compiled kernel of the blocks on CPUs: on, or what it takes."""
    now = status()
    if now["in_use"]:
        say("CPU kernel: on")
        return
    missing = [name for name, there in (("a C++ compiler", now["compiler"]), ("ninja", now["ninja"])) if not there]
    if now["built"]:
        say(f"CPU kernel: off; it is built ({now['library']})")
    else:
        say("CPU kernel: off; " + (f"it needs {' and '.join(missing)}" if missing else "it can be built"))
    if now["built"] or now["can_build"]:
        wait = "" if now["built"] else ", after a minute or two once"
        advice.append(f"TIMM_CBAM2_CPU_KERNEL=1 in front of a command speeds up training on CPUs{wait}")


def _triton() -> None:
    """The kernel of the blocks on GPUs, where there is one."""
    if torch.cuda.is_available():
        found = status()
        there = f"Triton {found['triton']}" if found["triton"] else "no Triton here"
        say(f"Triton kernel: {'on' if found['triton_in_use'] else 'off'}; {there}")


def _hub(advice: list[str]) -> None:
    host = unreachable()
    login = "a token is set" if get_token() else "no token"
    if constants.HF_HUB_OFFLINE:
        state = "offline, as HF_HUB_OFFLINE asks"
    else:
        state = f"{host} cannot be reached" if host else f"{constants.ENDPOINT} answers"
    say(f"Hub: {state}; {login}")
    if host:
        advice.append("only models and data in the cache, or in folders, can be had: check the network")
    elif not get_token():
        advice.append("to push, and for private repositories: hf auth login")
    cache = Path(constants.HF_HUB_CACHE)
    near = next(folder for folder in (cache, *cache.parents) if folder.exists())
    models = len(list(cache.glob("models--*")))
    free = shutil.disk_usage(near).free / GIGABYTE
    say(f"cache: {cache}, {models} model{'s' * (models != 1)}, {free:.0f} GB free there")
    if free < 2:
        advice.append(f"make room at {near}, or set HF_HOME to another place")
