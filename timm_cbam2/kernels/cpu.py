"""A compiled CPU kernel for the block's passes over memory, built on this machine by torch's own extension builder.

Torch has no operation that takes the average and the maximum of a tensor in one reading, or multiplies by two masks at
once; the kernel does, for float32, float64, bfloat16 and float16 and both memory formats. It changes no formula.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import nn

from ..models.passes_cbam2 import Affine, End, registered, use_passes
from ..models.residual_cbam2 import eval_affine
from .cpu_passes import KernelPasses, is_dense

__all__ = ["cpu_kernel", "disable_cpu_kernel", "enable_cpu_kernel"]

SOURCES = Path(__file__).parent / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Whole vectors of 512 bits, which compilers avoid by themselves: a fifth faster for few channels, a seventh in bf16.
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
FLAGS = {"AVX2": AVX2, "AVX512": AVX512}  # by torch's name for what the processor can do


def enable_cpu_kernel() -> None:
    """Let every CBAM2 block run its passes on CPUs by the compiled kernel, in this process.

    The first call on a machine builds it, which takes half a minute and needs a C++ compiler and ninja (the extra
    `cpu`). The result is kept in TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions, for later processes.
    With the environment variable TIMM_CBAM2_CPU_KERNEL=1 this is done on import, for commands too.

    Raises:
        RuntimeError: it cannot be built here; the message says why.
    """
    if not hasattr(torch.ops.timm_cbam2_cpu, "squeeze"):
        build()
    use_passes("cpu", _Passes())


def _library() -> tuple[Path, list[str]]:
    """Where the library for this machine, torch and source lies, and the compiler's options."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += FLAGS.get(capability, [])
    texts = [file.read_text(encoding="utf-8") for file in sorted(SOURCES.iterdir())]
    made_of = [*texts, *flags, torch.__version__, capability]
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    return root / f"timm_cbam2_cpu-{key}.so", flags


def build() -> Path:
    """Load the library, built first where it is not there yet; see `timm_cbam2.kernels.compile_now`."""
    library, flags = _library()
    if not hasattr(torch.ops.timm_cbam2_cpu, "squeeze") and not _loads(library):
        _build(library, flags)
    return library


def state() -> dict[str, Any]:
    """See `timm_cbam2.kernels.status`."""
    library = _library()[0]
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    ninja = _ninja()
    return {
        "in_use": registered("cpu") is not None,
        "built": library.is_file(),
        "can_build": compiler is not None and ninja is not None,
        "library": library,
        "compiler": compiler,
        "ninja": ninja,
    }


def _ninja() -> str | None:
    """Also beside the interpreter: pip puts it there, and an environment need not be activated to be used."""
    return shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))


class _Passes:
    """What `use_passes` is given."""

    def __call__(self, x: torch.Tensor, affine: Affine | None, owned: bool) -> KernelPasses | None:
        if not (is_dense(x) if affine is None else self.normalises(x)):
            return None
        return KernelPasses(x, affine, torch.ops.timm_cbam2_cpu, owned)

    def normalises(self, x: torch.Tensor) -> bool:
        return is_dense(x) and _rounds_as_torch(x.dtype)


@functools.lru_cache(8)
@torch.no_grad()
def _rounds_as_torch(dtype: torch.dtype) -> bool:
    """Whether the kernel's BatchNorm is that of torch bit for bit, as a network at the identity must stay."""
    generator = torch.Generator().manual_seed(0)  # on the CPU, whatever new tensors are made on
    norm = nn.BatchNorm2d(35, device="cpu", dtype=torch.promote_types(dtype, torch.float32)).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.copy_(torch.randn(35, generator=generator, device="cpu"))
    z = torch.randn(2, 35, 6, 7, generator=generator, device="cpu").to(dtype)
    passes = KernelPasses(z, eval_affine(norm), torch.ops.timm_cbam2_cpu)
    ones = torch.ones(2, 42, dtype=norm.weight.dtype, device="cpu")
    return torch.equal(passes.finish(ones[:, :35], ones.view(2, 6, 7), End()), norm(z))


def disable_cpu_kernel() -> None:
    """Go back to torch's own operations in this process."""
    use_passes("cpu", None)


@contextmanager
def cpu_kernel(wanted: bool = True) -> Iterator[None]:
    """With the compiled kernel inside, or without; as it was before afterwards."""
    before = registered("cpu") is not None
    (enable_cpu_kernel if wanted else disable_cpu_kernel)()
    try:
        yield
    finally:
        (enable_cpu_kernel if before else disable_cpu_kernel)()


def _loads(library: Path) -> bool:
    """Load it, if it is there and is one of this machine's: a home folder may be shared with others."""
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _build(library: Path, flags: list[str]) -> None:
    """Build and load it. It appears under its name when it is whole, so that a killed build leaves nothing to wait
    for, as torch's own lock would."""
    log = logging.getLogger("torch.utils.cpp_extension")
    # It warns where CUDA has no device, which does not matter here; where there is no compiler, torch 2.8 fails at it.
    log.disabled = True
    from torch.utils import cpp_extension

    ninja, path = _ninja(), os.environ.get("PATH", os.defpath)
    try:
        os.environ["PATH"] = path if ninja is None else f"{path}{os.pathsep}{Path(ninja).parent}"  # torch looks there
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="timm_cbam2_cpu-") as folder:
            cpp_extension.load(
                "cbam2_cpu",
                [str(SOURCES / "cbam2_cpu.cpp")],
                extra_cflags=flags,
                build_directory=folder,
                is_python_module=False,
            )
            os.replace(Path(folder) / "cbam2_cpu.so", library)
    except (RuntimeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(
            f"the CPU kernel cannot be built: {reason}. It needs a C++ compiler and `pip install timm_cbam2[cpu]`; "
            "without it everything works, only slower."
        ) from error
    finally:
        log.disabled, os.environ["PATH"] = False, path
