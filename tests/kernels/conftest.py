"""The compiled CPU kernel, built once, and what of it was called."""

import shutil

import pytest
import torch

from timm_cbam2 import disable_cpu_kernel, enable_cpu_kernel
from timm_cbam2.kernels.cpu_block import KernelBlock
from timm_cbam2.kernels.cpu_passes import KernelPasses


@pytest.fixture(scope="module")
def built():
    if not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("building the kernel needs a C++ compiler and ninja")
    enable_cpu_kernel()
    disable_cpu_kernel()


@pytest.fixture
def kernel(built, monkeypatch):
    """The kernel serves the test, and its calls each way are counted: whole blocks, and passes beside torch's
    networks."""
    enable_cpu_kernel()
    calls = []
    for kind, direction, name in (
        (KernelBlock, "forward", "forward"),
        (KernelBlock, "backward", "backward"),
        (KernelBlock, "inference", "infer"),
        (KernelPasses, "forward", "finish"),
        (KernelPasses, "backward", "start_backward"),
    ):
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, f=original, n=direction: calls.append(n) or f(*args))
    yield calls
    disable_cpu_kernel()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
