"""Compiled, recorded or repeated, the block and its networks compute the same: one graph, no sync, no chance.

Elsewhere: gradient checkpointing (test_fused.py, test_models.py), autocast and determinism of the block alone
(test_fused.py), two processes bit for bit (test_resume.py), `torch.export` and ONNX (test_export.py).
"""

import copy
import shutil

import pytest
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from randomise import randomise
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_cbam2 import Cbam2
from timm_cbam2.models.compiled_cbam2 import Source, maps_of, normalised, squeezes_of

NETWORKS = ["test_resnet_cbam2", "test_convnext_cbam2"]
# The first has no two equal sides: sides that are equal when it compiles are taken to be equal always.
SHAPES = [(2, 64, 96), (3, 128, 64), (5, 96, 96)]


class Block(torch.nn.Module):
    """The block alone, between two things that have parameters, for images of 3 channels."""

    def __init__(self, **options):
        super().__init__()
        self.stem, self.attention = torch.nn.Conv2d(3, 8, 1), Cbam2(8, gate="unit_sigmoid", **options)

    def forward(self, x):
        return self.attention(self.stem(x)).mean((2, 3))


def make(name, **kwargs):
    if name == "test_convnext_cbam2":
        kwargs.setdefault("depths", (1, 1, 1, 1))  # more blocks are more of the same
    model = Block(**kwargs) if name == "block" else timm.create_model(name, **kwargs)
    return randomise(model).to(memory_format=torch.channels_last)


def images(batch, height, width):
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
    return x.to(memory_format=torch.channels_last)


def step(model, x, forward=None):
    """Logits and all gradients of a training step."""
    model.zero_grad()
    out = (model if forward is None else forward)(x)  # a compiled module asks for a length to say whether it is one
    F.cross_entropy(out, torch.arange(len(x)) % out.shape[1]).backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_close(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


# A ConvNeXt that drops no paths is the same graph in both modes.
CASES = [("block", False), ("block", True), ("test_resnet_cbam2", False), ("test_resnet_cbam2", True)]
CASES += [("test_convnext_cbam2", True)]


@pytest.mark.parametrize("name, training", CASES)
def test_one_graph_for_every_batch_and_size(name, training):
    options = {} if name == "block" else dict(cbam2_stages=[0, 3])  # what lies between is more of the same
    model = make(name, **options).train(training)
    eager = copy.deepcopy(model)
    # For the block down to the operators of forward and backward; for networks, where that takes a minute, the graph.
    backend = CompileCounterWithBackend("aot_eager" if name == "block" else "eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for number, shape in enumerate(SHAPES):
        x = images(*shape)
        if training:
            assert_close(step(model, x, compiled), step(eager, x))
        else:
            with torch.no_grad():
                assert_close([compiled(x)], [eager(x)])
        if number == 0:
            first = backend.frame_count
    assert backend.frame_count == first > 0  # no recompilation; and a graph break is an error with fullgraph


def test_only_what_is_marked_dynamic_varies():
    """As a server does that marks the batch alone; everything else is fixed."""
    model = make("block").eval()
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch, side, graphs in ((2, 64, 1), (5, 64, 1), (3, 64, 1), (2, 96, 2)):
        x = images(batch, side, side)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert_close([compiled(x)], [model(x)])
        assert backend.frame_count == graphs


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@torch._inductor.config.patch(compile_threads=1)  # its pool of processes takes longer to start than to compile this
def test_inductor(training):
    """Compiled once, for any batch and size."""
    # Two branches: each kernel of inductor's takes the C++ compiler a second or two.
    block = randomise(Cbam2(8, gate="unit_sigmoid", router_pool="moments", kernel_sizes=(3,)))
    eager = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for shape in ((2, 8, 9, 12), (3, 8, 16, 7)):
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        if not training:
            with torch.no_grad():
                assert_close([compiled(x)], [eager(x)])
            continue
        results = []
        for module, forward in ((block, compiled), (eager, eager)):
            leaf = x.clone().requires_grad_()
            out = forward(leaf)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])])
        assert_close(*results)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("before", ["a norm", "an activation"])
@torch._inductor.config.patch(compile_threads=1)
def test_inductor_finds_maxima_again_in_half_precision(before):
    """It leaves out roundings in one loop and not in the next, where a number is then no longer the maximum."""
    generator = torch.Generator().manual_seed(0)
    z, ca = torch.randn(4, 12, 8, 8, generator=generator), torch.rand(4, 12, 1, 1, generator=generator) + 0.5
    of_squeezes, of_maps = torch.randn(12, generator=generator), torch.randn(8, 8, generator=generator)

    def loss(norm, z):
        source = normalised(norm, z) if before == "a norm" else Source(F.silu(z))
        maps = maps_of(source, ca.to(z.dtype))
        return (squeezes_of(source)[1] * of_squeezes).sum() + (maps[:, 1] * of_maps).sum()

    found = []
    for forward, dtype in ((torch.compile(loss), torch.bfloat16), (loss, torch.float64)):
        given = z.bfloat16().to(dtype).requires_grad_()
        norm = torch.nn.BatchNorm2d(12, dtype=torch.promote_types(dtype, torch.float32))
        found.append(torch.autograd.grad(forward(norm, given), given)[0].double())
    assert (found[0] - found[1]).norm() < 0.2 * found[1].norm(), "it was 0.6 to 1"


