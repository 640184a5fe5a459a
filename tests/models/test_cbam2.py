"""The block against its formulas, in every option and shape it promises."""

import itertools

import pytest
import torch
from randomise import randomise
from reference import reference

import timm_cbam2
from timm_cbam2 import Cbam2, CbamAttention, ChannelAttn, SpatialAttn, record_attention, resolve_options

MAPS = [
    dict(coords=True, router_pool="avg"),
    dict(coords=True, router_pool="moments"),
    dict(coords=False, router_pool="avg"),
]
BRANCHES = [
    dict(kernel_sizes=(3, 5, 7), dilated=(3, 3)),
    dict(kernel_sizes=[7], dilated=None),
    dict(kernel_sizes=(2, 3), dilated=[5, 2]),
    dict(kernel_sizes=(1,), dilated=(3, 5)),
]
SHAPES = [(1, 3, 1, 1), (3, 1, 1, 7), (2, 4, 5, 1), (2, 17, 12, 8)]
FUSIONS = ("router", "static", "sum")
GATES = ("sigmoid", "hard_sigmoid", "unit_sigmoid")
FORMATS = [torch.contiguous_format, torch.channels_last]


def make_block(channels, dtype=torch.float64, seed=0, **options):
    return randomise(Cbam2(channels, **options).to(dtype), seed)


def grid():
    for fusion, gate, maps in itertools.product(
        ("router", "static", "sum"), ("sigmoid", "hard_sigmoid", "unit_sigmoid"), MAPS
    ):
        for learnable, bias in itertools.product((True, False), (True, False)):
            center = learnable != bias
            yield dict(fusion=fusion, gate=gate, learnable_temperature=learnable, mlp_bias=bias, center=center, **maps)


@pytest.mark.parametrize(
    "shape, branches",
    [((2, 5, 6, 9), branches) for branches in BRANCHES]
    + [(shape, BRANCHES[i % 2 * 2]) for i, shape in enumerate(SHAPES)],
    ids=str,
)
def test_every_option_equals_the_formulas(shape, branches):
    for number, options in enumerate(grid()):
        options = {**options, **branches, "temperature": 0.7}
        block = make_block(shape[1], seed=number, rd_channels=3, **options)
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        expected, attention = reference(block.state_dict(), options, x)
        for memory_format in FORMATS:
            given = x.to(memory_format=memory_format)
            out = block(given)
            assert (out - expected).abs().max() <= 1e-12, options
            assert out.is_contiguous(memory_format=memory_format)
            out, recorded = block(given, return_attention=True)
            assert (out - expected).abs().max() <= 1e-12, options
            assert isinstance(recorded, CbamAttention)
            for one, other in zip(recorded, attention):
                assert (one is None) == (other is None)
                if one is not None:
                    assert one.shape == other.shape and (one - other).abs().max() <= 1e-12, options


def test_the_reference_test_can_fail():
    block = make_block(5)
    x = torch.randn(2, 5, 6, 9, dtype=torch.float64)
    options = resolve_options(dict(gate="sigmoid"))
    with torch.no_grad():
        block.spatial.branches[3].dw.weight[0, 0, 0, 0] += 1e-3
    before = block(x)
    with torch.no_grad():
        block.spatial.branches[3].dw.weight[0, 0, 0, 0] -= 1e-3
    assert (before - reference(block.state_dict(), options, x)[0]).abs().max() > 1e-12


@pytest.mark.parametrize("maps", MAPS, ids=str)
@pytest.mark.parametrize("fusion", ["router", "static", "sum"])
def test_gradcheck(fusion, maps):
    """With few kernels: each weight costs two passes, and test_gradients_equal_the_reference has them all."""
    few = dict(gate="unit_sigmoid", mlp_bias=True, rd_channels=2, router_channels=4, kernel_sizes=(3,))
    block = make_block(3, fusion=fusion, **few, **maps)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in block.named_parameters()]

    def run(x, *parameters):
        out, attention = torch.func.functional_call(
            block, dict(zip(names, parameters)), (x,), {"return_attention": True}
        )
        return (out, *(mask for mask in attention if mask is not None))

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))
    assert torch.autograd.gradcheck(lambda x: block(x), (x,))


