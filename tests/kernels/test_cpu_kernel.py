"""The compiled CPU kernel: the same numbers and gradients as torch's own operations."""

import copy
import itertools
import json
import os

import pytest
import torch
from kernel_images import FORMATS, SHAPES, images
from plain_path import gradients, same_as_plain
from randomise import randomise
from reference import reference

from timm_cbam2 import Cbam2, disable_cpu_kernel, enable_cpu_kernel, resolve_options
from timm_cbam2.models.residual_cbam2 import branch_end


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_and_number_of_threads(shape, memory_format, kernel, threads):
    block = randomise(Cbam2(shape[1], gate="unit_sigmoid").double())
    x = images(shape).to(memory_format=FORMATS[memory_format])
    for count in (1, 2, 3):
        threads(count)
        assert same_as_plain(block, x)
    assert set(kernel) == {"forward", "backward"}
    assert block(x).stride() == torch.empty_like(x).stride()


def test_options_against_the_literal_formulas(kernel):
    choices = dict(
        fusion=("router", "static", "sum"),
        kernels=(((3, 5, 7), (3, 3)), ((1,), None), ((3, 9), (3, 2))),
        pool=((True, "avg"), (True, "moments"), (False, "avg")),
    )
    for fusion, (kernel_sizes, dilated), (coords, pool) in itertools.product(*choices.values()):
        options = dict(fusion=fusion, kernel_sizes=kernel_sizes, dilated=dilated, coords=coords, router_pool=pool)
        options["center"] = coords
        block, x = randomise(Cbam2(6, **options).double()), images((2, 6, 5, 4))
        full = {**resolve_options(options), "gate": "sigmoid"}
        assert (block(x) - reference(block.state_dict(), full, x)[0]).abs().max() <= 1e-12, options
        assert same_as_plain(block, x), options
    assert kernel


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(3, 6, 7, 5), (1, 6, 2, 9), (1, 3, 1, 1), (2, 40, 9, 8)], ids=str)
def test_norms_of_decisions_and_learned_maps(shape, memory_format, kernel, threads):
    for maps, training in itertools.product((0, 1, 4, 7), (True, False)):
        options = dict(squeeze_norm=True, router_norm=True, learned_maps=maps, center_spatial=True)
        block = randomise(Cbam2(shape[1], **options).double()).train(training)
        x, twin = images(shape).to(memory_format=FORMATS[memory_format]), copy.deepcopy(block)
        for count in (1, 2, 3):
            threads(count)
            got = gradients(block, block, x)
            expected = gradients(lambda x, twin=twin: twin(x, return_attention=True)[0], twin, x)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(list(block.buffers()), list(twin.buffers()), rtol=1e-9, atol=1e-10)
    assert kernel.count("backward") == 24


