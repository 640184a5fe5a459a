"""One forward pass on a tiny input, which leaves no trace: what shape the modules of a network give."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator, Sequence

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..data.loading import seeded

__all__ = ["Probe", "like", "plain"]

SIDES = (64, 224)  # of square inputs, tried in turn after the size that the model says it takes


def like(module: nn.Module) -> dict[str, Any]:
    """Device and dtype for new layers beside those of `module`."""
    tensors = (*module.parameters(), *module.buffers())
    near = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    return {} if near is None else {"device": near.device, "dtype": near.dtype}


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradients; training mode, buffers and random generators are afterwards as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    device = like(model).get("device")
    devices = [device] if device is not None and device.type == "cuda" else []
    try:
        model.eval()
        with seeded(0), torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


class Probe:
    """Runs a network on an input that it takes.

    Args:
        model: any network of images.
        example: an input that it takes, a tuple of them for several, or None to look for one.
    """

    def __init__(self, model: nn.Module, example: Any = None):
        self.model = model
        self.inputs = [example if isinstance(example, tuple) else (example,)] if example is not None else []
        self.searching = example is None

    def shapes(self, modules: dict[str, nn.Module]) -> dict[str, list[Any]]:
        """What each of `modules`, by name, gave in one pass: shapes of tensors, or the name of what is no tensor.

        Raises:
            ValueError: the network takes none of the inputs that were tried.
        """
        found: dict[str, list[Any]] = {name: [] for name in modules}

        def watch(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                found[name].append(tuple(output.shape) if torch.is_tensor(output) else type(output).__name__)

            return hook

        handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
        try:
            self.outputs()
        finally:
            for handle in handles:
                handle.remove()
        return found

    def outputs(self) -> list[torch.Tensor]:
        """Every tensor that the network answers with.

        Raises:
            ValueError: see `shapes`.
        """
        problems = []
        for inputs in self.inputs if not self.searching else self._candidates():
            try:
                with without_trace(self.model):
                    answer = self.model(*inputs)
            except Exception as error:  # whatever a network of someone's raises on an input that it does not take
                problems.append(f"{_said(inputs)}: {' '.join(str(error).split())[:150] or type(error).__name__}")
                continue
            self.inputs, self.searching = [inputs], False
            return [leaf for leaf in tree_leaves(plain(answer)) if torch.is_tensor(leaf)]
        raise ValueError(
            f"{type(self.model).__name__} ran on no noise ({'; '.join(problems)}); give one that it takes as "
            "example=, or the numbers of channels as channels="
        )

    def _candidates(self) -> Iterator[tuple[Any, ...]]:
        channels, sides = self._declared()
        options = like(self.model) or {"device": "cpu", "dtype": torch.float32}
        for side in sides:
            noise = torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)).to(**options)
            yield (noise,)
            yield ([noise[0]],)  # detection

    def _declared(self) -> tuple[int, Sequence[int]]:
        """Channels and sides of the input, as timm, transformers or the first convolution tell them."""
        model = self.model
        config = getattr(model, "config", None)
        first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        channels = getattr(model, "in_chans", None) or getattr(config, "num_channels", None) or first
        cfg = getattr(model, "pretrained_cfg", None)
        size = cfg["input_size"][-1] if isinstance(cfg, dict) and cfg.get("fixed_input_size") else None
        declared = size or getattr(config, "image_size", None)
        sides = [declared] if isinstance(declared, int) else []
        return channels, [*sides, *SIDES]


def plain(answer: Any) -> Any:
    """transformers' outputs as a tuple: pytrees need not know their classes."""
    return answer.to_tuple() if hasattr(answer, "to_tuple") else answer


def _said(inputs: tuple[Any, ...]) -> str:
    one = inputs[0]
    return f"a list of {tuple(one[0].shape)}" if isinstance(one, list) else f"{tuple(getattr(one, 'shape', ()))}"
