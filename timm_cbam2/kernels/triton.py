"""The switch of the Triton kernel, which does the block's passes on CUDA devices, and what it must show before it may.

On each device and in each precision it first does small passes beside torch's own; where the numbers differ it says so
and leaves the work to torch.
"""

from __future__ import annotations

import importlib.util
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ..models.fused_cbam2 import train_affine
from ..models.passes_cbam2 import Affine, End, Small, TorchPasses, registered, use_passes
from ..models.residual_cbam2 import eval_affine
from .cpu_passes import is_dense

__all__ = ["disable_triton_kernel", "enable_triton_kernel", "serves", "triton_kernel"]

LARGEST = 2**31  # numbers of a sample: places within one are counted in 32 bits
# By precision: what the device must be able to do, and how far the numbers may be from torch's own.
KNOWN = {
    torch.float64: ((7, 0), 1e-11),
    torch.float32: ((7, 0), 1e-5),
    torch.float16: ((7, 0), 4e-3),
    torch.bfloat16: ((8, 0), 3e-2),
}


def enable_triton_kernel() -> None:
    """Let every CBAM2 block run its passes on CUDA devices by the Triton kernel, in this process.

    It is compiled at its first use, within seconds, and compared with torch's own operations there; Triton keeps the
    result in its cache. Triton comes with torch for CUDA. With the environment variable TIMM_CBAM2_TRITON_KERNEL=1 this
    is done on import, for commands too.

    Raises:
        RuntimeError: there is no Triton here, or no CUDA device.
    """
    if not is_there():
        raise RuntimeError("the Triton kernel cannot be used: no Triton here; it comes with the torch built for CUDA")
    if not torch.cuda.is_available():
        raise RuntimeError("the Triton kernel cannot be used: torch sees no CUDA device here")
    use_passes("cuda", _kernel)


def disable_triton_kernel() -> None:
    """Go back to torch's own operations in this process."""
    use_passes("cuda", None)


@contextmanager
def triton_kernel(wanted: bool = True) -> Iterator[None]:
    """With the Triton kernel inside, or without; as it was before afterwards."""
    before = registered("cuda")
    (enable_triton_kernel if wanted else disable_triton_kernel)()
    try:
        yield
    finally:
        use_passes("cuda", before)


def is_there() -> bool:
    """Whether Triton is installed; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def state() -> dict[str, Any]:
    """See `timm_cbam2.kernels.status`."""
    return {"triton_in_use": registered("cuda") is not None, "triton": version("triton") if is_there() else None}


def serves(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel, switched on, would serve features of this dtype there; it is tried."""
    device = torch.device(device)
    if device.type != "cuda" or not is_there() or not torch.cuda.is_available():
        return False
    return _kernel.agrees(torch.empty(0, device=device, dtype=dtype))


class Kernel:
    """What is registered: makes the passes over a tensor, or None for what it does not serve."""

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def __call__(self, x: Tensor, affine: Affine | None, owned: bool) -> Any:
        if not is_dense(x) or x[0].numel() >= LARGEST or not self.agrees(x):
            return None
        from .triton_passes import TritonPasses

        return TritonPasses(x, affine, owned)

    def agrees(self, x: Tensor) -> bool:
        """Whether it gives torch's numbers, in the precision and on the device of x."""
        return self._look(_agrees, x)

    def folds(self, z: Tensor) -> bool:
        """Whether what it makes of a BatchNorm is torch's bit for bit, as a network at the identity must stay."""
        return self.agrees(z) and self._look(_rounds_as_torch, z)

    def _look(self, check: Any, x: Tensor) -> bool:
        """Looking waits for the device: once, and not while a CUDA graph is captured."""
        key = check, x.device, x.dtype
        if key not in self._known:
            if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                self._known[key] = check(x.device, x.dtype)
        return self._known[key]


_kernel = Kernel()


def _draw(seed: int, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _both_formats(x: Tensor) -> list[Tensor]:
    return [x.contiguous(), x.contiguous(memory_format=torch.channels_last)]


def _agrees(device: torch.device, dtype: torch.dtype) -> bool:
    from .triton_passes import TritonPasses

    if dtype not in KNOWN or (device.type == "cuda" and torch.cuda.get_device_capability(device) < KNOWN[dtype][0]):
        return False
    worst = 0.0
    for x in _both_formats(_draw(0, device, dtype, 2, 40, 7, 9)):
        found, true = (_all_passes(passes(x)) for passes in (TritonPasses, TorchPasses))
        for one, other in zip(found, true):
            off = (one - other).double().norm() / other.double().norm()
            worst = max(worst, off.nan_to_num(torch.inf).item())
    if worst > KNOWN[dtype][1]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        warnings.warn(
            f"the Triton kernel is {worst:.1e} off torch's own numbers on {name} in {dtype}, so it is not used there",
            stacklevel=2,
        )
    return worst <= KNOWN[dtype][1]


def _all_passes(passes: Any) -> list[Tensor]:
    """What each of the passes gives, for masks and gradients that are drawn."""
    x = passes.x
    batch, channels, height, width = x.shape
    small = passes.dtype
    ca = _draw(1, x.device, small, batch, channels).sigmoid()
    sa = _draw(2, x.device, small, batch, height, width).sigmoid()
    shortcut, g = (_draw(seed, x.device, x.dtype, *x.shape).contiguous(memory_format=_order(x)) for seed in (3, 4))
    gamma = _draw(5, x.device, x.dtype, channels)
    squeezes, maps = passes.squeeze(), passes.maps(ca)
    out = passes.finish(ca, sa, End(shortcut, gamma, relu=True))
    again = passes.again(_draw(0, x.device, x.dtype, *x.shape).contiguous(memory_format=_order(x)), None)
    g_sa = again.start_backward(g, Small(squeezes, ca, maps, sa), gamma, out)
    g_ca = again.channel_gradient(*_draw(6, x.device, small, 2, batch, height, width))
    g_x = again.input_gradient(*_draw(7, x.device, small, 2, batch, channels))[0]
    return [squeezes, maps, out, g_sa, again.g, g_ca, again.gamma_gradient(), g_x]


def _order(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _rounds_as_torch(device: torch.device, dtype: torch.dtype) -> bool:
    from .triton_passes import TritonPasses

    norm = nn.BatchNorm2d(35, device=device, dtype=torch.promote_types(dtype, torch.float32))
    for seed, tensor in enumerate((norm.weight, norm.bias, norm.running_mean)):
        tensor.copy_(_draw(seed, device, tensor.dtype, 35))
    ones = torch.ones(2, 35, 6, 7, device=device, dtype=norm.weight.dtype)
    for z in _both_formats(_draw(3, device, dtype, 2, 35, 6, 7)):
        evaluated = norm.eval()(z), eval_affine(norm)
        _, mean, invstd = torch.native_batch_norm(z, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        trained = norm.train()(z), train_affine(norm.weight, norm.bias, mean, invstd)
        for expected, affine in (evaluated, trained):
            found = TritonPasses(z, affine).finish(ones[:, :, 0, 0], ones[:, 0], End())
            if not torch.equal(found, expected):
                return False
    return True