def test_gradients_of_each_sample_compiled():
    """By torch.func within torch.compile."""
    model, x = make("block").eval(), images(3, 16, 16)

    def gradient(image):
        return torch.func.grad(lambda one: model(one[None]).square().sum())(image)

    own, expected = torch.compile(torch.vmap(gradient), backend="aot_eager")(x), [gradient(image) for image in x]
    assert_close([own], [torch.stack(expected)])


class NoSync(TorchDispatchMode):
    """Fails on whatever a stream of GPU work, or a CUDA graph of it, could not hold.

    The tensors are on the meta device, whose path through the code is that of a GPU: no values, so nothing can wait for
    one, and no memory.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        data_dependent = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*function.tags}
        if function is torch.ops.aten.index.Tensor and not any(t.dtype == torch.bool for t in tree_leaves(args[1])):
            data_dependent = {}  # it is so for masks only
        assert not data_dependent, f"{function} waits for values of the device"
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == "meta", f"{function} has a tensor on the {tensor.device.type}"
        return out


def on_meta(model, dtype):
    model = model.to("meta").train()
    x = torch.empty(2, 3, 64, 64, device="meta").to(memory_format=torch.channels_last)
    target = torch.empty(2, dtype=torch.long, device="meta")
    for training in (True, False):
        model.train(training)
        with NoSync(), torch.set_grad_enabled(training), torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = model(x)
            if training:
                F.cross_entropy(out.float(), target).backward()
    assert all(p.grad is not None and p.grad.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("merged", [False, True], ids=["branches", "merged"])
@pytest.mark.parametrize("options", [{}, dict(router_pool="moments"), dict(fusion="static"), dict(fusion="sum")])
def test_forward_and_backward_never_wait_for_the_device(options, merged):
    block = make("block", **options, learnable_temperature=not merged)
    if merged:
        block.attention.spatial.reparameterize()
    on_meta(block, None)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_never_wait_for_the_device(name):
    on_meta(make(name), None)


class Waits(Block):
    def forward(self, x):
        return super().forward(x) / x.amax().item()


class FromTheCpu(Block):
    def forward(self, x):
        return super().forward(x) * torch.tensor(2.0)


class Selects(Block):
    def forward(self, x):
        out = super().forward(x)
        return out + out[out > 0].sum()


@pytest.mark.parametrize("kind", [Waits, FromTheCpu, Selects])
def test_what_waits_would_be_seen(kind):
    with pytest.raises((AssertionError, RuntimeError), match="waits for values|has a tensor on the cpu|meta tensors"):
        on_meta(kind(), None)


@pytest.mark.parametrize("name", NETWORKS)
def test_deterministic_algorithms_and_the_same_bits_from_the_same_seed(name):
    def run(seed):
        torch.manual_seed(seed)
        model = timm.create_model(name, drop_rate=0.2, drop_path_rate=0.2).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for shape in SHAPES[:2]:
            last = step(model, images(*shape))
            optimizer.step()
        return [*last, *model.state_dict().values()]

    torch.use_deterministic_algorithms(True)
    try:
        one, other, different = run(1), run(1), run(2)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], different[0])


@pytest.mark.parametrize("name", NETWORKS)
def test_autocast_of_a_network_is_that_of_its_plain_path(name):
    """The block's own code against autograd's, both in a network under bf16.

    With 8 bits a single gradient may be off by half of itself either way. So each tensor is compared over twelve
    batches: rounding averages out (0.23 at most), a factor of 1.5 in one formula does not (0.6 and more). The first
    bias of a normalised router is left out: of hidden numbers that are on in every image the norm takes it off again,
    so that its gradient is rounding alone.
    """
    found = {}
    for seed in range(12):
        x = images(32, 64, 64) + 0.1 * torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        lean, plain = make(name).train(), make(name).train()
        for block in plain.modules():
            if isinstance(block, Cbam2):
                forward = block.forward
                block.forward = lambda x, forward=forward: forward(x, return_attention=True)[0]
        for model in (lean, plain):
            with torch.autocast("cpu", torch.bfloat16):
                results = step(model, x, lambda x, model=model: model(x).float())
            assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in results)
            found.setdefault(model is lean, []).append([tensor.flatten() for tensor in results])
    names = ["logits", *(name for name, _ in lean.named_parameters())]
    for name, own, wanted in zip(names, zip(*found[True]), zip(*found[False]), strict=True):
        own, wanted = torch.cat(own), torch.cat(wanted)
        if name.endswith("spatial.router.fc1.bias") and name.replace("fc1.bias", "norm.bias") in names:
            continue
        assert abs((own @ wanted) / (wanted @ wanted) - 1) <= 0.25
