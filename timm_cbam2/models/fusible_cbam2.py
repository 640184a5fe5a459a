"""Which calls of a CBAM2 block the fused paths serve: those that compute nothing that only somebody else knows of."""

import functools
import weakref
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized

from .decisions_cbam2 import DecisionNorm
from .parts_cbam2 import has_hooks

__all__ = ["Named", "may_fuse", "named_weights"]

Named = Tuple[Tuple[str, ...], Tuple[torch.Tensor, ...], int]


def may_fuse(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether `fused_cbam2` serves this call of a block that is as it was made (see `named_weights`); what it cannot
    serve takes the plain path, which autograd knows whole."""
    return (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.numel() > 0
        and not block.is_plain
        and (block.spatial.learned is None or not is_parametrized(block.spatial.learned.conv))
        and torch._C._functorch.peek_interpreter_stack() is None  # vmap, grad, jvp
        and not _has_any_global_hook()
        and forward_ad._current_level < 0
    )


def named_weights(block: nn.Module) -> Optional[Named]:
    """Names and parameters of a block's channel part, then of its spatial part, and how many are the first's; None
    unless the block is as it was made."""
    known = _known.get(block)
    parameters = None if known is None else known.parameters(block)
    if known is None or parameters is None:
        if not _is_as_made(list(block.modules())):
            return None
        known = _known[block] = _Structure(block)
        parameters = [p for part in (block.channel, block.spatial) for p in part.parameters()]
    return known.names, tuple(parameters), known.count


class _Structure:
    """A block that was found to be as it was made: looking whether it still is takes a third of the time of finding
    out, which every call would need. Holds nothing that could hold the block."""

    def __init__(self, block: nn.Module) -> None:
        channel = [name for name, _ in block.channel.named_parameters()]
        self.names = (*channel, *(name for name, _ in block.spatial.named_parameters()))
        self.count = len(channel)
        self.top = list(map(id, block._modules.values()))
        self.inner = [
            (weakref.ref(m), type(m), list(map(id, m._modules.values())), list(m._parameters))
            for m in (*block.channel.modules(), *block.spatial.modules())
        ]
        self.ids = [id(p) for part in (block.channel, block.spatial) for p in part.parameters()]

    def parameters(self, block: nn.Module) -> Optional[List[torch.Tensor]]:
        """Those of today, if nothing else has changed."""
        if list(map(id, block._modules.values())) != self.top or block._parameters:
            return None
        found: List[torch.Tensor] = []
        for known, kind, children, keys in self.inner:
            module = known()
            if type(module) is not kind:  # also where it is gone, and another may have its id
                return None
            own = module.__dict__
            weights = own["_parameters"]
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or list(map(id, own["_modules"].values())) != children
                or list(weights) != keys
                or own["_buffers"].get("running_mean", own) is None
            ):
                return None
            for p in weights.values():
                if p is not None:
                    if p._backward_hooks:
                        return None
                    found.append(p)
        return found if list(map(id, found)) == self.ids else None


_known: "weakref.WeakKeyDictionary[nn.Module, _Structure]" = weakref.WeakKeyDictionary()


def _is_as_made(modules: List[nn.Module]) -> bool:
    """Whether a block, the first of these, is of its own kinds of layers, none shared, and nothing watches them."""
    parameters = [id(p) for module in modules for p in module._parameters.values() if p is not None]
    children = [child for module in modules for child in module._modules.values() if child is not None]
    return (
        len(set(parameters)) == len(parameters)
        and len(children) == len(modules) - 1
        and all(_is_bare(module, module is modules[0]) for module in modules)
    )


@functools.lru_cache(256)
def _is_ours(home: str) -> bool:
    """By the module that its class is from: a layer of somebody else's, such as an adapter, computes what only it
    knows."""
    return home.startswith(("torch.nn.", __name__.rpartition(".")[0] + "."))


def _is_bare(module: nn.Module, is_block: bool) -> bool:
    """Whether nothing watches `module` or its weights, which are its own."""
    if not is_block and (has_hooks(module) or not _is_ours(type(module).__module__)):
        return False  # the parts are never called as such
    if any(p._backward_hooks for p in module._parameters.values() if p is not None):
        return False  # the inner graphs would call them once more
    if isinstance(module, _BatchNorm) and (type(module) is not DecisionNorm or module.running_mean is None):
        return False  # SyncBatchNorm looks at other processes' batches too
    # In replicas of DataParallel and under FSDP1 weights are plain attributes, whose gradient would be lost.
    return not isinstance(module, (nn.Conv2d, _BatchNorm)) or "weight" in module._parameters or is_parametrized(module)
