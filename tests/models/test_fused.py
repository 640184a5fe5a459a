"""The lean backward: the same gradients as the plain path, wherever it is used, and the plain path where it is not."""

import pytest
import timm
import torch
from randomise import randomise
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from timm_cbam2 import Cbam2
from timm_cbam2.models import pieces_cbam2

SHAPE = (3, 6, 7, 5)


def make_block(channels=6, dtype=torch.float64, **options):
    return randomise(Cbam2(channels, **{"gate": "unit_sigmoid", **options}).to(dtype))


def images(dtype=torch.float64, shape=SHAPE):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def plain(block, x):
    return block(x, return_attention=True)[0]


def gradients(block, x, forward=None):
    x = x.detach().requires_grad_()
    out = (forward or block)(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])


def same(one, other, **tolerance):
    tolerance = tolerance or dict(rtol=1e-9, atol=1e-11)
    return all(torch.allclose(a, b, **tolerance) for a, b in zip(one, other, strict=True))


def test_it_is_used_and_keeps_one_full_size_tensor(calls):
    block, x = make_block(64, torch.float32), images(torch.float32, (2, 64, 16, 16)).requires_grad_()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block(x)
    lean = sum(n >= x.numel() for n in kept)
    kept.clear()
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        plain(block, x)
    assert lean == 1 < sum(n >= x.numel() for n in kept) and calls


@pytest.mark.parametrize("chunk_bytes", [1, 2 * 6 * 7 * 5 * 8, 2**21])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_the_plain_path_for_any_chunk(chunk_bytes, memory_format, monkeypatch):
    monkeypatch.setattr(pieces_cbam2, "CHUNK_BYTES", chunk_bytes)
    block, x = make_block(), images().to(memory_format=memory_format)
    assert same(gradients(block, x), gradients(block, x, lambda x: plain(block, x)))
    with torch.no_grad():
        assert torch.allclose(block(x), plain(block, x), rtol=0, atol=1e-12)
        assert block(x).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("x", [torch.zeros(SHAPE), torch.ones(SHAPE), images().relu().round()], ids=["0", "1", "relu"])
def test_ties_share_the_gradient(x):
    block, x = make_block(), x.double()
    assert same(gradients(block, x), gradients(block, x, lambda x: plain(block, x)))


@pytest.mark.parametrize("chunk_bytes", [1, 2**21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients(dtype, chunk_bytes, monkeypatch):
    monkeypatch.setattr(pieces_cbam2, "CHUNK_BYTES", chunk_bytes)
    block, x = make_block(dtype=torch.float32), images(dtype)
    exact = gradients(make_block(), x.double())
    for one, other in zip(gradients(block, x), exact):
        scale = other.abs().max().item()
        assert torch.allclose(one.double(), other, rtol=0.05, atol=0.03 * max(scale, 1))


@pytest.mark.parametrize("fusion", ["router", "static", "sum"])
def test_second_derivatives(fusion):
    block = make_block(3, fusion=fusion, rd_channels=2, router_channels=3, kernel_sizes=(3,))
    x = images(shape=(2, 3, 3, 4)).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: block(x), (x,))
    parameter = block.channel.fc2.weight

    def second(forward):
        (first,) = torch.autograd.grad(forward(x).sum(), x, create_graph=True)  # a linear loss
        return torch.autograd.grad(first.square().sum(), [x, parameter])

    expected = second(lambda x: plain(block, x))
    assert same(second(block), expected) and all(g.abs().sum() > 0 for g in expected)


def test_the_same_graph_twice():
    block, x = make_block(), images().requires_grad_()
    out = block(x).square().sum()
    one = torch.autograd.grad(out, [x, *block.parameters()], retain_graph=True)
    assert same(one, torch.autograd.grad(out, [x, *block.parameters()]))


def test_frozen_parts_get_no_gradient_and_change_none(calls):
    block, x = make_block(), images()
    full = dict(zip(["x", *(n for n, _ in block.named_parameters())], gradients(block, x)))
    block.channel.requires_grad_(False)
    block(x).backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape))
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == name.startswith("channel.")
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, full[name], rtol=1e-9, atol=1e-11)
    block.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(block(leaf), leaf, torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape))
    assert torch.allclose(got, full["x"], rtol=1e-9, atol=1e-11) and calls
    count = len(calls)
    assert not block(x).requires_grad and len(calls) == count


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, calls):
    block, x = make_block(), images()
    expected = gradients(block, x)
    leaf = x.clone().requires_grad_()
    out = checkpoint(block, leaf, use_reentrant=reentrant)
    out.backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape))
    assert same([leaf.grad, *(p.grad for p in block.parameters())], expected) and calls


def test_hooks_on_parameters_are_called_once(calls):
    block, x = make_block(), images()
    expected = gradients(block, x)[1]
    seen = []
    next(block.parameters()).register_hook(lambda g: seen.append(1) or 2 * g)
    assert torch.allclose(gradients(block, x)[1], 2 * expected, rtol=1e-9) and len(seen) == 1


