"""Residual blocks that hand the end of their branch to the attention: norm, masks, layer-scale, shortcut, activation.

    out = act(shortcut + drop_path(γ·attention(norm(z))))

Each of these is a pass over the block's largest tensor, and the attention's own last pass is one more; together they
are one. Whatever watches a step in between (hooks, tracing, exports, other dtypes) gets the steps one by one, as timm
has them.
"""

import functools
from typing import Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck

from .compiled_cbam2 import is_compiled, normalised, stored
from .fused_cbam2 import fused, fused_without_grad, needs_gradient, train_affine
from .fusible_cbam2 import may_fuse, named_weights
from .parts_cbam2 import compute_dtype, has_hooks, is_traced
from .passes_cbam2 import Affine, End, registered

__all__ = ["BasicBlockCbam2", "BottleneckCbam2", "branch_end", "owns_end"]


def owns_end(attn: Optional[nn.Module], x: torch.Tensor) -> bool:
    """Whether `branch_end` serves a residual block with this attention and input."""
    if torch.compiler.is_dynamo_compiling():
        return attn is not None and is_compiled()
    return (
        attn is not None
        and not is_traced(x)
        and hasattr(attn, "is_plain")
        and "forward" not in attn.__dict__
        and not has_hooks(attn)
        and may_fuse(attn, x)
    )


def _is_bare(module: Optional[nn.Module], *kinds: type) -> bool:
    return type(module) in kinds and (module is None or not has_hooks(module))


@functools.lru_cache(32)
def _constants(
    channels: int, dtype: torch.dtype, device: torch.device, inference: bool
) -> Tuple[torch.Tensor, torch.Tensor]:
    zeros = torch.zeros(channels, dtype=dtype, device=device)
    return zeros, torch.ones(1, channels, 1, 1, dtype=dtype, device=device)


def eval_affine(norm: nn.Module) -> Affine:
    """What a BatchNorm in evaluation multiplies by, asked of torch's own with ones, and adds, rounded as it does."""
    weight, own = norm._parameters["weight"], norm._buffers
    zeros, ones = _constants(len(weight), weight.dtype, weight.device, torch.is_inference_mode_enabled())
    scale = torch.batch_norm(ones, weight, None, zeros, own["running_var"], False, 0.0, norm.eps, False).view(-1)
    return Affine(scale, torch.addcmul(norm._parameters["bias"], own["running_mean"], scale, value=-1))


@functools.lru_cache(8)
@torch.no_grad()
def _rounds_as_addcmul(dtype: torch.dtype) -> bool:
    """Whether torch's BatchNorm is, bit for bit, one multiplication and addition on this machine, as in `addcmul`."""
    generator = torch.Generator().manual_seed(0)  # on the CPU, whatever new tensors are made on
    norm = nn.BatchNorm2d(35, device="cpu", dtype=torch.promote_types(dtype, torch.float32))
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.copy_(torch.randn(35, generator=generator, device="cpu"))
    norm.running_var.copy_(torch.rand(35, generator=generator, device="cpu") + 0.5)
    z = torch.randn(3, 35, 5, 7, generator=generator, device="cpu").to(dtype)
    for x in (z, z.to(memory_format=torch.channels_last)):
        trained, mean, invstd = torch.native_batch_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        for expected, affine in (
            (norm.eval()(x), eval_affine(norm)),
            (trained, train_affine(norm.weight, norm.bias, mean, invstd)),
        ):
            scale, shift = (t[:, None, None] for t in affine[:2])
            if not torch.equal(torch.addcmul(shift, x, scale).to(dtype), expected):
                return False
    return True


def _rounds_as_norm(z: torch.Tensor) -> bool:
    """Whether the passes do what BatchNorm does on this device, bit for bit."""
    kernel = registered(z.device.type)
    if z.device.type == "cpu":
        # In half precision torch's own passes are slower than BatchNorm itself.
        return (z.dtype == compute_dtype(z) or kernel is not None) and _rounds_as_addcmul(z.dtype)
    folds = getattr(kernel, "folds", None)
    return folds is not None and folds(z)


def _folds(norm: nn.Module, z: torch.Tensor) -> bool:
    """Whether the fused passes may do what this BatchNorm does."""
    own, kept = norm._parameters, norm._buffers
    return (
        own.get("weight") is not None
        and own.get("bias") is not None
        and not (own["weight"]._backward_hooks or own["bias"]._backward_hooks)
        and kept.get("running_mean") is not None
        and kept.get("running_var") is not None
        and own["weight"].dtype == kept["running_mean"].dtype == compute_dtype(z)
        and _rounds_as_norm(z)
    )


def _measures(norm: nn.Module) -> bool:
    """Whether a BatchNorm measures its batch, and keeps what it found in the usual way."""
    return norm.training and norm.track_running_stats and norm.momentum is not None


def _drops(drop_path: Optional[nn.Module]) -> bool:
    return drop_path is not None and type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob > 0.0


