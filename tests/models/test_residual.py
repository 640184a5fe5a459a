"""The attention that ends the residual branch: the steps one by one, or as if they were."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
from randomise import randomise
from timm.layers import DropPath
from torch.profiler import ProfilerActivity, profile

from timm_cbam2 import Cbam2, record_attention
from timm_cbam2.models import pieces_cbam2, residual_cbam2
from timm_cbam2.models.convnext_cbam2 import ConvNeXtCbam2Block
from timm_cbam2.models.residual_cbam2 import BasicBlockCbam2, BottleneckCbam2, branch_end

BLOCKS = (BasicBlockCbam2, BottleneckCbam2, ConvNeXtCbam2Block)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS = {
    "test_resnet": {},  # both kinds of block
    "resnet20": {},
    "resnetblur18": dict(layers=(1, 1, 1, 1), channels=(16, 16, 24, 32)),
    "test_convnext": dict(depths=(1, 1, 2, 1)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def make(name, dtype=torch.float64, drop_path=0.0, **kwargs):
    return randomise(timm.create_model(f"{name}_cbam2", drop_path_rate=drop_path, **NETWORKS[name], **kwargs)).to(dtype)


def images(dtype=torch.float64, size=64, batch=4):
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def one_by_one(model):
    """A copy whose blocks take timm's steps and autograd's gradients."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, Cbam2):
            block.is_plain = True
    return model


def step(model, x):
    torch.manual_seed(1)  # the same paths are dropped
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    buffers = [b.clone() for b in model.buffers()]
    return [out.detach(), *(p.grad for p in model.parameters()), *buffers]


def assert_close(one, other, rtol=1e-9):
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= rtol * max(1e-3, b.abs().max())


@pytest.fixture
def ends(monkeypatch):
    """How many branches the attention ended."""
    counted = []
    for fused in (residual_cbam2.fused, residual_cbam2.fused_without_grad):
        counting = functools.partial(lambda fused, *args: counted.append(1) or fused(*args), fused)
        monkeypatch.setattr(residual_cbam2, fused.__name__, counting)
    return counted


@networks
@pytest.mark.parametrize("memory_format", FORMATS)
def test_values_gradients_and_statistics_of_the_separate_steps(name, memory_format, ends):
    for drop_path, training in ((0.0, False), (0.3, True)):
        model = make(name, drop_path=drop_path).train(training).to(memory_format=FORMATS[memory_format])
        x, plain = images().to(memory_format=FORMATS[memory_format]), one_by_one(model)
        with torch.no_grad():
            assert_close([model.eval()(x)], [plain.eval()(x)])
        assert_close(step(model.train(training), x), step(plain.train(training), x))
    assert len(ends) == 4 * sum(isinstance(m, BLOCKS) for m in model.modules())


@networks
def test_with_norms_of_decisions_and_learned_maps(name, ends):
    options = dict(center_spatial=True, squeeze_norm=True, router_norm=True, learned_maps=4)
    for training in (False, True):
        model = make(name, drop_path=0.3, cbam2=options).train(training).to(memory_format=torch.channels_last)
        x, plain = images().to(memory_format=torch.channels_last), one_by_one(model)
        assert_close(step(model, x), step(plain, x), rtol=1e-7)
    assert len(ends) == 2 * sum(isinstance(m, BLOCKS) for m in model.modules())


@networks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_identity_every_bit_is_timms(name, dtype):
    for training, gate in ((False, "unit_sigmoid"), (True, "unit_sigmoid"), (False, "sigmoid")):
        kwargs = dict(drop_path_rate=0.3, **NETWORKS[name])
        twin = randomise(timm.create_model(name, **kwargs)).train(training)
        model = timm.create_model(f"{name}_cbam2", cbam2=dict(gate=gate), **kwargs).train(training)
        model.load_state_dict(twin.state_dict(), strict=False)
        for with_grad in (True, False):
            results = []
            for network in (model, twin):
                torch.manual_seed(2)
                with torch.set_grad_enabled(with_grad), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    results.append(network(images(torch.float32)))
            assert torch.equal(*results) == (gate == "unit_sigmoid"), (training, with_grad)
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in twin.named_buffers())