def test_autocast(calls):
    block, x = make_block(dtype=torch.float32), images(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
        assert torch.nn.functional.linear(x, x.new_ones(2, 5)).dtype == torch.bfloat16
    out.float().square().sum().backward()
    expected = torch.autograd.grad(plain(block, x).float().square().sum(), [x, *block.parameters()])
    for one, other in zip([x.grad, *(p.grad for p in block.parameters())], expected):
        assert torch.allclose(one.float(), other.float(), rtol=0.1, atol=0.05 * other.abs().max().item())
    assert calls


def test_what_it_cannot_serve_takes_the_plain_path(calls):
    block, x = make_block(), images()
    expected = gradients(block, x)[0]
    calls.clear()
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    got = torch.func.grad(lambda x: (block(x) * weight).sum())(x)
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11)
    each = torch.vmap(lambda one: block(one[None])[0])(x)
    assert torch.allclose(each, block(x), atol=1e-12)
    calls.clear()
    _, tangent = torch.func.jvp(lambda x: block(x), (x,), (weight,))
    step = 1e-6
    with torch.no_grad():
        difference = (block(x + step * weight) - block(x - step * weight)) / (2 * step)
    assert torch.allclose(tangent, difference, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("how", ["replica", "watched part", "parametrized"])
def test_weights_and_parts_that_are_not_the_blocks_own(how, calls):
    block, x = make_block(), images()
    expected = gradients(block, x)
    calls.clear()
    seen = []
    if how == "replica":  # as DataParallel makes one for each GPU: its weights are plain attributes
        copy = block._replicate_for_data_parallel()
        copies = {}
        for name, module in block.named_modules():
            copies[name] = module._replicate_for_data_parallel() if name else copy
            for key, parameter in module._parameters.items():
                if parameter is None:
                    copies[name]._parameters[key] = None
                else:
                    setattr(copies[name], key, parameter.view_as(parameter))
            if name:
                parent, _, child = name.rpartition(".")
                setattr(copies[parent], child, copies[name])
        got = gradients(block, x, copy)
    elif how == "watched part":
        block.channel.register_forward_hook(lambda *_: seen.append(1))
        got = gradients(block, x)
    else:
        torch.nn.utils.parametrize.register_parametrization(block.channel.fc1, "weight", torch.nn.Identity())
        got = gradients(block, x)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(sorted_sums(got), sorted_sums(expected)))
    assert bool(calls) == (how == "parametrized") and bool(seen) == (how == "watched part")


def sorted_sums(tensors):
    """Numbers that tell gradients apart, in whatever order the parameters come."""
    return torch.stack([t.square().sum() for t in tensors]).sort().values


def test_hooks_on_the_block_run_once_however_often_it_is_differentiated():
    block, x = make_block(), images().requires_grad_()
    seen = []
    block.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    first.sum().backward()
    assert seen == [x.shape]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "part", ["channel.fc1", "channel.router.fc2", "spatial.branches.3.dw", "spatial.branches.1.pw"]
)
def test_a_pruned_part_computes_with_its_pruned_weight(part, training):
    block, x = make_block().train(training), images()
    conv = block.get_submodule(part)
    prune.l1_unstructured(conv, "weight", 0.5)
    with torch.no_grad():
        conv.weight_orig.mul_(3)  # as a step of the optimizer: the pruned weight is stale until the hook has run
    out = block(x)
    out.square().sum().backward()
    assert ((conv.weight_orig.grad == 0) | (conv.weight_mask == 1)).all() and conv.weight_orig.grad.abs().sum() > 0
    prune.remove(conv, "weight")
    assert torch.allclose(block(x), out, rtol=1e-12, atol=1e-12)


def test_hooks_on_a_merged_branch_run():
    block, x, seen = make_block().eval(), images(), []
    expected = block(x)
    block.spatial.reparameterize()
    block.spatial.conv.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    assert torch.allclose(block(x), expected) and seen == [(x.shape[0], 4, *x.shape[2:])]


def test_many_gradients_at_once():
    block, x = make_block(), images(shape=(1, 6, 3, 2))
    jacobian = torch.autograd.functional.jacobian
    assert torch.allclose(jacobian(block, x, vectorize=True), jacobian(block, x), atol=1e-12)


def test_an_empty_batch_and_numbers_that_cannot_be_masked():
    assert make_block()(torch.zeros(0, 6, 3, 3, dtype=torch.float64)).shape == (0, 6, 3, 3)
    with pytest.raises(ValueError, match="torch.int64"):
        Cbam2(6)(torch.ones(1, 6, 2, 2, dtype=torch.long))


def test_deterministic_and_repeatable():
    torch.use_deterministic_algorithms(True)
    try:
        block, x = make_block(), images()
        assert all(torch.equal(a, b) for a, b in zip(gradients(block, x), gradients(block, x)))
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiled_in_one_graph_for_any_size():
    block = make_block(dtype=torch.float32)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=count)
    for shape in ((2, 6, 8, 9), (3, 6, 12, 10), (5, 6, 7, 20)):
        x = images(torch.float32, shape).requires_grad_()
        assert torch.allclose(compiled(x), block(x), atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "options", [{}, dict(fusion="sum", mlp_bias=True), dict(router_norm=True, squeeze_norm=True)], ids=str
)
def test_evaluation_gives_the_same_bits_with_a_graph_and_without(options):
    model = randomise(timm.create_model("test_resnet_cbam2", cbam2=options)).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        without = model(x)
    assert torch.equal(model(x), without)


def test_a_backward_within_autocast_is_that_outside_of_it():
    """Autocast would round the small networks' backward to bfloat16, and mixes its dtypes."""
    found = []
    for within in (False, True):
        torch.manual_seed(0)
        block = randomise(Cbam2(16)).train()
        x = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=within):
            block(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in block.parameters())])
    for outside, inside in zip(*found):
        assert torch.equal(outside, inside)