@pytest.mark.parametrize("training", [True, False])
def test_norms_beside_every_other_option(training, kernel, monkeypatch):
    monkeypatch.setattr("timm_cbam2.models.small_networks_cbam2.ChannelByHand", None)  # the kernel serves them all
    choices = ("router", "static", "sum"), ("squeeze_norm", "router_norm"), ((True, "moments"), (False, "avg"))
    for fusion, norm, (coords, pool) in itertools.product(*choices):
        options = {"fusion": fusion, norm: True, "coords": coords, "router_pool": pool, "mlp_bias": coords}
        block, x = randomise(Cbam2(6, **options).double()).train(training), images((3, 6, 5, 4))
        twin = copy.deepcopy(block)
        for _ in range(2):  # the second time from other statistics
            got = gradients(block, block, x)
            expected = gradients(lambda x, twin=twin: twin(x, return_attention=True)[0], twin, x)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9, msg=str(options))
            with torch.no_grad():
                torch.testing.assert_close(block(x), twin(x, return_attention=True)[0], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(list(block.buffers()), list(twin.buffers()), rtol=1e-9, atol=1e-10)


def test_few_and_many_samples_through_its_layers(kernel, threads):
    threads(2)
    options = dict(squeeze_norm=True, router_norm=True, mlp_bias=True, router_channels=21)
    for batch, channels in itertools.product((1, 3, 9, 40), (70, 144)):  # the last batch by torch's products
        block, x = randomise(Cbam2(channels, rd_channels=24, **options).double()), images((batch, channels, 3, 2))
        twin = copy.deepcopy(block)
        got = gradients(block, block, x)
        expected = gradients(lambda x, twin=twin: twin(x, return_attention=True)[0], twin, x)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9, msg=str((batch, channels)))
        torch.testing.assert_close(list(block.buffers()), list(twin.buffers()), rtol=1e-9, atol=1e-10)
    assert kernel.count("backward") == 8


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradcheck_and_ties(memory_format, kernel):
    block = randomise(Cbam2(4, rd_channels=2, router_channels=3, kernel_sizes=(3,), dilated=None).double())
    x = images((2, 4, 3, 3)).to(memory_format=FORMATS[memory_format]).requires_grad_()
    assert torch.autograd.gradcheck(block, (x,))
    for tied in (torch.zeros(2, 4, 3, 3), torch.ones(2, 4, 3, 3), images((2, 4, 3, 3)).relu().round()):
        assert same_as_plain(block, tied.double().to(memory_format=FORMATS[memory_format]))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, memory_format, kernel):
    options = dict(gate="unit_sigmoid", learned_maps=3, squeeze_norm=True)
    block, exact = Cbam2(24, **options), Cbam2(24, **options).double()
    exact.load_state_dict(randomise(block).state_dict())
    x = images((3, 24, 6, 7), dtype).to(memory_format=FORMATS[memory_format])
    size = 1e-5 if dtype == torch.float32 else 0.03
    for one, other in zip(gradients(block, block, x), gradients(exact, exact, x.double())):
        assert torch.allclose(one.double(), other, rtol=size, atol=size * max(1, other.abs().max().item()))
    large = block(1e4 * torch.ones_like(x))
    assert large.dtype == dtype and large.isfinite().all()


def test_rounding_is_torchs(kernel):
    """Of sums in half precision, to the nearest even; numbers that are none stay so."""
    for dtype in (torch.bfloat16, torch.float16):
        x, shortcut = images((1, 3, 64, 64), dtype), images((1, 3, 64, 64), torch.float32).mul(0.37).to(dtype)
        x[0, 0, 0, :4] = torch.tensor([-0.0, 3.0e4, -1.00390625, 1.01171875]).to(dtype)
        got = finished(x.contiguous(), shortcut)
        assert torch.equal(got, (x.float() + shortcut.float()).to(dtype))
        x[0, 0, 0, 0] = float("nan")
        assert finished(x, shortcut)[0].isnan().all()


def finished(x, shortcut):
    """x·1·1 + shortcut by the kernel."""
    identity = Cbam2(x.shape[1], gate="unit_sigmoid")
    with torch.no_grad():
        return identity(x, shortcut=shortcut)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_batchnorm_in_training_is_torchs(dtype, memory_format, kernel):
    """The kernel's passes normalise; at the identity the output and what BatchNorm keeps are torch's, bit for bit."""
    wide = torch.promote_types(dtype, torch.float32)
    own = torch.nn.BatchNorm2d(6, momentum=0.3, dtype=wide)
    block = Cbam2(6, gate="unit_sigmoid", squeeze_norm=True, router_norm=True, dtype=wide)
    plain, (z, shortcut) = copy.deepcopy(own), images((2, 4, 6, 7, 5), dtype)
    z, shortcut = (t.to(memory_format=FORMATS[memory_format]).requires_grad_() for t in (z, shortcut))
    for _ in range(2):
        out = branch_end(block, z, shortcut, own, act=torch.nn.ReLU())
        expected = (plain(z) + shortcut).relu()
        assert torch.equal(out, expected)
        assert all(torch.equal(*pair) for pair in zip(own.buffers(), plain.buffers()))
    found, wanted = (
        torch.autograd.grad(o.double().square().sum(), [z, shortcut, n.weight, n.bias])
        for o, n in ((out, own), (expected, plain))
    )
    size = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(found, wanted, rtol=size, atol=size)
    assert kernel.count("backward") == 1


