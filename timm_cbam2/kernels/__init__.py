"""Compiled passes of the block: faster ways to compute what `models/` computes in plain torch.

A kernel registers itself with `models/passes_cbam2`, which works without any; it gives the same values to rounding.
Everything may change here but the two names that switch it, `enable_cpu_kernel` and `disable_cpu_kernel`.
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
    """How things stand with the CPU kernel on this machine, without building anything.

    Returns:
        `in_use`: whether it serves this process; `built`: whether later uses start at once; `can_build`: whether a C++
        compiler and ninja are there; `library`: its place; `compiler`, `ninja`: where they are, or None.
    """
    from .cpu import state

    return state()
