"""The compiled CPU kernel while nothing is trained: a whole block in one call."""

import copy
import itertools

import pytest
import torch
from kernel_images import FORMATS, SHAPES, images
from randomise import randomise

from timm_cbam2 import Cbam2
from timm_cbam2.models.decisions_cbam2 import DecisionNorm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_inference(memory_format, dtype, kernel, threads):
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 0.01, torch.bfloat16: 0.05}[dtype]
    norms = dict(squeeze_norm=True, router_norm=True, center_spatial=True)
    chosen = [{}, norms, dict(fusion="static", center=True), dict(fusion="sum", mlp_bias=True, gate="hard_sigmoid")]
    chosen += [
        dict(coords=False, gate="sigmoid", **norms),
        dict(router_pool="moments", kernel_sizes=(3,), dilated=None),
    ]
    for shape, options in itertools.product(SHAPES, chosen):
        block = randomise(Cbam2(shape[1], **{"gate": "unit_sigmoid", **options}).double()).eval()
        x = images(shape, dtype).to(memory_format=FORMATS[memory_format])
        expected = block(x.double(), return_attention=True)[0].detach()
        block = block if dtype == torch.float64 else block.float()
        for count in (1, 2):
            threads(count)
            with torch.no_grad():
                assert (block(x) - expected).abs().max() <= tolerance * max(1, expected.abs().max()), (shape, options)
    assert kernel == ["inference"] * len(SHAPES) * len(chosen) * 2


def test_inference_of_a_merged_block_and_of_weights_laid_out_anew(kernel):
    block, x = randomise(Cbam2(6, squeeze_norm=True, router_norm=True).double()).eval(), images((2, 6, 5, 4))
    expected = block(x, return_attention=True)[0].detach()
    block.channel.fc1.weight.data = block.channel.fc1.weight.data.flatten(1).t().contiguous().t()[:, :, None, None]
    block.channel.norm.bias.data = torch.stack([block.channel.norm.bias.data] * 2, 1)[:, 0]
    with torch.no_grad():
        assert torch.allclose(block(x), expected, rtol=1e-12)
        assert torch.allclose(block.to(memory_format=torch.channels_last)(x), expected, rtol=1e-12)
        block.spatial.reparameterize()
        assert torch.allclose(block(x), expected, rtol=1e-12)
    assert kernel == ["inference"] * 3


def test_inference_follows_every_change(kernel):
    norms = dict(squeeze_norm=True, router_norm=True, center_spatial=True)
    block, other = (randomise(Cbam2(6, temperature=2.0, learnable_temperature=False, **norms)).eval() for _ in range(2))
    randomise(other, seed=1)

    def same(x):
        with torch.no_grad():
            expected = block(x, return_attention=True)[0]
            return torch.allclose(block(x), expected, rtol=1e-5, atol=1e-6)

    x = images((2, 6, 5, 4), torch.float32)
    assert same(x) and same(images((3, 6, 4, 7), torch.float32)) and same(x)
    block.load_state_dict(other.state_dict())
    assert same(x)
    block.channel.norm.running_mean = block.channel.norm.running_mean + 1
    assert same(x)
    block.spatial.temperature.value = block.spatial.temperature.value * 3
    assert same(x)
    block.channel.fc2.weight = torch.nn.Parameter(block.channel.fc2.weight * 2)
    assert same(x)
    block.double()
    assert same(x.double())
    block.float()
    assert same(x)
    block.channel.gate = "hard_sigmoid"
    assert same(x)
    block.train()
    assert same(x)
    block.channel.norm.eval()
    assert same(x) and same(x[:1])
    with torch.inference_mode():
        assert same(x)
    assert same(x)


@pytest.mark.parametrize("center", [{"center": True}, {"center_spatial": True}], ids=str)
def test_large_maps_that_differ_by_little(center, kernel):
    block, x = randomise(Cbam2(2, temperature=0.1, **center)).eval(), images((1, 2, 512, 512), torch.float32) / 10 + 3
    exact = copy.deepcopy(block).double()
    with torch.no_grad():
        assert (block(x) - exact(x.double(), return_attention=True)[0]).abs().max() <= 2e-6
    assert kernel == ["inference"]


MALFORMED = {
    "router.fc1": lambda block: setattr(
        block.spatial.router.fc1, "weight", torch.nn.Parameter(torch.ones(16, 4000, 1, 1))
    ),
    "router.fc2": lambda block: setattr(
        block.spatial.router.fc2, "weight", torch.nn.Parameter(torch.ones(1, 16, 1, 1))
    ),
    "norm": lambda block: setattr(block.channel.router, "norm", DecisionNorm(400).eval()),
    "statistics": lambda block: setattr(block.channel.norm, "running_mean", torch.zeros(1)),
    "fc2": lambda block: setattr(block.channel.fc2, "weight", torch.nn.Parameter(torch.ones(3, 8, 1, 1))),
}


@pytest.mark.parametrize("layer", MALFORMED)
def test_layers_that_do_not_fit_are_errors(layer, kernel):
    block = Cbam2(6, router_channels=16, rd_channels=8, squeeze_norm=True, router_norm=True).eval()
    MALFORMED[layer](block)
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not fit|must match|expand"):
        block(images((2, 6, 5, 4), torch.float32))