def test_gradients_equal_the_reference():
    for memory_format, (number, options) in itertools.product(FORMATS, enumerate(grid())):
        block = make_block(6, seed=number, rd_channels=4, **options)
        x = torch.randn(2, 6, 7, 5, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        weight = torch.randn(2, 6, 7, 5, dtype=torch.float64)
        parameters = dict(block.named_parameters())
        got = torch.autograd.grad((block(x) * weight).sum(), [x, *parameters.values()])
        options = {**resolve_options(), **options}
        out = reference({**block.state_dict(), **parameters}, options, x)[0]
        expected = torch.autograd.grad((out * weight).sum(), [x, *parameters.values()], materialize_grads=True)
        for name, one, other in zip(["x", *parameters], got, expected):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-11), (name, options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_half_precision_stays_finite_and_close(dtype, memory_format):
    block = make_block(64, torch.float32, gate="unit_sigmoid")
    x = (torch.randn(2, 64, 56, 40) * 1e4).clamp(-1e4, 1e4).to(dtype).to(memory_format=memory_format)
    half = make_block(64, dtype, gate="unit_sigmoid")
    constant = torch.full_like(x, 1e4)  # its sum over H·W is far beyond fp16
    for given in (x, constant):
        for layer in (half, block):
            out, attention = layer(given, return_attention=True)
            assert out.dtype == dtype and out.isfinite().all()
            assert all(mask.isfinite().all() for mask in attention)
    small = x / 1e4
    exact = block.double()(small.double())
    torch.testing.assert_close(block.float()(small).double(), exact, rtol=0.02, atol=0.02)


def test_autocast_enters_and_leaves():
    block = make_block(8, torch.float32)
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(block(x), block(x)) and block(x).dtype == torch.float32
        assert block(x.bfloat16()).dtype == torch.bfloat16
        assert torch.nn.functional.linear(x, torch.randn(6, 6)).dtype == torch.bfloat16
        inside = block(x)
    assert torch.allclose(inside, block(x), atol=1e-6)


@pytest.mark.parametrize("value", [1e-3, 0.03, 0.5, 1.0, 7.0, 30.0, 1e3])
@pytest.mark.parametrize("learnable", [True, False])
def test_temperature_starts_at_the_asked_value(value, learnable):
    block = Cbam2(4, temperature=value, learnable_temperature=learnable)
    for part in (block.channel, block.spatial):
        temperature = part.temperature(torch.float32)
        assert temperature.shape == (1,) and abs(temperature.item() / value - 1) <= 1e-6
        assert ("raw" in part.temperature.state_dict()) == learnable
        assert len(list(part.temperature.parameters())) == int(learnable)


WRONG = [
    dict(temperature=1e-6), dict(temperature=0), dict(temperature=-1.0), dict(temperature=float("nan")),
    dict(temperature=float("inf")), dict(temperature="1"), dict(fusion="max"), dict(gate="tanh"), dict(gate=None),
    dict(router_pool="max"), dict(router_pool="moments", coords=False), dict(kernel_sizes=()), dict(kernel_sizes=7),
    dict(kernel_sizes=(3, 0)), dict(kernel_sizes=(3.0,)), dict(dilated=3), dict(dilated=(3,)), dict(dilated=(3, 0)),
    dict(rd_ratio=0), dict(rd_channels=0), dict(rd_divisor=0), dict(router_channels=0), dict(coords="yes"),
    dict(mlp_bias=1), dict(center=1), dict(learnable_temperature=None), dict(channels=0), dict(temperature=1e39),
    dict(temperature=10**400), dict(temperature=1e5, dtype=torch.float16), dict(rd_ratio=1e9),
    dict(kernel_sizes=(65536,)), dict(dilated=(3, 65536)),
]  # fmt: skip


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_a_wrong_option_names_itself_and_what_is_allowed(options):
    with pytest.raises(ValueError) as error:
        Cbam2(**{"channels": 8, **options})
    name, value = next(iter(options.items()))
    message = str(error.value)
    assert name in message and repr(value) in message and "give" in message and "\n" not in message


def test_a_misspelt_option_names_the_nearest():
    with pytest.raises(ValueError, match="kernal_sizes.*kernel_sizes.*fusion"):
        resolve_options(dict(kernal_sizes=(3, 7)))
    with pytest.raises(ValueError, match="give a dict"):
        resolve_options("sigmoid")


def test_state_dict_keys_and_shapes():
    got = {name: tuple(value.shape) for name, value in Cbam2(32, mlp_bias=True).state_dict().items()}
    expected = {
        "channel.fc1.weight": (8, 32, 1, 1), "channel.fc1.bias": (8,),
        "channel.fc2.weight": (32, 8, 1, 1), "channel.fc2.bias": (32,),
        "channel.router.fc1.weight": (16, 64, 1, 1), "channel.router.fc1.bias": (16,),
        "channel.router.fc2.weight": (2, 16, 1, 1), "channel.router.fc2.bias": (2,),
        "channel.temperature.raw": (1,), "spatial.temperature.raw": (1,),
        "spatial.router.fc1.weight": (16, 4, 1, 1), "spatial.router.fc1.bias": (16,),
        "spatial.router.fc2.weight": (4, 16, 1, 1), "spatial.router.fc2.bias": (4,),
    }  # fmt: skip
    for i, k in enumerate((3, 5, 7, 3)):
        expected[f"spatial.branches.{i}.dw.weight"] = (4, 1, k, k)
        expected[f"spatial.branches.{i}.pw.weight"] = (1, 4, 1, 1)
    assert got == expected
    other = Cbam2(32, fusion="static", coords=False, learnable_temperature=False, kernel_sizes=(4,), dilated=None)
    got = {name: tuple(value.shape) for name, value in other.state_dict().items()}
    assert got["channel.fusion_logits"] == (2,) and not other.channel.fusion_logits.any()
    assert got["channel.temperature.value"] == got["spatial.temperature.value"] == (1,)
    assert got["spatial.branches.0.dw.weight"] == (2, 1, 5, 5) and got["spatial.router.fc2.weight"] == (1, 16, 1, 1)


@pytest.mark.parametrize("learnable", [True, False])
def test_state_dict_round_trip_also_from_the_meta_device(learnable):
    source = make_block(16, torch.float32, seed=1, learnable_temperature=learnable)
    x = torch.randn(2, 16, 8, 8)
    for assign in (True, False):
        block = Cbam2(16, learnable_temperature=learnable, device="meta")
        if not assign:
            block.to_empty(device="cpu")
        block.load_state_dict(source.state_dict(), strict=True, assign=assign)
        assert torch.equal(block(x), source(x))
    assert Cbam2(16, device="meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("options", [dict(), dict(fusion="static", mlp_bias=True), dict(fusion="sum", coords=False)])
def test_unit_sigmoid_starts_as_the_identity_and_learns(options):
    block = Cbam2(16, gate="unit_sigmoid", **options)
    x = torch.randn(2, 16, 9, 7)
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()
    assert block.channel.fc2.weight.grad.abs().sum() > 0
    assert all(branch.pw.weight.grad.abs().sum() > 0 for branch in block.spatial.branches)
    randomise(block)
    assert not torch.equal(block(x), x)
    block.reset_parameters()
    assert torch.equal(block(x), x)
    assert not torch.equal(Cbam2(16, gate="sigmoid", **options)(x), x)


def test_parts_return_their_attention():
    x = torch.randn(2, 8, 5, 6)
    channel, spatial = ChannelAttn(8), SpatialAttn()
    y, mask, weights = channel(x, return_attention=True)
    assert mask.shape == (2, 8, 1, 1) and weights.shape == (2, 2) and torch.equal(y, channel(x))
    out, mask, weights = spatial(y, return_attention=True)
    assert mask.shape == (2, 1, 5, 6) and weights.shape == (2, 4) and torch.equal(out, spatial(y))
    assert ChannelAttn(8, fusion="static")(x, return_attention=True)[2] is None


def test_only_moments_lets_the_router_see_where():
    left, right = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    left[..., :2] = 1
    right[..., -2:] = 1
    for pool, blind in (("avg", True), ("moments", False)):
        block = make_block(4, torch.float32, router_pool=pool)
        weights = [block(x, return_attention=True)[1].router_weights for x in (left, right)]
        assert torch.allclose(*weights, atol=1e-5) == blind


def test_a_trace_serves_other_sizes():
    block = make_block(4, torch.float32).eval()
    traced = torch.jit.trace(block, torch.randn(2, 4, 6, 7))
    for shape in ((1, 4, 1, 1), (3, 4, 1, 5), (1, 4, 9, 8)):
        x = torch.randn(shape)
        assert torch.allclose(traced(x), block(x), atol=1e-6)


def test_record_attention_names_every_block_and_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), make_block(8, torch.float32), make_block(8, torch.float32))
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    plain = model(x)
    with record_attention(model) as records:
        out = model(x)
    assert list(records) == ["1", "2"] and torch.equal(out, plain)
    _, expected = model[1](model[0](x), return_attention=True)
    for one, other in zip(records["1"], expected):
        assert torch.equal(one, other) and not one.requires_grad
    assert expected.spatial_mask.requires_grad
    model(x)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="no Cbam2 block"):
        with record_attention(torch.nn.Linear(1, 1)):
            pass


def test_record_attention_on_a_compiled_model_and_under_checkpointing():
    model = torch.nn.Sequential(make_block(4, torch.float32))
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with record_attention(compiled) as records:
        compiled(x)
    assert list(records) == ["0"]
    with record_attention(model) as records:
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    out.sum().backward()
    assert list(records) == ["0"] and x.grad is not None


def test_all_that_is_named_is_there():
    assert set(timm_cbam2.__all__) <= set(dir(timm_cbam2))