def branch_end(
    attn: nn.Module,
    z: torch.Tensor,
    shortcut: torch.Tensor,
    norm: Optional[nn.Module] = None,
    gamma: Optional[torch.Tensor] = None,
    drop_path: Optional[nn.Module] = None,
    act: Optional[nn.Module] = None,
    fresh: bool = False,
) -> torch.Tensor:
    """act(shortcut + drop_path(gamma·attn(norm(z)))), as far as possible in the passes of the attention.

    Args:
        attn: A `Cbam2` that `owns_end`.
        z: (B, C, H, W).
        shortcut: (B, C, H, W).
        norm: None for none, as for gamma (C,), drop_path and act.
        fresh: Nobody else holds z, so that it may be overwritten where nothing needs a gradient.
    """
    if is_compiled():
        return _compiled_end(attn, z, shortcut, norm, gamma, drop_path, act)
    named = named_weights(attn)
    if named is None:  # somebody else's part in it
        return _steps(attn.forward(z if norm is None else norm(z)), shortcut, gamma, drop_path, act)
    folds = _is_bare(norm, nn.BatchNorm2d) and _folds(norm, z)
    if norm is not None and not folds:
        z, fresh, norm = norm(z), _is_bare(norm, nn.BatchNorm2d), None
    trains = needs_gradient(attn, z, shortcut, gamma, *(() if norm is None else (norm.weight, norm.bias)))
    fits = z.dtype == shortcut.dtype and z.shape == shortcut.shape and type(shortcut) is torch.Tensor
    fits = fits and (gamma is None or gamma.dtype == z.dtype)
    if not (fits and _is_bare(drop_path, DropPath, nn.Identity, type(None)) and (trains or not _drops(drop_path))):
        return _steps(attn.forward(z if norm is None else norm(z)), shortcut, gamma, drop_path, act)
    relu = _is_bare(act, nn.ReLU)
    if trains:
        if norm is not None and not (_measures(norm) and z.numel() > z.shape[1]):
            z, norm = norm(z), None
        drop = (
            drop_path(z.new_ones(len(z), 1, 1, 1)).view(-1) if drop_path is not None and _drops(drop_path) else None
        )  # drawn as timm does
        out = fused(attn, z, named, End(shortcut, gamma, relu, drop is not None), drop, norm)
    else:
        affine = None
        if norm is not None and fresh and not norm.training:
            affine = eval_affine(norm)
        elif norm is not None:
            z, fresh = norm(z), True
        out = fused_without_grad(attn, z, named, End(shortcut, gamma, relu), affine, fresh)
    return out if relu or act is None else act(out)


def _compiled_end(
    attn: nn.Module,
    z: torch.Tensor,
    shortcut: torch.Tensor,
    norm: Optional[nn.Module],
    gamma: Optional[torch.Tensor],
    drop_path: Optional[nn.Module],
    act: Optional[nn.Module],
) -> torch.Tensor:
    """`branch_end` for torch.compile."""
    if hasattr(attn, "compiles") and attn.compiles() and "forward" not in attn.__dict__ and not has_hooks(attn):
        source = normalised(norm, z)
        fits = gamma is not None and gamma.dtype == source.z.dtype
        branch = attn.of_source(source, gamma if fits else None)
        gamma = None if fits else gamma
    else:
        branch = attn(z if norm is None else norm(z))
    out = stored(_steps(branch, shortcut, gamma, drop_path, None))
    return out if act is None else act(out)


def _steps(
    x: torch.Tensor,
    shortcut: torch.Tensor,
    gamma: Optional[torch.Tensor],
    drop_path: Optional[nn.Module],
    act: Optional[nn.Module],
) -> torch.Tensor:
    """What follows the attention, one by one."""
    x = x if gamma is None else x.mul(gamma.reshape(1, -1, 1, 1))
    x = (x if drop_path is None else drop_path(x)) + shortcut
    return x if act is None else act(x)


class BasicBlockCbam2(BasicBlock):
    """timm's block with CBAM2 in its attention slot; it is made of one, since timm's ResNet builds its own."""

    as_timm = BasicBlock.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's output."""
        if not torch.jit.is_scripting():
            if not owns_end(self.se, x):
                return self.as_timm(x)
        z = self.act1(self.drop_block(self.bn1(self.conv1(x))))
        z = self.conv2(self.aa(z))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        if torch.jit.is_scripting():
            z = self.bn2(z)
            if self.se is not None:
                z = self.se(z)
            if self.drop_path is not None:
                z = self.drop_path(z)
            return self.act2(z + shortcut)
        fresh = _is_bare(self.conv2, nn.Conv2d)
        return branch_end(self.se, z, shortcut, self.bn2, None, self.drop_path, self.act2, fresh)


class BottleneckCbam2(Bottleneck):
    """As `BasicBlockCbam2`, of timm's bottleneck."""

    as_timm = Bottleneck.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's output."""
        if not torch.jit.is_scripting():
            if not owns_end(self.se, x):
                return self.as_timm(x)
        z = self.act1(self.bn1(self.conv1(x)))
        z = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(z)))))
        z = self.conv3(z)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        if torch.jit.is_scripting():
            z = self.bn3(z)
            if self.se is not None:
                z = self.se(z)
            if self.drop_path is not None:
                z = self.drop_path(z)
            return self.act3(z + shortcut)
        fresh = _is_bare(self.conv3, nn.Conv2d)
        return branch_end(self.se, z, shortcut, self.bn3, None, self.drop_path, self.act3, fresh)
