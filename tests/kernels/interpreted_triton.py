"""The Triton kernel on a CPU, by Triton's interpreter; test_triton.py runs this, with TRITON_INTERPRET=1.

The interpreter cuts off what does not fit bfloat16 where a GPU rounds, so that bfloat16 is compared loosely.
"""

import itertools
from functools import partial

import pytest
import timm
import torch
from randomise import randomise
from torch import nn

from timm_cbam2 import Cbam2
from timm_cbam2.kernels import triton as switch
from timm_cbam2.kernels import triton_passes
from timm_cbam2.kernels.triton_passes import TritonPasses
from timm_cbam2.models import residual_cbam2
from timm_cbam2.models.fused_cbam2 import fused, fused_without_grad, train_affine
from timm_cbam2.models.fusible_cbam2 import named_weights
from timm_cbam2.models.passes_cbam2 import End, Small, TorchPasses, use_passes

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def ended(block, x, *args):
    return fused(block, x, named_weights(block), *args)


def inferred(block, x, *args, **options):
    return fused_without_grad(block, x, named_weights(block), *args, **options)


@pytest.fixture
def kernel(monkeypatch):
    """The kernel serves the test, and each of its readings is counted."""
    calls = []
    run = TritonPasses._run
    monkeypatch.setattr(
        TritonPasses,
        "_run",
        lambda self, reading, *a, **k: calls.append(reading.fn.__name__) or run(self, reading, *a, **k),
    )
    use_passes("cpu", TritonPasses)
    yield calls
    use_passes("cpu", None)


def images(shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(forward, leaves, parameters):
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = forward(*leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), [*leaves, *parameters])]


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def same(found, expected, rtol=1e-9, atol=1e-11):
    return all(torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(found, expected, strict=True))


def same_as_plain(block, x):
    found = gradients(block, [x], block.parameters())
    return same(found, gradients(lambda x: block(x, return_attention=True)[0], [x], block.parameters()))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 1, 9), (1, 11, 7, 3)], ids=str)
def test_every_shape(shape, memory_format, kernel, monkeypatch):
    """In tiles so small that there are several, with edges."""
    monkeypatch.setattr(triton_passes, "TILE", 64)
    block, x = randomise(Cbam2(shape[1], gate="unit_sigmoid").double()), images(shape)
    x = x.to(memory_format=FORMATS[memory_format])
    assert same_as_plain(block, x)
    assert set(kernel) == {"squeeze", "maps", "finish", "products", "spread", "input_gradient"}
    assert block(x).stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_equal_maxima_share_evenly(memory_format, kernel):
    block = randomise(Cbam2(6).double())
    for tied in (torch.ones(1, 6, 3, 5), images((2, 6, 3, 5)).relu().round()):
        assert same_as_plain(block, tied.double().to(memory_format=FORMATS[memory_format]))
    assert kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dtypes(memory_format, dtype, kernel):
    block, exact = Cbam2(10, gate="unit_sigmoid"), Cbam2(10, gate="unit_sigmoid").double()
    exact.load_state_dict(randomise(block).state_dict())
    x = images((2, 10, 3, 5), dtype).to(memory_format=FORMATS[memory_format])
    bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 5e-2}[dtype]
    found = gradients(block, [x], block.parameters())
    use_passes("cpu", None)
    # Of the gradients those of torch's own passes: a maximum that rounds to another place moves them.
    true = [exact(x.double()), *gradients(block, [x], block.parameters())[1:]]
    use_passes("cpu", TritonPasses)
    for one, other in ((found[0], true[0]), (found[1], true[1]), map(flat, (found[2:], true[2:]))):
        assert (one.double() - other).norm() <= bound * other.double().norm()
    large = block(1e4 * torch.ones_like(x))
    assert large.dtype == dtype and large.isfinite().all() and kernel


def as_one(block, relu, drop, x, shortcut, gamma=None):
    return ended(block, x, End(shortcut, gamma, relu, drop is not None), drop)


def one_by_one(block, relu, drop, x, shortcut, gamma=None):
    y = block(x, return_attention=True)[0]
    y = y if gamma is None else y * gamma[:, None, None]
    y = (y if drop is None else y * drop[:, None, None, None]) + shortcut
    return y.relu() if relu else y


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_end_of_a_residual_branch(memory_format, kernel):
    """Shortcut, layer-scale, ReLU and dropped paths, in every combination."""
    block, drop = randomise(Cbam2(6).double()), torch.tensor([0.0, 1.25], dtype=torch.float64)
    x, shortcut = (images((2, 6, 4, 5), seed=seed).to(memory_format=FORMATS[memory_format]) for seed in (0, 1))
    few = memory_format == "contiguous"
    for scaled, relu, dropped in [(True,) * 3] if few else itertools.product((False, True), repeat=3):
        leaves = [x, shortcut, *([images((6,))] if scaled else [])]
        found, plain = (
            gradients(partial(end, block, relu, drop if dropped else None), leaves, block.parameters())
            for end in (as_one, one_by_one)
        )
        assert same(found, plain), (scaled, relu, dropped)
    with torch.no_grad():
        assert same([inferred(block, x, End(shortcut, None, True))], [(block(x) + shortcut).relu()])
    # Another layout of the shortcut is as good.
    other = (
        shortcut.contiguous() if memory_format == "channels_last" else shortcut.to(memory_format=torch.channels_last)
    )
    assert torch.equal(ended(block, x, End(other)), ended(block, x, End(shortcut))) and kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_at_the_identity_it_is_the_separate_steps_bit_for_bit(dtype, kernel):
    block = Cbam2(12, gate="unit_sigmoid")
    x, shortcut = images((2, 12, 4, 5), dtype), images((2, 12, 4, 5), dtype, seed=1)
    gamma, drop = images((12,), dtype, seed=2), torch.tensor([1.25, 0.0])
    scaled = x * gamma[:, None, None]
    assert torch.equal(block(x), x)
    assert torch.equal(ended(block, x, End(shortcut, gamma, True)), (shortcut + scaled).relu())
    dropped = scaled * drop.to(dtype)[:, None, None, None] + shortcut
    assert torch.equal(ended(block, x, End(shortcut, gamma, False, True), drop), dropped) and kernel


