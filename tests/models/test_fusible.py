"""Blocks that were changed from outside compute what their layers say, whoever makes the passes."""

import copy
import gc
import shutil
import weakref

import pytest
import timm
import torch
from plain_path import gradients, same_as_plain
from randomise import randomise
from torch.nn.utils import parametrize

from timm_cbam2 import Cbam2
from timm_cbam2.kernels.cpu import cpu_kernel
from timm_cbam2.models.fusible_cbam2 import may_fuse, named_weights
from timm_cbam2.models.parts_cbam2 import Fc

NORMS = dict(squeeze_norm=True, router_norm=True)


@pytest.fixture(params=[False, True], ids=["torch", "kernel"])
def kernel(request):
    if request.param and not (shutil.which("c++") and shutil.which("ninja")):
        pytest.skip("building the kernel needs a C++ compiler and ninja")
    with cpu_kernel(request.param):
        yield request.param


def make(**options):
    return randomise(Cbam2(6, gate="unit_sigmoid", **options)).double()


def images(dtype=torch.float64):
    return torch.randn(3, 6, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def can_fuse(block, x):
    return may_fuse(block, x) and named_weights(block) is not None


class Doubled(Fc):
    """Somebody's own layer in the place of one of the block's."""

    def forward(self, x):
        return 2 * super().forward(x)


class Adapter(torch.nn.Module):
    """A layer around one of the block's, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base, self.gain = base, torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) * self.gain


def test_layers_of_somebody_elses(kernel):
    block, x = make(**NORMS), images()
    assert can_fuse(block, x) and same_as_plain(block, x)
    before = block(x)
    block.channel.fc1.__class__ = Doubled
    doubled = block(x)
    assert same_as_plain(block, x) and not torch.allclose(doubled, before) and not can_fuse(block, x)
    block.channel.fc1.__class__ = Fc
    block.channel.router.fc1 = Adapter(block.channel.router.fc1)
    adapted = block(x)
    assert same_as_plain(block, x) and not torch.allclose(adapted, before) and not torch.allclose(adapted, doubled)


def test_shared_weights(kernel):
    x, apart, shared = images(), make(), make(rd_channels=4, router_channels=4, mlp_bias=True)
    shared.channel.fc1.bias = shared.channel.router.fc1.bias
    for block in (apart, shared):
        block.spatial.branches[1].pw.weight = block.spatial.branches[0].pw.weight
        assert same_as_plain(block, x)
    layers = make(kernel_sizes=(3, 3), dilated=None)
    layers.spatial.branches[1] = layers.spatial.branches[0]
    assert same_as_plain(layers, x)
    assert not any(can_fuse(block, x) for block in (apart, shared, layers)) and can_fuse(make(), x)


def _shares(block):
    block.spatial.branches[1].pw.weight = block.spatial.branches[0].pw.weight


LATER = {
    "a hook": lambda block: block.channel.fc2.register_forward_hook(lambda module, args, out: out + 1),
    "a pre-hook": lambda block: block.spatial.router.fc1.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "a parameter's hook": lambda block: block.channel.fc1.weight.register_hook(lambda grad: grad * 2),
    "another layer": lambda block: setattr(block.channel.router, "fc1", Adapter(block.channel.router.fc1)),
    "shared weights": _shares,
}


@pytest.mark.parametrize("change", LATER)
def test_what_is_changed_after_a_first_call(change, kernel):
    block, x = make(**NORMS), images()
    assert can_fuse(block, x) and can_fuse(block, x)
    LATER[change](block)
    assert not can_fuse(block, x)
    if "hook" not in change:  # those would be called twice over
        assert same_as_plain(block, x)


def test_weights_exchanged_after_a_first_call(kernel):
    block, x = make(**NORMS), images()
    before = block(x)
    block.channel.fc1.weight = torch.nn.Parameter(block.channel.fc1.weight.detach() * 2)
    after = block(x)
    assert can_fuse(block, x) and same_as_plain(block, x) and not torch.allclose(after, before)
    block.channel = copy.deepcopy(block.channel)  # a part that is as made
    assert can_fuse(block, x) and same_as_plain(block, x) and torch.equal(block(x), after)
    parametrize.register_parametrization(block.channel.fc1, "weight", Halved())
    assert same_as_plain(block, x) and torch.allclose(block(x), before)


@pytest.mark.parametrize("layer", ["channel.fc1", "channel.fc2", "spatial.router.fc2", "spatial.branches.1.dw"])
def test_parametrized_after_a_first_call_without_gradients(layer, kernel):
    block, x = make(**NORMS).eval(), images()
    with torch.no_grad():
        before = block(x)
        torch.nn.utils.parametrizations.spectral_norm(block.get_submodule(layer))
        block.eval()  # what it adds begins in training
        expected = block(x, return_attention=True)[0]
        assert torch.allclose(block(x), expected, rtol=1e-9) and not torch.allclose(expected, before)


class Halved(torch.nn.Module):
    def forward(self, weight):
        return weight / 2


class Watcher:
    def __init__(self, of):
        self.of = of

    def __call__(self, module, args, out):
        return None


KEPT_BY = {
    "nothing": lambda block: None,
    "a hook": lambda block: block.channel.fc2.register_forward_hook(Watcher(block)),
    "a layer": lambda block: setattr(block.channel.fc2, "seen_by", Watcher(block)),
    "a weight": lambda block: setattr(block.channel.fc2.weight, "seen_by", Watcher(block)),
}


@pytest.mark.parametrize("holder", KEPT_BY)
def test_what_is_known_of_a_block_does_not_keep_it(holder, kernel):
    block = make()
    block(images())
    with torch.no_grad():
        block(images())
    KEPT_BY[holder](block)
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("options", [NORMS, dict(learned_maps=2, **NORMS)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_weights_beside_statistics_of_full_precision(dtype, options, kernel):
    block = make(**options).float()
    for parameter in block.parameters():
        parameter.data = parameter.data.bfloat16()
    got = gradients(block, block, images(dtype))
    assert got[0].dtype == dtype and all(grad.dtype == torch.bfloat16 for grad in got[2:])
    exact = make(**options)
    exact.load_state_dict(block.state_dict())
    for one, other in zip(got, gradients(exact, exact, images()), strict=True):
        assert (one.double() - other).abs().max() <= 0.05 * max(1, other.abs().max().item())


def test_a_norm_that_is_changed_after_the_forward(kernel):
    block, x = make(**NORMS), images()
    twin = copy.deepcopy(block)
    expected = gradients(twin, twin, x)

    def changed(x):
        out = block(x)
        for norm in (block.channel.norm, block.channel.router.norm, block.spatial.router.norm):
            norm.momentum = None
        return out

    torch.testing.assert_close(gradients(changed, block, x), expected)


def test_changed_while_its_branch_is_computed(kernel):
    model = randomise(timm.create_model("test_resnet_cbam2")).eval()
    block = model.layer1[0]
    x = torch.randn(2, block.conv1.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))

    def change(*_):
        block.se.channel.fc1.__class__ = Doubled

    with torch.no_grad():
        before = block(x)
        handle = block.conv1.register_forward_hook(change)
        found = block(x)
        handle.remove()
        assert torch.allclose(found, block.as_timm(x), atol=1e-5) and not torch.allclose(found, before, atol=1e-3)
