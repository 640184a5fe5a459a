"""Compiled passes of the block: faster ways to compute what `models/` computes in plain torch.

A kernel registers itself with `models/passes_cbam2`, which works without any; it gives the same values to rounding.
Everything may change here but the names that switch them: `enable_cpu_kernel`, `disable_cpu_kernel`,
`enable_triton_kernel` and `disable_triton_kernel`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["compile_now", "status"]


def compile_now() -> Path:
    """Build the CPU kernel for this machine, if it is not there, and leave it off: later uses then start at once.

    Returns:
        The library.

    Raises:
        RuntimeError: it cannot be built here; the message says why.
    """
    from .cpu import build

    return build()


def status() -> dict[str, Any]:
    """How things stand with the kernels on this machine, without building anything.

    Returns:
        Of the CPU kernel, `in_use`: whether it serves this process; `built`: whether later uses start at once;
        `can_build`: whether a C++ compiler and ninja are there; `library`: its place; `compiler`, `ninja`: where they
        are, or None. Of the kernel for GPUs, `triton_in_use`: whether it is switched on in this process, and `triton`:
        the version of Triton, or None.
    """
    from . import cpu, triton

    return {**cpu.state(), **triton.state()}