def test_the_block_takes_a_shortcut_and_an_activation():
    block, x, shortcut = randomise(Cbam2(6, gate="unit_sigmoid").double()), images()[:, :1].repeat(1, 6, 1, 1), images()
    shortcut = shortcut.repeat(1, 2, 1, 1)
    expected = block(x) + shortcut
    for act, function in ((None, lambda t: t), (torch.nn.ReLU(), F.relu), (torch.nn.GELU(), F.gelu), (torch.tanh,) * 2):
        leaves = [t.clone().requires_grad_() for t in (x, shortcut)]
        got = block(leaves[0], shortcut=leaves[1], act=act)
        assert torch.allclose(got, function(expected), rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(got.square().sum(), leaves)
        plain = function(block(leaves[0], True)[0] + leaves[1])
        assert_close(found, torch.autograd.grad(plain.square().sum(), leaves))
        with torch.no_grad():
            before = x.clone(), shortcut.clone()
            assert torch.allclose(block(x, shortcut=shortcut, act=act), got, rtol=1e-12, atol=1e-12)
            assert torch.equal(x, before[0]) and torch.equal(shortcut, before[1])
    out, attention = block(x, True, shortcut)
    assert torch.allclose(out, expected) and attention.spatial_mask.shape == (4, 1, 64, 64)
    assert block(x, shortcut=shortcut.float()).dtype == torch.float64


@pytest.mark.parametrize("where", ["se", "se.channel", "bn2", "act2", "conv2", "drop_path", ""])
def test_hooks_see_what_they_would_see_in_timms_block(where, ends):
    model = make("resnet20", drop_path=0.2).train()
    block = model.layer2[1]
    expected, seen = {}, []

    def watch(part, store):
        handle = part.register_forward_hook(lambda module, args, out: store.append(out.detach().clone()))
        return handle

    plain = one_by_one(model)
    handle = watch(plain.layer2[1].get_submodule(where), expected.setdefault("out", []))
    reference = step(plain, images(size=32))
    watch(block.get_submodule(where), seen)
    assert_close(step(model, images(size=32)), reference)
    assert_close(seen, expected["out"])
    assert len(seen) == 1 and len(ends) == (8 if where in ("se", "se.channel", "drop_path") else 9)
    handle.remove()


@networks
def test_recording_checkpointing_and_second_derivatives(name):
    model = make(name).train()
    x = images(batch=2)
    with record_attention(model) as records:
        recorded = model(x)
    blocks = [m for m in model.modules() if isinstance(m, Cbam2)]
    assert len(records) == len(blocks) and torch.allclose(recorded, one_by_one(model)(x), rtol=1e-9, atol=1e-9)
    model = make(name).train()
    expected = step(model, x)
    again = make(name).train()
    again.set_grad_checkpointing()
    assert_close(step(again, x)[: 1 + len(list(model.parameters()))], expected[: 1 + len(list(model.parameters()))])

    def second(network):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(network(leaf).square().sum(), leaf, create_graph=True)
        parameter = next(b for b in network.modules() if isinstance(b, Cbam2)).channel.fc2.weight
        return torch.autograd.grad(first.square().sum(), [leaf, parameter])

    assert_close(second(model), second(one_by_one(model)), rtol=1e-7)


def test_what_batchnorm_is_told_not_to_do_it_does_not(ends):
    """Frozen statistics, a cumulative average, a single value, frozen weights; statistics kept, batches not counted."""
    for change in ("frozen", "cumulative", "weights", "no statistics", "kept", "not counted"):
        model = make("test_resnet").train()
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            if change == "frozen":
                norm.eval()
            elif change == "cumulative":
                norm.momentum = None
            elif change == "weights":
                norm.requires_grad_(False)
            elif change == "kept":
                norm.track_running_stats = False
            elif change == "not counted":
                norm.num_batches_tracked = None
            else:
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
                norm.track_running_stats = False
        plain, x = one_by_one(model), images()
        for _ in range(2):
            torch.manual_seed(1)
            out, expected = model(x), plain(x)
            out.square().mean().backward(), expected.square().mean().backward()
        assert_close([out, *model.buffers()], [expected, *plain.buffers()])
        for one, other in zip(model.parameters(), plain.parameters()):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="more than 1 value"):
        make("resnet20").train()(images(size=4, batch=1))
    assert ends


