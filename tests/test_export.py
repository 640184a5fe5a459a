"""Exported files compute what the model computes, for any batch and size, and come whole or not at all."""

import pytest
import timm
import torch
from randomise import randomise
from timm.utils import reparameterize_model

import timm_cbam2
from timm_cbam2.errors import UserError
from timm_cbam2.export import export_onnx, export_pt2


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
    network = model("test_convnext_cbam2", depths=(1, 1, 1, 1))
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


def test_what_differs_is_not_written(tmp_path):
    (tmp_path / "m.pt2").write_text("old")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), timm_cbam2.Cbam2(8)).eval()
    with pytest.raises(UserError, match="was not written"):
        export_pt2(network, tmp_path / "m.pt2", (3, 32, 32), tolerance=-1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"] and (tmp_path / "m.pt2").read_text() == "old"


def test_the_command(run, refused, tmp_path):
    refused("export", "resnet20_cbam2", words=["--onnx", "--torch-export"])
    refused("export", "resnet21_cbam2", "--torch-export", words=["resnet20_cbam2"])
    result = run("export", "test_resnet_cbam2", "--torch-export", "--no-pretrained", "--output", tmp_path)
    assert result.code == 0, result
    assert (tmp_path / "test_resnet_cbam2.pt2").is_file() and "largest difference" in result.out
