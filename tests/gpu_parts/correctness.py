"""Block and networks against float64 on the CPU: each precision and layout, both passes, by ‖found - true‖ / ‖true‖."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import timm
import torch
from randomise import randomise
from reference import reference
from torch import Tensor, nn

import timm_cbam2  # noqa: F401  (registers the models)
from timm_cbam2.kernels.triton import serves, triton_kernel
from timm_cbam2.models.cbam2 import Cbam2, resolve_options

from . import Place

__all__ = ["block", "distance", "kernels", "networks", "use_full_precision"]

OPTIONS: dict[str, dict[str, Any]] = {
    "registered": dict(gate="unit_sigmoid"),
    "first": dict(gate="sigmoid", fusion="sum", learnable_temperature=False, mlp_bias=True),
    "moments": dict(router_pool="moments", fusion="static", gate="hard_sigmoid", kernel_sizes=(3, 7), dilated=None),
    "center": dict(center=True, coords=False, gate="unit_sigmoid"),
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Of the output, and of the gradients, where a maximum that rounds to another place moves a gradient.
# Of a whole network: less than this is no fault, however good the plain network is.
FLOORS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
BOUNDS = {"fp64": (1e-9, 1e-7), "fp32": (1e-4, 1e-3), "bf16": (3e-2, 0.2), "fp16": (5e-3, 0.1)}


def kernels(place: Place) -> tuple[bool, ...]:
    """Whether blocks run by Triton, in turn."""
    return (False, True) if place.cuda else (False,)


def use_full_precision() -> None:
    """fp32 means fp32: TF32 has ten bits."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def distance(found: Tensor, true: Tensor) -> float:
    """‖found - true‖ / ‖true‖ in float64; NaN where `found` has one."""
    found, true = found.detach().double().cpu(), true.detach().double().cpu()
    return ((found - true).norm() / true.norm().clamp(min=1e-300)).item()


def _passes(function: Any, x: Tensor, parameters: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the gradients of (output * weight).sum() by x and by the parameters, these as one vector."""
    x = x.detach().requires_grad_()
    out = function(x)
    loss = (out.float() * weight if out.dtype != torch.float64 else out * weight).sum()
    gradients = torch.autograd.grad(loss, [x, *parameters])
    return out, gradients[0], torch.cat([g.detach().double().cpu().flatten() for g in gradients[1:]])


def block(place: Place) -> None:
    use_full_precision()
    shapes = [(2, 16, 5, 7), (3, 8, 1, 1)] if place.quick else [(4, 64, 56, 56), (8, 256, 14, 14), (3, 24, 7, 9)]
    names = list(OPTIONS)[:2] if place.quick else list(OPTIONS)
    for name in names:
        for shape in shapes:
            torch.manual_seed(0)
            layer = randomise(Cbam2(shape[1], **OPTIONS[name]))
            x, weight = torch.randn(shape), torch.randn(shape)
            for dtype in DTYPES:
                for layout, triton in itertools.product(LAYOUTS, kernels(place)):
                    with triton_kernel(triton):
                        _one_block(place, name, layer, x, weight, dtype, layout, triton)
    if place.cuda:
        for name, dtype in DTYPES.items():
            place.say(what="the Triton kernel agrees with torch", dtype=name, ok=serves(place.device, dtype))


def _one_block(
    place: Place, name: str, layer: nn.Module, x: Tensor, weight: Tensor, dtype: str, layout: str, triton: bool
) -> None:
    """The layer in one precision and layout, against the formulas in float64 with the same rounded numbers."""
    rounded = copy.deepcopy(layer).to(DTYPES[dtype])
    x = x.to(DTYPES[dtype])
    state = {key: value.double().requires_grad_() for key, value in rounded.state_dict().items()}
    trained = [state[key] for key, _ in layer.named_parameters()]
    options = resolve_options(OPTIONS[name], saved=True)  # the layer alone
    true = _passes(lambda x: reference(state, options, x)[0], x.double(), trained, weight.double())
    there = rounded.to(place.device)
    put = x.to(place.device).contiguous(memory_format=LAYOUTS[layout])
    double = dtype == "fp64"
    weight = weight.to(place.device, torch.float64 if double else torch.float32)
    found = _passes(there, put, list(there.parameters()), weight)
    kept = found[0].is_contiguous(memory_format=LAYOUTS[layout])
    row = dict(options=name, shape=list(x.shape), dtype=dtype, layout=layout, keeps_layout=kept, triton=triton)
    bounds = (BOUNDS[dtype][0], *BOUNDS[dtype][1:] * 2)
    for what, one, other, bound in zip(("output", "gradient of x", "gradient of weights"), found, true, bounds):
        place.check(distance(one, other), bound, what=what, **row)


def networks(place: Place) -> None:
    use_full_precision()
    names = ["test_resnet", "test_convnext"] if place.quick else ["resnet50", "convnext_tiny", "resnet20"]
    for name in names:
        size = 32 if place.quick or name == "resnet20" else 160
        for twin in (True, False):  # the plain network first: what it loses in a precision is no fault of the block
            torch.manual_seed(0)
            network = randomise(timm.create_model(name if twin else f"{name}_cbam2", num_classes=10))
            x, weight = torch.randn(16, 3, size, size), torch.randn(16, 10)  # norms over few magnify
            true = _passes_of(copy.deepcopy(network).double(), x.double(), weight.double(), None)
            if twin:
                plain: dict[tuple, float] = {}
            for dtype in ("fp32", "bf16", "fp16"):
                for layout, triton in itertools.product(LAYOUTS, (False,) if twin else kernels(place)):
                    there = copy.deepcopy(network).to(place.device, memory_format=LAYOUTS[layout])
                    put = x.to(place.device).contiguous(memory_format=LAYOUTS[layout])
                    with triton_kernel(triton):
                        found = _passes_of(there, put, weight.to(place.device), dtype)
                    for what, one, other in zip(("logits", "gradient"), found, true):
                        error, key = distance(one, other), (dtype, layout, what)
                        row = dict(model=name, attention="none" if twin else "cbam2", dtype=dtype, layout=layout)
                        if twin:
                            plain[key] = error
                            place.say(**row, what=what, error=error)
                        else:
                            bound = max(4 * plain[key], FLOORS[dtype])
                            place.check(error, bound, **row, what=what, plain=plain[key], triton=triton)


def _passes_of(network: nn.Module, x: Tensor, weight: Tensor, dtype: str | None) -> tuple[Tensor, Tensor]:
    """Logits in training mode, and the gradient of all parameters as one vector; under autocast for half precision."""
    network.train()
    half = dtype in ("bf16", "fp16")
    with torch.autocast(x.device.type, DTYPES[dtype] if half else torch.bfloat16, enabled=half):
        logits = network(x)
    gradients = torch.autograd.grad((logits.to(weight.dtype) * weight).sum(), list(network.parameters()))
    return logits, torch.cat([g.detach().double().cpu().flatten() for g in gradients])
