"""The end of a residual branch under torch.compile: the values of separate steps, and no more kept than they keep."""

import copy
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from randomise import randomise
from timm.models.resnet import Bottleneck
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from timm_cbam2 import Cbam2
from timm_cbam2.models.compiled_cbam2 import Source, apply_masks, maps_of, normalised, squeezes_of
from timm_cbam2.models.residual_cbam2 import BottleneckCbam2


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def images(batch, height, width):
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
    return x.to(memory_format=torch.channels_last)


def bottleneck(attention):
    """A residual block of 32 channels on 5 x 6 positions, between two convolutions."""
    block = Bottleneck(32, 8, attn_layer=partial(Cbam2, gate="unit_sigmoid") if attention else None)
    if attention:
        block.__class__ = BottleneckCbam2
    parts = (torch.nn.Conv2d(3, 32, 1), block, torch.nn.Conv2d(32, 4, 1))
    return randomise(torch.nn.Sequential(*parts)).to(memory_format=torch.channels_last)


NORMS = ("frozen norm", "statistics kept", "not counted", "no shift")


@pytest.mark.parametrize("how", ["training", "autocast", "evaluation", *NORMS])
def test_the_end_of_a_residual_branch(how):
    """Its norm included, of which the running statistics count too."""
    model = bottleneck(True).train(how != "evaluation")
    norm = model[1].bn3
    if how == "frozen norm":
        norm.eval()
    elif how == "statistics kept":
        norm.track_running_stats = False
    elif how == "not counted":
        norm.num_batches_tracked = None
    elif how == "no shift":
        norm.bias = None
    eager, x = copy.deepcopy(model), images(3, 5, 6)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    found = []
    for module, forward in ((model, compiled), (eager, eager)):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            with torch.set_grad_enabled(how != "evaluation"):
                out = forward(x)
        grads = []
        if how != "evaluation":
            grads = torch.autograd.grad(out.float().square().sum(), list(module.parameters()))
        found.append([out.detach().flatten(), *(g.flatten() for g in grads), *(b.float() for b in module.buffers())])
    assert torch.equal(model[1].bn3.running_mean, bottleneck(True)[1].bn3.running_mean) == (
        how in ("frozen norm", "statistics kept", "evaluation")
    )
    if how == "autocast":  # a single gradient may be off by half of itself
        found, bound = [[torch.hstack(tensors)] for tensors in found], 0.05
    else:
        bound = 1e-4
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= bound * other.norm().clamp(min=1e-2)


def test_a_batch_far_from_zero_is_measured_as_torch_does():
    """In one reading, of numbers whose squares would leave nothing of their variance."""
    z = 1000 + torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    norms = [torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)]
    own, torchs = normalised(norms[0], z).x, norms[1](z)
    torch.testing.assert_close(own, torchs, atol=1e-3, rtol=0)
    torch.testing.assert_close(norms[0].running_var, norms[1].running_var, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_positions_that_share_the_maximum_share_its_gradient(memory_format):
    """In one row and in several, as with `amax` over both axes."""
    x = torch.randint(0, 3, (2, 4, 5, 6), generator=torch.Generator().manual_seed(0)).double()
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weights = torch.arange(1.0, 9.0, dtype=torch.float64).view(2, 4)
    found = []
    for average, largest in (squeezes_of(Source(x)), (x.mean((2, 3)), x.amax((2, 3)))):
        (grad,) = torch.autograd.grad((average * weights + largest * weights.square()).sum(), x)
        found.append((average, largest, grad))
    for own, torchs in zip(*found):
        torch.testing.assert_close(own, torchs)


@pytest.mark.parametrize("whole_numbers", [False, True], ids=["of its own size", "in many equal numbers"])
def test_a_norm_that_is_never_stored_has_torchs_gradients(whole_numbers):
    """Of one after the other: the norm, both squeezes, both maps, both masks; with weights below zero and at zero."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.float64) * 3 + 7
    z = z.round() if whole_numbers else z
    weight = torch.tensor([1.5, -0.7, 0.0, 0.2], dtype=torch.float64)
    of_squeezes, of_maps = (torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def ours(norm, z):
        source = normalised(norm, z)
        squeezes = squeezes_of(source)
        ca = ((squeezes[0] * of_squeezes[0] + squeezes[1] * of_squeezes[1]).sigmoid() * 2)[:, :, None, None]
        sa = (maps_of(source, ca) * of_maps[0, :2, None, None]).sum(1, True).sigmoid() * 2
        return apply_masks(source, ca, sa)

    def torchs(norm, z):
        x = norm(z)
        squeezes = x.mean((2, 3)), x.amax((2, 3))
        ca = ((squeezes[0] * of_squeezes[0] + squeezes[1] * of_squeezes[1]).sigmoid() * 2)[:, :, None, None]
        maps = torch.cat([(x * ca).mean(1, True), (x * ca).amax(1, True)], 1)
        return x * ca * (maps * of_maps[0, :2, None, None]).sum(1, True).sigmoid() * 2

    found = []
    for way in (ours, torchs):
        norm, given = torch.nn.BatchNorm2d(4, dtype=torch.float64), z.clone().requires_grad_()
        norm.weight.data.copy_(weight)
        norm.bias.data.copy_(of_maps[1])
        out = way(norm, given)
        found.append([out, *torch.autograd.grad(out.sin().sum(), [given, norm.weight, norm.bias]), norm.running_var])
    for own, expected in zip(*found):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 keeps one tensor more: slower, not wrong")
def test_compiled_it_keeps_what_the_plain_block_keeps():
    """For the backward pass, of tensors as large as its output: its input, what its last norm takes, and its output.

    Whatever else is kept is written and read once more in every block.
    """
    kept = {}
    for attention in (False, True):
        model, x = bottleneck(attention).train(), images(3, 5, 6)

        def forward_of(graph, inputs, attention=attention):
            (output,) = (node for node in graph.graph.nodes if node.op == "output")
            values = [node.meta["val"] for node in output.args[0] if hasattr(node, "meta") and "val" in node.meta]
            kept[attention] = [v.dtype for v in values if isinstance(v, torch.Tensor) and v.shape == (3, 32, 5, 6)]
            return make_boxed_func(graph.forward)

        torch.compiler.reset()
        backend = aot_autograd(
            fw_compiler=forward_of,
            bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        torch.compile(model, fullgraph=True, dynamic=False, backend=backend)(x).sum().backward()
    assert kept[True] == kept[False] == [torch.float32] * 3