def test_not_a_number_is_not_hidden(kernel):
    x = images((2, 5, 4, 4))
    x[0, 2, 1, 1] = float("nan")
    out = Cbam2(5).double()(x)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("first", [True, False])
def test_switched_between_forward_and_backward(first, kernel):
    block, x = randomise(Cbam2(6)), images((2, 6, 5, 4), torch.bfloat16)

    def gradient(switch):
        leaf = x.clone().requires_grad_()
        (enable_cpu_kernel if first else disable_cpu_kernel)()
        out = block(leaf)
        if switch:
            (disable_cpu_kernel if first else enable_cpu_kernel)()
        out.square().sum().backward()
        return leaf.grad

    assert torch.equal(gradient(switch=True), gradient(switch=False))


def test_negative_views_are_what_they_stand_for(kernel):
    block, x = randomise(Cbam2(6).double()), images((2, 6, 5, 4))
    assert torch.equal(block(torch._neg_view(x)), block(-x)) and kernel
    leaf = x.clone().requires_grad_()
    found = [torch.autograd.grad(block(leaf), leaf, g)[0] for g in (torch._neg_view(x), -x)]
    assert torch.equal(*found)


def test_what_the_kernel_cannot_serve_goes_without(kernel):
    block = randomise(Cbam2(6).double())
    strided = images((3, 6, 8, 9))[:, :, ::2, 1:]
    assert same_as_plain(block, strided) and not kernel
    assert same_as_plain(block, strided.contiguous()) and kernel
    x = images((2, 6, 4, 4)).requires_grad_()
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0


def test_by_the_environment_and_without_a_compiler(built, script, environment, tmp_path):
    program = (
        "import timm_cbam2; from timm_cbam2.models.passes_cbam2 import registered; print(registered('cpu') is not None)"
    )
    on = {**environment, "TIMM_CBAM2_CPU_KERNEL": "1"}
    result = script(program, env=on)
    assert (result.out, result.err) == ("True\n", "")
    bare = {**on, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "none"), "CXX": "no-such-compiler"}
    failed = script(program, env=bare)
    assert (failed.code, failed.out) == (0, "False\n")
    assert failed.err.count("the CPU kernel cannot be built") == 1 and "Traceback" not in failed.err
    assert os.listdir(tmp_path / "none") == []

    # One that does not load here, as of another machine, is as none.
    code = "import timm_cbam2.kernels.cpu as k; k._build = lambda path, flags: print(path); k.enable_cpu_kernel()"
    (path,) = script(code, env=bare).out.split()
    (tmp_path / "none" / os.path.basename(path)).write_bytes(b"no library")
    failed = script(program, env=bare)
    assert (failed.code, failed.out) == (0, "False\n") and "the CPU kernel cannot be built" in failed.err


def test_the_benchmark_has_it_beside_the_others(built, run, tmp_path):
    words = ("--img-size", "32", "--batch-size", "2", "--rounds", "1", "--threads", "1", "--no-memory", "--floor")
    done = run("benchmark", "test_resnet_cbam2", "--cpu-kernel", *words, "-o", tmp_path)
    assert done.code == 0, done
    (case,) = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    found = {variant["key"]: variant for variant in case["variants"]}
    assert "training" in found["cbam2_kernel"] and "training" not in found["cbam2_kernel_reparameterized"]
    assert found["cbam2_kernel"]["inference"]["seconds"] > 0 and done.out.count("CBAM2, CPU kernel, ms") == 2


def test_its_status_and_building_without_using_it(script, environment, tmp_path):
    code = "from timm_cbam2 import kernels; s = kernels.status(); print(s['in_use'], s['built'], s['can_build'])"
    empty = {**environment, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": str(tmp_path), "CXX": "no-such-compiler"}
    assert script(code, env=empty).out == "False False False\n"
    failed = script("from timm_cbam2 import kernels; kernels.compile_now()", env=empty)
    assert failed.code == 1 and "the CPU kernel cannot be built" in failed.err.splitlines()[-1]


def test_building_does_not_switch_it_on(built, script, environment):
    code = "from timm_cbam2 import kernels; kernels.compile_now(); s = kernels.status(); print(s['in_use'], s['built'])"
    assert script(code, env=environment).out == "False True\n"
