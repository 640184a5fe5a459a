"""What a benchmark runs: a network plain and with each kind of attention, and one inference or training step of it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Callable

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model_in_modules
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ...kernels.cpu import cpu_kernel
from ...kernels.triton import serves, triton_kernel

__all__ = ["DTYPES", "Setup", "VARIANTS", "Variant", "build", "macs", "make_step", "randomise", "variants_of"]

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what autocast runs in, None for no autocast


@dataclass(frozen=True)
class Variant:
    """One way to build and run a network; `attention` is the name of a layer in timm, or "cbam2"."""

    key: str
    label: str
    attention: str | None = None
    reparameterized: bool = False
    compiled: bool = False
    kernel: bool = False  # `enable_cpu_kernel`
    triton: bool = False  # `enable_triton_kernel`

    @property
    def baseline(self) -> str:
        """The key of what it is compared with: plain, compiled too if it is."""
        return "plain_compiled" if self.compiled else "plain"


VARIANTS = {
    variant.key: variant
    for variant in (
        Variant("plain", "plain"),
        Variant("se", "SE (timm)", "se"),
        Variant("eca", "ECA (timm)", "eca"),
        Variant("cbam", "CBAM (timm)", "cbam"),
        Variant("cbam2", "CBAM2", "cbam2"),
        Variant("cbam2_reparameterized", "CBAM2, reparameterized", "cbam2", reparameterized=True),
        Variant("cbam2_kernel", "CBAM2, CPU kernel", "cbam2", kernel=True),
        Variant(
            "cbam2_kernel_reparameterized",
            "CBAM2, CPU kernel, reparameterized",
            "cbam2",
            reparameterized=True,
            kernel=True,
        ),
        Variant("cbam2_triton", "CBAM2, Triton kernel", "cbam2", triton=True),
        Variant("plain_compiled", "plain, compiled", compiled=True),
        Variant("se_compiled", "SE (timm), compiled", "se", compiled=True),
        Variant("cbam2_compiled", "CBAM2, compiled", "cbam2", compiled=True),
    )
}


@dataclass(frozen=True)
class Setup:
    """All that a measurement depends on beside the variant."""

    model: str  # registered, ends in _cbam2
    batch_size: int
    img_size: int
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def twin(self) -> str:
        """The same architecture without attention."""
        return self.model.removesuffix("_cbam2")


def variants_of(setup: Setup, compiled: bool = False, kernel: bool = False) -> list[Variant]:
    """The variants that the model has: only ResNets have a slot for timm's attention layers, and Triton is for GPUs."""
    has_slot = is_model_in_modules(setup.model, ["resnet_cbam2"])
    triton = serves(setup.device, DTYPES[setup.dtype] or torch.float32)
    chosen = [v for v in VARIANTS.values() if has_slot or v.attention in (None, "cbam2")]
    return [v for v in chosen if (compiled or not v.compiled) and (kernel or not v.kernel) and (triton or not v.triton)]


def build(setup: Setup, variant: Variant) -> nn.Module:
    """The network of a variant, channels_last, on the setup's device, with weights that leave nothing at identity."""
    torch.manual_seed(setup.seed)
    if variant.attention == "cbam2":
        network = timm.create_model(setup.model)
    elif variant.attention is None:
        network = timm.create_model(setup.twin)
    else:
        network = timm.create_model(setup.twin, block_args=dict(attn_layer=variant.attention))
    randomise(network)
    if variant.reparameterized:
        network = reparameterize_model(network, inplace=True)
    return network.to(setup.device, memory_format=torch.channels_last)


@torch.no_grad()
def randomise(network: nn.Module) -> None:
    """Redraw, in place, what starts at a special value: timm zeroes the last norm of each branch, and CBAM2 starts at
    the identity, so that a fresh network would multiply zeros by ones."""
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and name.endswith(("weight", "gamma")):  # norms and layer-scale
            parameter.uniform_(0.5, 1.5)
        elif parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=parameter[0].numel() ** -0.5)


def make_step(setup: Setup, variant: Variant, network: nn.Module, training: bool) -> Callable[[], Tensor]:
    """One call of inference, or one forward and backward pass that leaves gradients and no more; gives the logits.

    A compiled variant is compiled by its first call, whole or not at all.
    """
    generator = torch.Generator().manual_seed(setup.seed)
    channels = network.pretrained_cfg["input_size"][0]
    images = torch.randn(setup.batch_size, channels, setup.img_size, setup.img_size, generator=generator)
    labels = torch.randint(network.num_classes, (setup.batch_size,), generator=generator).to(setup.device)
    images = images.to(setup.device, memory_format=torch.channels_last)
    dtype = DTYPES[setup.dtype]
    forward = torch.compile(network, fullgraph=True, dynamic=False) if variant.compiled else network

    def autocast() -> Any:
        return nullcontext() if dtype is None else torch.autocast(setup.device, dtype)

    def inference() -> Tensor:
        network.eval()
        with torch.no_grad(), autocast(), cpu_kernel(variant.kernel), triton_kernel(variant.triton):
            return forward(images)

    def train() -> Tensor:
        network.train()
        network.zero_grad(set_to_none=True)
        with cpu_kernel(variant.kernel), triton_kernel(variant.triton):
            with autocast():
                logits = forward(images)
                loss = F.cross_entropy(logits, labels)
            loss.backward()
        return logits.detach()

    return train if training else inference


def macs(network: nn.Module, img_size: int) -> int:
    """Multiply-accumulates of one image's forward pass: half of what torch's FLOP counter finds.

    It counts convolutions and matrix products only: no pooling, norm, activation, maximum or product with a mask. It
    counts on the meta device, so for the computation as written and not for what a device makes of it.
    """
    channels = network.pretrained_cfg["input_size"][0]
    network = copy.deepcopy(network).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, channels, img_size, img_size, device="meta"))
    return counter.get_total_flops() // 2