def test_not_a_number_is_not_hidden(kernel):
    x, block = images((2, 5, 4, 4)), Cbam2(5).double()
    x[0, 2, 1, 1] = float("nan")
    out = ended(block, x, End(torch.zeros_like(x), None, True))
    assert out[0].isnan().all() and out[1].isfinite().all() and kernel
    squeezes, maps = TritonPasses(x).squeeze(), TritonPasses(x).maps(x.new_ones(2, 5))
    assert torch.equal(squeezes.isnan(), TorchPasses(x).squeeze().isnan())
    assert torch.equal(maps.isnan(), TorchPasses(x).maps(x.new_ones(2, 5)).isnan())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_batch_norm_in_the_same_passes(memory_format, kernel):
    """Every pass over scale·z + shift as torch's passes give it, gradients of the norm included."""
    z = images((3, 6, 4, 5)).to(memory_format=FORMATS[memory_format])
    weight, bias, gamma = (images((6,), seed=seed) for seed in (1, 2, 3))
    _, mean, invstd = torch.native_batch_norm(z, weight, bias, None, None, True, 0.0, 1e-5)
    affine = train_affine(weight, bias, mean, invstd)
    ca, sa, g = images((3, 6), seed=4).sigmoid(), images((3, 4, 5), seed=5).sigmoid(), images(z.shape, seed=6)
    both = []
    for passes in (TritonPasses, TorchPasses):
        forward = passes(z, affine)
        small = Small(forward.squeeze(), ca, forward.maps(ca), sa)
        out = forward.finish(ca, sa, End(torch.ones_like(z), gamma, True))
        backward = forward.again(z, affine)
        found = [small.squeezes, small.maps, out, backward.start_backward(g, small, gamma, out)]
        found.append(backward.channel_gradient(*images((2, 3, 4, 5), seed=7)))
        both.append([*found, *backward.input_gradient(*images((2, 3, 6), seed=8)), backward.gamma_gradient()])
    assert same(*both) and kernel


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2"])
def test_whole_networks(name, kernel, monkeypatch):
    """With stochastic depth; BatchNorm stays torch's, as the interpreter need not round as it does."""
    monkeypatch.setattr(residual_cbam2, "_rounds_as_norm", lambda z: False)
    monkeypatch.setattr(triton_passes, "TILE", 2**14)  # every program costs
    network = randomise(timm.create_model(name, num_classes=3, drop_path_rate=0.3)).double().train()
    x = images((2, 3, 32, 32)).to(memory_format=torch.channels_last)

    def run(x):
        torch.manual_seed(0)
        return network(x)

    found = gradients(run, [x], network.parameters())
    count = len(kernel)
    use_passes("cpu", None)
    assert same(found, gradients(run, [x], network.parameters()), rtol=1e-7, atol=1e-9)
    assert count == len(kernel) >= 6 * len([m for m in network.modules() if isinstance(m, Cbam2)])


def test_second_derivatives_take_the_plain_path(kernel):
    block, x = randomise(Cbam2(6).double()), images((2, 6, 4, 4)).requires_grad_()
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    (first,) = torch.autograd.grad(block(x, return_attention=True)[0].square().sum(), x, create_graph=True)
    assert torch.allclose(second, torch.autograd.grad(first.square().sum(), x)[0]) and kernel


def test_it_proves_itself_before_it_serves(monkeypatch):
    """On each device and in each precision; what differs from torch is said once, and torch goes on."""
    chosen = switch.Kernel()
    x = images((2, 6, 4, 5), torch.float32)
    assert isinstance(chosen(x, None, False), TritonPasses)
    assert chosen(x[:, :, ::2], None, False) is None and chosen(x.int(), None, False) is None

    wrong = switch.Kernel()
    squeeze = TritonPasses.squeeze
    monkeypatch.setattr(TritonPasses, "squeeze", lambda self: squeeze(self) * 1.001)
    use_passes("cpu", wrong)
    block = randomise(Cbam2(6))
    with pytest.warns(UserWarning, match="so it is not used there") as said:
        found = [block(x) for _ in range(2)]
    use_passes("cpu", None)
    own = [one for one in said if one.category is UserWarning]  # Triton's interpreter has warnings of its own
    assert len(own) == 1 and all(torch.equal(one, block(x)) for one in found)
    assert not wrong.folds(x)


def test_a_norm_is_folded_where_it_rounds_as_torchs(kernel):
    """Whatever the check says of this machine, a folded norm gives what it gives alone."""
    norm = nn.BatchNorm2d(6).eval()
    norm.running_mean.copy_(images((6,)))
    z, block = images((2, 6, 4, 5), torch.float32), Cbam2(6, gate="unit_sigmoid")
    with torch.no_grad():
        folded = inferred(block, z, affine=residual_cbam2.eval_affine(norm))
        assert torch.allclose(folded, norm(z), rtol=1e-6, atol=1e-6)
        assert not switch.Kernel().folds(z) or torch.equal(folded, norm(z))
