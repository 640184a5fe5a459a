"""`timm-cbam2 explain` draws what the blocks decided, and hands out the numbers it drew."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_cbam2 import record_attention
from timm_cbam2.data import build_transform, data_config, read_image


@pytest.fixture(scope="module")
def images(write_folder, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("explain") / "digits", classes=(0, 1), count=2)


def test_a_picture_and_the_numbers_behind_it(run, small_run, images, tmp_path):
    folder, _ = small_run
    image = images / "digit0" / "000.png"
    result = run("explain", folder, image, "-o", tmp_path)
    assert result.code == 0 and "picture" in result.out, result
    with Image.open(tmp_path / "000.png") as picture:
        assert min(picture.size) > 500 and len(set(picture.convert("L").getdata())) > 50

    model = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    x = build_transform(data_config(model))(read_image(image))[None]
    with record_attention(model) as records, torch.no_grad():
        probabilities = model(x).softmax(1)[0]
    arrays = np.load(tmp_path / "000.npz")
    assert np.allclose(arrays["probabilities"], probabilities.topk(3).values)
    for name, attention in records.items():
        for field, value in attention._asdict().items():
            assert np.array_equal(arrays[f"{name}/{field}"], value[0].numpy())
        assert arrays[f"{name}/temperatures"].shape == (2,)


def test_folders_get_an_index_and_equal_names_do_not_collide(run, small_run, images, tmp_path):
    folder, _ = small_run
    result = run("explain", folder, images, "-o", tmp_path, "--blocks", "--compare", "test_convnext_cbam2")
    assert result.code == 2 and "could not be fetched" in result.err  # no weights without a network
    result = run("explain", folder, images, "-o", tmp_path, "--blocks", "--compare", folder / "last")
    assert result.code == 0, result
    pictures = sorted(p.name for p in tmp_path.glob("*.png"))
    assert pictures == ["000-2.png", "000.png", "001-2.png", "001.png"]
    index = (tmp_path / "index.html").read_text()
    assert all(f'src="{name}"' in index for name in pictures) and "http" not in index
    assert any(key.startswith("compare/layer1.0.se/") for key in np.load(tmp_path / "000.npz"))


def test_mistakes_are_one_line(refused, small_run, truncate, tmp_path):
    folder, _ = small_run
    refused("explain", folder, "nowhere.png", words=["nowhere.png", "no such image"])
    refused("explain", folder, tmp_path, words=["holds no images"])
    refused("explain", folder, truncate(tmp_path / "half.jpg"), words=["half.jpg", "cannot read"])
    refused("explain", "resnet2O_cbam2", tmp_path / "half.jpg", words=["resnet20_cbam2"])
