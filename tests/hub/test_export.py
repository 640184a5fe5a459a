"""Exported files compute what the model computes, for any batch and size, and come whole or not at all."""

import pytest
import timm
import torch
from randomise import randomise
from timm.utils import reparameterize_model

import timm_cbam2
from timm_cbam2.errors import UserError
from timm_cbam2.hub.export import export_onnx, export_pt2, export_torchscript


def model(name, **kwargs):
    return randomise(timm.create_model(name, **kwargs)).eval()


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2", "resnet20_cbam2"])
def test_reparameterized_has_one_stored_convolution_and_equal_logits(name):
    network = model(name)
    merged = reparameterize_model(network)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(merged(x), network(x), rtol=1e-5, atol=1e-5)
    for block in (m for m in merged.modules() if isinstance(m, timm_cbam2.Cbam2)):
        stored = [key for key in block.spatial.state_dict() if not key.startswith(("router.", "temperature."))]
        assert stored == ["conv.weight"]
        block.spatial.reparameterize()  # once more changes nothing
        assert block.spatial.conv.weight.shape == (4, 4, 7, 7)
    assert any(".branches." in key for key in network.state_dict())


def test_torch_export_of_any_batch_and_size(tmp_path):
    network = model("test_convnext_cbam2", depths=(1, 1, 1, 1), cbam2_stages=[0, 3])
    assert export_pt2(network, tmp_path / "m.pt2", (3, 64, 64)) < 1e-4
    x = torch.randn(5, 3, 96, 128)
    with torch.no_grad():
        assert torch.allclose(torch.export.load(tmp_path / "m.pt2").module()(x), network(x), rtol=1e-4, atol=1e-4)


def test_onnx_of_any_batch_and_size(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = model("resnet20_cbam2", cbam2_stages=[2])
    export_onnx(network, tmp_path / "m.onnx", (3, 32, 32))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for shape in ((1, 3, 32, 32), (4, 3, 40, 64)):
        x = torch.randn(shape)
        got = torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
        with torch.no_grad():
            assert torch.allclose(got, network(x), rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2", "resnet20_cbam2"])
def test_torchscript_of_any_batch_and_size(name, tmp_path):
    # Of resnet20 the trained weights: with random ones float32 alone rounds by 1e-4 on processors without AVX-512.
    network = timm.create_model(name, pretrained=True).eval() if name == "resnet20_cbam2" else model(name)
    assert export_torchscript(network, tmp_path / "m.pt", (3, 64, 64)) < 1e-4
    loaded = torch.jit.load(tmp_path / "m.pt")
    assert not any(".branches." in key for key in loaded.state_dict())
    x = torch.randn(5, 3, 96, 128)
    with torch.no_grad():
        assert torch.allclose(loaded(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, side", [("test_resnet_cbam2", 32), ("test_resnet_cbam2", 24), ("resnet20_cbam2", 4)])
def test_a_deepest_map_of_one_position_fixes_no_size(name, side, tmp_path):
    network = model(name, cbam2=dict(router_pool="moments"))
    deepest = network.forward_features(torch.randn(1, 3, side, side))
    assert deepest.shape[2:] == (1, 1)
    assert export_pt2(network, tmp_path / "m.pt2", (3, side, side)) < 1e-4
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    for shape in ((1, 3, side, side), (2, 3, 96, 64), (3, 3, 33, side)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.allclose(loaded(x), network(x), rtol=1e-4, atol=1e-4)


def test_openvino_computes_the_same(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed")
    pytest.importorskip("onnxscript")
    network = model("resnet20_cbam2", cbam2_stages=[2])
    assert export_onnx(network, tmp_path / "m.onnx", (3, 8, 8), checks=["openvino"]) < 1e-4


def test_what_differs_is_not_written(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), timm_cbam2.Cbam2(8)).eval()
    for file, write in (("m.pt2", export_pt2), ("m.pt", export_torchscript)):
        (tmp_path / file).write_text("old")
        with pytest.raises(UserError, match="was not written"):
            write(network, tmp_path / file, (3, 64, 64), tolerance=-1.0)
        assert (tmp_path / file).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "m.pt2"]


class Branching(torch.nn.Module):
    """Takes one of two ways, by what the images hold: torch.export has no such choice."""

    def forward(self, x):
        return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))


class Unscriptable(torch.nn.Module):
    def forward(self, x, *rest):
        return x.mean((2, 3))


def test_what_torch_refuses_is_said_in_one_line(tmp_path):
    small = model("test_convnext_cbam2", depths=(1, 1, 1, 1))
    for network, write, side, says in (
        (small, export_pt2, 16, "cannot trace this model with images of 16x16.*--img-size: .*Kernel size"),
        (small, export_torchscript, 16, "was not written: images of shape .*16, 16.* Kernel size"),
        (Branching(), export_pt2, 64, "cannot trace this model"),
        (Unscriptable(), export_torchscript, 64, "torch.jit cannot script this model: "),
    ):
        with pytest.raises(UserError, match=says) as caught:
            write(network, tmp_path / "m.out", (3, side, side))
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command(run, refused, tmp_path):
    refused("export", "resnet20_cbam2", words=["--onnx", "--torch-export", "--torchscript"])
    refused("export", "resnet21_cbam2", "--torch-export", words=["resnet20_cbam2"])
    refused("export", "resnet20_cbam2", "--onnx", "--check", "tvm", words=["--check tvm", "openvino"])
    refused("export", "resnet20_cbam2", "--torch-export", "--check", "openvino", words=["--check openvino", "--onnx"])
    (tmp_path / "file").write_text("")
    blocked = ("--torchscript", "--no-pretrained", "--output", tmp_path / "file")
    refused("export", "resnet20_cbam2", *blocked, words=[tmp_path / "file", "cannot be written"])
    formats = ("--torch-export", "--torchscript")
    result = run("export", "test_resnet_cbam2", *formats, "--no-pretrained", "--img-size", "32", "-o", tmp_path)
    assert result.code == 0 and result.err == "", result
    assert result.out.count("largest difference") == 2
    assert all((tmp_path / f"test_resnet_cbam2.{suffix}").is_file() for suffix in ("pt", "pt2"))