def test_tensors_may_be_made_elsewhere_by_default():
    """Such as on a GPU: what a first call looks up of this machine is of the CPU."""
    model, x = make("test_resnet").eval(), images()
    expected = model(x)
    residual_cbam2._rounds_as_addcmul.cache_clear()
    with torch.device("meta"):
        assert torch.equal(model(x), expected)


def test_statistics_that_are_weights_or_bare_tensors():
    """As adaptation while testing makes them."""
    model = make("resnet20").eval()
    for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
        mean, var = norm.running_mean, norm.running_var
        del norm.running_mean, norm.running_var
        norm.running_mean, norm.running_var = torch.nn.Parameter(mean), var
    x = images(size=32, batch=2)
    with torch.no_grad():
        assert torch.allclose(model(x), one_by_one(model)(x), rtol=1e-9, atol=1e-9)


def test_weights_that_change_between_two_passes_are_seen():
    """What evaluation keeps of the weights is made anew, however they were written."""
    model = make("resnet20").eval()
    x = images(size=32, batch=2)
    ways = {
        "in place": lambda p: p.mul_(1.1),
        "through .data": lambda p: p.data.mul_(1.1),
        "set_": lambda p: setattr(p, "data", p.data * 1.1),
    }
    for parameters in ("spatial.branches", "spatial.router", "spatial.temperature", "channel", "bn2"):
        for how, change in ways.items():
            with torch.no_grad():
                before = model(x)
                for name, parameter in model.named_parameters():
                    if parameters in name:
                        change(parameter)
                after = model(x)
                assert not torch.allclose(before, after), (parameters, how)
                assert torch.allclose(after, one_by_one(model)(x), rtol=1e-9, atol=1e-9), (parameters, how)
    with torch.inference_mode():
        inside = model(x)
    assert torch.allclose(inside.clone(), model(x))


def test_stochastic_depth_of_another_kind_is_called():
    class Other(DropPath):
        def forward(self, x):
            return 0.5 * x

    model = make("resnet20").train()
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.drop_path = Other(0.1)
    x, plain = images(size=32), one_by_one(model)
    assert_close(step(model, x), step(plain, x))


def test_peak_of_kept_tensors_is_that_of_timms_block():
    """For the backward pass a block keeps what timm's keeps, and small tensors."""
    from torch.autograd.graph import saved_tensors_hooks

    def kept(model):
        sizes = {}
        with saved_tensors_hooks(lambda t: sizes.setdefault(t.untyped_storage()._cdata, t.numel()) and t, lambda t: t):
            out = model(x)
        return sum(sizes.values()), out

    x = images(torch.float32, size=64)
    plain, _ = kept(timm.create_model("resnet20").train())
    lean, out = kept(make("resnet20", torch.float32).train())
    literal, _ = kept(one_by_one(make("resnet20", torch.float32)).train())
    assert lean < 1.02 * plain < 1.2 * plain < literal
    out.sum().backward()


def test_training_makes_no_more_tensors_of_full_size_than_a_plain_block(monkeypatch):
    """Each costs more than reading one that is there."""
    z, shortcut, g = (torch.randn(4, 8, 24, 24).to(memory_format=torch.channels_last) for _ in range(3))
    monkeypatch.setattr(pieces_cbam2, "CHUNK_BYTES", z[0].nbytes)
    norm, act, attention = torch.nn.BatchNorm2d(8), torch.nn.ReLU(inplace=True), randomise(Cbam2(8))

    def made(end):
        leaves = z.detach().requires_grad_(), shortcut.detach().requires_grad_()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            torch.autograd.grad(end(*leaves), leaves, g)
        return sum(event.self_cpu_memory_usage >= z.nbytes for event in seen.events())

    plain = made(lambda z, shortcut: act(norm(z).add_(shortcut)))
    assert made(lambda z, shortcut: branch_end(attention, z, shortcut, norm, act=act, fresh=True)) <= plain
    attention.is_plain = True  # as it is written
    assert made(lambda z, shortcut: act(attention(norm(z)) + shortcut)) > plain
