"""Processes and devices: one Accelerator for every machine, and `--num-processes N` that truly starts N."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Iterator

from ..errors import QUIET, STOPPED, UserError, command_line, one_line

__all__ = [
    "is_launched",
    "launch",
    "lost_peers",
    "make_accelerator",
    "not_divided",
    "slow_precision",
    "tracker_names",
    "usable_cpus",
]

TIMEOUT = timedelta(minutes=10)  # a process that neither answers nor dies ends the run after this


def usable_cpus() -> int:
    """Number of CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_launched() -> bool:
    """Whether a launcher (ours, accelerate's, torchrun, Slurm through them) started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(processes: int, cpu: bool) -> int:
    """Run this very command in `processes` processes on this machine, by torch's own elastic launcher.

    Returns:
        The exit code: 0, that of a process that was told to stop, or 2 after a mistake.

    Raises:
        UserError: what the first process to fail said, or how it died.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    arguments = command_line()
    if arguments is None:
        raise UserError("num_processes starts processes from the command line only: use timm-cbam2 finetune")
    if cpu or not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif processes > torch.cuda.device_count():
        raise UserError(f"--num-processes {processes}: there are {torch.cuda.device_count()} GPUs here; or add --cpu")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // processes)))
    os.environ[QUIET] = "1"
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # the reason is ours to tell, once
    # For a process to save in, once told to stop; torch 2.8 gives 30 seconds, always.
    patience = {"shutdown_timeout": 60} if hasattr(LaunchConfig, "shutdown_timeout") else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="timm_cbam2",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        **patience,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "timm_cbam2.finetune", *arguments)
    except SignalException:
        return STOPPED
    except ChildFailedError as error:
        return _explain(error.failures, processes)
    return 0


def _explain(failures: dict[int, Any], processes: int) -> int:
    """The exit code when every failed process was told to stop; otherwise raises what the first to fail said."""
    killed = {rank: f for rank, f in failures.items() if f.exitcode < 0 and f.signal_name() != "SIGTERM"}
    rank, first = min((killed or failures).items(), key=lambda item: item[1].timestamp)
    if first.exitcode == STOPPED:
        return STOPPED
    if first.exitcode < 0:
        raise UserError(
            f"process {rank} of {processes} died ({first.signal_name()}: killed from outside, "
            "often for want of memory), so the run was ended: go on with --resume auto"
        )
    if first.exitcode == 2 and isinstance(first.message, str):
        raise UserError(first.message)
    raise UserError(
        f"process {rank} of {processes} failed (exit code {first.exitcode}, see above), so the run was ended"
    )


@contextmanager
def lost_peers() -> Iterator[None]:
    """Within the context, the error of a process whose peer went away becomes one line.

    Raises:
        UserError: another process ended or did not answer in time.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"another process of this run ended or no longer answers, so this one ends too ({one_line(error, 120)}): "
            "see what that one said, and go on with --resume auto"
        ) from error


def tracker_names(track: str | None) -> list[str]:
    """ "tensorboard,wandb" as a list."""
    return [name.strip() for name in (track or "").split(",") if name.strip()]


def _stale_addresses(error: Exception) -> str:
    """What to do where processes that torchrun started again may have met addresses of those before, or nothing."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # pytorch/pytorch#135712
    if not shared or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or "connect" not in str(error):
        return ""
    return (
        "; these processes were started again and may have been given addresses of those that ended: set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started, and go on with --resume auto"
    )


def make_accelerator(settings: dict[str, Any], log_folder: str | None) -> Any:
    """The Accelerator of a run, from Accelerate's own configuration and what `settings` say.

    Raises:
        UserError: another number of processes than asked for, or a tracker that is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs

    # DDP says this once of 1-channel kernels, whose strides have no meaning.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        accelerator = Accelerator(
            cpu=settings["cpu"],
            mixed_precision=settings["mixed_precision"],
            gradient_accumulation_steps=settings["accumulate"],
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=settings["seed"]),
            step_scheduler_with_optimizer=False,
            log_with=tracker_names(settings["track"]) or None,
            project_dir=log_folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"Accelerate cannot start: {error}{_stale_addresses(error)}") from error
    asked = settings["num_processes"]
    if asked is not None and accelerator.num_processes != asked:
        raise UserError(
            f"--num-processes {asked}, but {accelerator.num_processes} were started by the launcher: give the launcher "
            "the number, or leave the launcher out"
        )
    return accelerator


def not_divided(accelerator: Any) -> list[str]:
    """A note for the user when FSDP was asked for where Accelerate does not use it; an empty list otherwise."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if not asked or accelerator.distributed_type.value == "FSDP":
        return []
    return ["FSDP was asked for, which Accelerate uses between GPUs only: here each process holds the whole model"]


def slow_precision(accelerator: Any) -> list[str]:
    """A note for the user when bf16 was asked for and this CPU has no instructions for it; an empty list otherwise."""
    import torch

    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "bf16":
        return []
    asked = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    if not asked or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    return [
        "bf16 on a CPU without AVX-512 is computed in software (a resnet20_cbam2 took nine times as long with it): "
        "give --mixed-precision no"
    ]
