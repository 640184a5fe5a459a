"""What goes wrong on GPUs: overflow in fp16, other numbers each time, waiting for the device, graphs, compiling."""

from __future__ import annotations

import itertools
import os
from typing import Any, Callable

import timm
import torch
from randomise import randomise
from torch import Tensor, nn

import timm_cbam2  # noqa: F401  (registers the models)
from timm_cbam2.kernels.triton import triton_kernel
from timm_cbam2.models.cbam2 import Cbam2

from . import Place
from .correctness import distance, kernels, use_full_precision

__all__ = ["compiled", "guards"]

MODES = ("default", "max-autotune-no-cudagraphs")


def guards(place: Place) -> None:
    use_full_precision()
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which deterministic matrix products ask for
    for triton in kernels(place):
        with triton_kernel(triton):
            _large_values(place, triton)
    for name in _names(place):
        network, x, labels = _network(place, name)
        checks = (_determinism, *((_no_waiting, _graphs) if place.cuda else ()))
        for check, triton in itertools.product(checks, kernels(place)):
            with place.going_on(what=check.__name__, model=name, triton=triton), triton_kernel(triton):
                check(place, f"{name}, Triton" if triton else name, network, x, labels)
    if not place.cuda:
        place.say(what="no waiting for the device, CUDA graphs", skipped="not on a CPU")


def _names(place: Place) -> list[str]:
    return ["test_resnet_cbam2"] if place.quick else ["resnet50_cbam2", "convnext_tiny_cbam2"]


def _network(place: Place, name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = randomise(timm.create_model(name, num_classes=10)).to(place.device, memory_format=torch.channels_last)
    size = 32 if place.quick else 128
    x = torch.randn(4, 3, size, size).to(place.device).contiguous(memory_format=torch.channels_last)
    return network.train(), x, torch.arange(4, device=place.device)


def _step(network: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Forward and backward; leaves gradients, gives the loss."""
    loss = nn.functional.cross_entropy(network(x).float(), labels)
    loss.backward()
    return loss.detach()


def _gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.detach().flatten() for p in network.parameters()])


def _large_values(place: Place, triton: bool) -> None:
    """fp16 reaches 65,504: sums of 1e4 over positions do not fit, whatever fits in the end must."""
    torch.manual_seed(0)
    layer = randomise(Cbam2(64, gate="unit_sigmoid")).to(place.device, torch.float16)
    size = 20 if place.quick else 56
    x = (torch.randn(4, 64, size, size) * 1e4).clamp(-1e4, 1e4).to(place.device, torch.float16).requires_grad_()
    weight = (torch.randn(x.shape) * 1e-3).to(x)
    found = [layer(x)]
    found += torch.autograd.grad((found[0] * weight).float().sum(), [x, *layer.parameters()])
    exact, layer = x.detach().double().requires_grad_(), layer.double()
    true = [layer(exact)]
    true += torch.autograd.grad((true[0] * weight.double()).sum(), [exact, *layer.parameters()])
    for what, one, other in (("output", found[:1], true[:1]), ("gradients", found[1:], true[1:])):
        lost = sum(int((~f.isfinite() & (t.abs() < 6e4)).sum()) for f, t in zip(one, other))
        place.check(float(lost), 0, what=f"fp16 at 1e4: {what} that fit and are not finite", triton=triton)
    place.check(distance(found[0], true[0]), 1e-2, what="fp16 at 1e4: output", triton=triton)


def _determinism(place: Place, name: str, network: nn.Module, x: Tensor, labels: Tensor) -> None:
    torch.use_deterministic_algorithms(True)
    found = []
    try:
        for _ in range(3):
            network.zero_grad(set_to_none=True)
            loss = _step(network, x, labels)
            found.append(torch.cat([loss.flatten(), _gradient(network)]))
    finally:
        torch.use_deterministic_algorithms(False)
    different = max(int((other != found[0]).sum()) for other in found[1:])
    place.check(float(different), 0, what="deterministic: numbers that differ between three passes", model=name)


def _no_waiting(place: Place, name: str, network: nn.Module, x: Tensor, labels: Tensor) -> None:
    """PyTorch raises at whatever waits for the device."""
    network.zero_grad(set_to_none=True)
    _step(network, x, labels)  # what is set up once may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(network, x, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    place.say(what="neither pass waits for the device", model=name, ok=True)


def _graphs(place: Place, name: str, network: nn.Module, x: Tensor, labels: Tensor) -> None:
    """A training step captured once and replayed on another batch gives what it gives without."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    still = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            network.zero_grad(set_to_none=True)
            _step(network, still, labels)
    torch.cuda.current_stream().wait_stream(side)
    network.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = _step(network, still, labels)
    other = torch.randn_like(x)
    still.copy_(other)
    network.load_state_dict(state)
    graph.replay()
    found = torch.cat([loss.flatten(), _gradient(network)]).clone()
    network.load_state_dict(state)
    network.zero_grad(set_to_none=True)
    true = torch.cat([_step(network, other, labels).flatten(), _gradient(network)])
    place.check(distance(found, true), 1e-4, what="CUDA graph of a training step", model=name)


def compiled(place: Place) -> None:
    """Both passes of compiled networks against the same network as it is."""
    use_full_precision()
    modes = MODES if place.cuda else MODES[:1]
    for name in _names(place):
        network, x, labels = _network(place, name)
        network.zero_grad(set_to_none=True)
        true = torch.cat([_step(network, x, labels).flatten(), _gradient(network)])
        for mode in modes:
            torch._dynamo.reset()
            arguments: dict[str, Any] = dict(fullgraph=True, dynamic=False)
            # A rehearsal traces and compiles nothing: that is what other tests are for.
            backend = {"backend": "eager"} if place.quick else {"mode": mode}
            network.zero_grad(set_to_none=True)
            with place.going_on(what="compiled", model=name, **backend):
                fast: Callable = torch.compile(network, **arguments, **backend)
                found = torch.cat([_step(fast, x, labels).flatten(), _gradient(network)])
                place.check(distance(found, true), 1e-3, what="compiled", model=name, **backend)
