"""Norms before decisions and learned maps in the lean path: values, gradients and statistics of the plain one."""

import copy

import pytest
import torch
from randomise import randomise
from torch.utils.checkpoint import checkpoint

from timm_cbam2 import Cbam2
from timm_cbam2.models.decisions_cbam2 import DecisionNorm

NORMS = dict(squeeze_norm=True, router_norm=True)
OPTIONS = [
    dict(squeeze_norm=True, fusion="sum", mlp_bias=True),
    dict(router_norm=True, fusion="static"),
    dict(**NORMS, center_spatial=True),
    dict(learned_maps=1, coords=False),
    dict(learned_maps=2, router_pool="moments", **NORMS),
    dict(learned_maps=4, center_spatial=True, **NORMS),
]
ALL = OPTIONS[-1]


def make(options=ALL, dtype=torch.float64):
    return randomise(Cbam2(6, gate="unit_sigmoid", **options)).to(dtype)


def images(shape=(3, 6, 7, 5), dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def plain(block, x):
    return block(x, return_attention=True)[0]


def passed(block, x, forward=None, between=None):
    """The output, every gradient, and the statistics afterwards."""
    x = x.detach().requires_grad_()
    out = (forward or block)(x)
    if between is not None:
        between(block)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])
    return [out.detach(), *grads, *(b.clone().double() for b in block.buffers())]


def assert_as_plain(block, x, between=None, **tolerance):
    twin = copy.deepcopy(block)
    got, expected = passed(block, x, None, between), passed(twin, x, lambda x: plain(twin, x), between)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or dict(rtol=1e-9, atol=1e-10)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_gradients_and_statistics_of_the_plain_path(options, training, calls):
    for shape in ((3, 6, 7, 5), (1, 6, 4, 3), (1, 6, 1, 1)):  # of a single number nothing is measured
        for memory_format in (torch.contiguous_format, torch.channels_last):
            block, x = make(options).train(training), images(shape).contiguous(memory_format=memory_format)
            before = copy.deepcopy(block)
            assert_as_plain(block, x)
            moved = any(not torch.equal(a, b) for a, b in zip(block.buffers(), before.buffers()))
            assert moved == (training and x.numel() > 6 and (len(x) > 1 or "learned_maps" in options))
    assert len(calls) == 6


def test_without_gradients_statistics_move_once():
    for training in (True, False):
        block, x = make().train(training), images()
        twin = copy.deepcopy(block)
        with torch.no_grad():
            torch.testing.assert_close(block(x), plain(twin, x), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(list(block.buffers()), list(twin.buffers()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", ["frozen", "cumulative", "weights"])
def test_what_a_norm_is_told_not_to_do_it_does_not(change, calls):
    block = make().train()
    for norm in (m for m in block.modules() if isinstance(m, DecisionNorm)):
        if change == "frozen":
            norm.eval()
        elif change == "cumulative":
            norm.momentum = None
        else:
            norm.bias.requires_grad_(False)
    if change == "weights":
        leaf = images().requires_grad_()
        block(leaf).square().sum().backward()
        assert all((p.grad is None) == (not p.requires_grad) for p in block.parameters())
    else:
        twin = copy.deepcopy(block)
        for shape in ((3, 6, 7, 5), (2, 6, 4, 4)):
            assert_as_plain(block, images(shape))
            twin(images(shape))
        mean = block.channel.norm.running_mean
        if change == "cumulative":
            squeezes = [torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1) for x in (images(), images((2, 6, 4, 4)))]
            torch.testing.assert_close(mean, (squeezes[0].mean(0) + squeezes[1].mean(0)) / 2)
        else:
            assert torch.equal(mean, make().channel.norm.running_mean)
        assert all(torch.equal(a, b) for a, b in zip(twin.buffers(), block.buffers()))
    assert calls


def test_modes_and_statistics_are_those_of_the_forward_pass(calls):
    """Whatever happens between a forward pass and its backward."""
    assert_as_plain(make().train(), images(), between=lambda block: block.eval())
    assert_as_plain(make().eval(), images(), between=lambda block: block.train())
    block, x = make().eval(), images().requires_grad_()
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    out = block(x).square().sum()
    block.channel.norm.running_mean.add_(1)
    assert torch.equal(torch.autograd.grad(out, x)[0], expected) and len(calls) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_moves_statistics_as_in_the_plain_path(reentrant, calls):
    block = make().train()
    twin = copy.deepcopy(block)
    leaves = [images().requires_grad_() for _ in range(2)]
    checkpoint(block, leaves[0], use_reentrant=reentrant).square().sum().backward()
    checkpoint(lambda x: plain(twin, x), leaves[1], use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(list(block.buffers()), list(twin.buffers()))
    assert calls


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_move_no_statistics(training, calls):
    block = make().train(training)
    twin = copy.deepcopy(block)

    def second(block, forward):
        leaf = images().requires_grad_()
        (first,) = torch.autograd.grad(forward(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [leaf, block.channel.fc2.weight])

    torch.testing.assert_close(second(block, block), second(twin, lambda x: plain(twin, x)))
    torch.testing.assert_close(list(block.buffers()), list(twin.buffers()))
    assert calls
    small = randomise(Cbam2(3, rd_channels=2, router_channels=3, kernel_sizes=(3,), **{**ALL, "learned_maps": 1}))
    x = images((2, 3, 3, 4)).requires_grad_()
    assert torch.autograd.gradgradcheck(small.double().train(training), (x,))


def test_what_it_cannot_serve(calls):
    """Statistics of several processes; learned maps whose weight is made of others."""
    block = torch.nn.SyncBatchNorm.convert_sync_batchnorm(make().eval())
    torch.testing.assert_close(block(images()), make().eval()(images()))
    calls.clear()
    block(images().requires_grad_())
    torch.nn.utils.parametrizations.weight_norm((other := make()).spatial.learned.conv)
    assert_as_plain(other, images())
    assert not calls
    torch.nn.utils.parametrizations.weight_norm((other := make()).channel.fc1)
    assert_as_plain(other, images())
    assert calls


def test_positions_that_lie_otherwise(calls):
    assert_as_plain(make(), images((3, 6, 5, 7)).transpose(2, 3))
    assert_as_plain(make(), images((3, 6, 14, 10))[:, :, ::2, 1::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, calls):
    exact, block = passed(make(), images(dtype=dtype).double()), make(dtype=torch.float32)
    for one, other in zip(passed(block, images(dtype=dtype)), exact, strict=True):
        assert torch.allclose(one.double(), other, rtol=0.05, atol=0.03 * max(1, other.abs().max().item()))
    assert calls
