"""A compiled CPU kernel for the block's passes over memory, built on this machine by torch's own extension builder.

Torch has no operation that takes the average and the maximum of a tensor in one reading, or multiplies by two masks at
once; the kernel does, for float32, float64, bfloat16 and float16 and both memory formats. It changes no formula.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from .passes_cbam2 import use_kernel

__all__ = ["disable_cpu_kernel", "enable_cpu_kernel"]

SOURCE = Path(__file__).parent / "csrc" / "cbam2_cpu.cpp"
FLAGS = {"AVX2": ["-mavx2", "-mfma", "-mf16c"], "AVX512": ["-mavx2", "-mfma", "-mf16c"]}


def enable_cpu_kernel() -> None:
    """Let every CBAM2 block run its passes on CPUs by the compiled kernel, in this process.

    The first call on a machine builds it, which takes half a minute and needs a C++ compiler and `ninja` (the extra `cpu`);
    torch keeps the result (in TORCH_EXTENSIONS_DIR, where set) for later processes. Setting the environment variable
    TIMM_CBAM2_CPU_KERNEL=1 calls this on import, so that commands use it too.

    Raises:
        RuntimeError: it cannot be built here; the message says why.
    """
    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)  # importing it warns where CUDA has no device, which does not matter here
    from torch.utils import cpp_extension

    log.setLevel(level)
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp-simd", *FLAGS.get(capability, [])]
    try:
        # The name keeps processors of different kinds apart that share a home folder.
        name = f"timm_cbam2_cpu_{capability.lower()}"
        cpp_extension.load(name, [str(SOURCE)], extra_cflags=flags, is_python_module=False)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"the CPU kernel cannot be built: {reason}. It needs a C++ compiler and `pip install timm_cbam2[cpu]`; "
            "without it everything works as before, only slower."
        ) from error
    use_kernel(torch.ops.timm_cbam2_cpu)


def disable_cpu_kernel() -> None:
    """Go back to torch's own operations in this process."""
    use_kernel(None)
