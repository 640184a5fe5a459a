"""`timm-cbam2 explain` draws what the blocks decided, and hands out the numbers it drew."""

import re
from urllib.parse import unquote

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from randomise import randomise
from timm.utils import reparameterize_model

from timm_cbam2 import CbamAttention, record_attention
from timm_cbam2.data.loading import build_transform, data_config
from timm_cbam2.data.reading import read_image
from timm_cbam2.seeing.attention_picture import (
    BRANCH_COLOURS,
    LOWERS,
    NEUTRAL,
    RAISES,
    draw,
    overlay,
    reach_of,
    scale_overlay,
)
from timm_cbam2.seeing.explain import Explainer
from timm_cbam2.seeing.health import measure
from timm_cbam2.seeing.views import BlockView


@pytest.fixture(scope="module")
def images(write_folder, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("explain") / "digits", classes=(0, 1), count=1)


def test_a_picture_and_the_numbers_behind_it(run, small_run, images, tmp_path):
    folder, _ = small_run
    image = images / "digit0" / "000.png"
    result = run("explain", folder, image, "-o", tmp_path)
    assert result.code == 0 and "picture" in result.out, result
    with Image.open(tmp_path / "000.png") as picture:
        assert min(picture.size) > 500 and len(picture.convert("RGB").getcolors(1 << 20)) > 50

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
    assert pictures == ["000-2.png", "000.png"]
    index = (tmp_path / "index.html").read_text()
    assert all(f'src="{name}"' in index for name in pictures) and "http" not in index
    assert any(key.startswith("compare/layer1.0.se/") for key in np.load(tmp_path / "000.npz"))


def test_files_of_yours_stay(run, small_run, images, tmp_path):
    """Those of an earlier call are drawn anew."""
    yours = {"000.png": b"picture", "index.html": b"<title>page</title>"}
    for name, content in yours.items():
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        result = run("explain", small_run[0], images, "-o", tmp_path)
        assert result.code == 0 and "index-2.html" in result.out, result
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {*yours, "000-2.png", "000-2.npz", "000-3.png", "000-3.npz", "index-2.html"}
    assert yours == {name: (tmp_path / name).read_bytes() for name in yours}


def test_every_kind_of_image_and_file_name(run, small_run, digits, tmp_path):
    """Drawn beside the images themselves, whose files stay as they are."""
    folder, _ = small_run
    grey = Image.fromarray(digits[0][0]).resize((40, 30))
    kinds = {"wide.png": grey.resize((300, 9)), "tall.bmp": grey.resize((5, 200)), "palette.gif": grey.convert("P")}
    kinds |= {"a.png": grey.convert("RGBA"), "a.jpg": grey.convert("CMYK"), "a-2.png": grey.resize((1, 1))}
    kinds |= {'a"><b>$x$ ä.png': grey}
    for name, image in kinds.items():
        image.save(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in kinds}
    result = run("explain", folder, *sorted(tmp_path / name for name in kinds), "-o", tmp_path)
    assert result.code == 0 and "7 pictures" in result.out, result
    assert before == {name: (tmp_path / name).read_bytes() for name in kinds}
    assert len(list(tmp_path.glob("*.npz"))) == 7
    index = (tmp_path / "index.html").read_text()
    assert "<b>$x$" not in index and "&lt;b&gt;$x$ ä.png</b>" in index
    for address in re.findall(r'(?:src|href)="([^"]*)"', index):
        assert (tmp_path / unquote(address)).is_file() and unquote(address) not in kinds

    only = tmp_path / "only"
    only.mkdir()
    (tmp_path / "wide.png").rename(only / "wide.png")
    for _ in range(2):  # the first one's pictures are no images to the second
        assert "wide.png: digit" in run("explain", folder, only, "-o", only / "attention").out


def test_an_unreadable_image_among_others(run, small_run, images, truncate, tmp_path):
    folder, _ = small_run
    truncate(tmp_path / "half.jpg")
    result = run("explain", folder, tmp_path / "half.jpg", images, "-o", tmp_path / "out")
    assert result.code == 2 and len(result.err.splitlines()[-1:]) == 1
    assert "half.jpg" in result.err and "the other 2 are drawn" in result.err
    assert (tmp_path / "out" / "index.html").read_text().count("<img") == 2


OPTIONS = [
    dict(fusion="static", temperature=3.0),
    dict(fusion="sum", gate="sigmoid", kernel_sizes=(3, 9), dilated=None),
    dict(gate="hard_sigmoid", learnable_temperature=False, coords=False),
    dict(router_pool="none", router_norm=True, learned_maps=2, squeeze_norm=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["static", "sum", "hard", "by position"])
def test_every_kind_of_block_is_drawn(options, digits, tmp_path):
    """Beside a network of another family, with one channel; what is drawn is what the block says."""
    one = randomise(timm.create_model("test_resnet_cbam2", num_classes=3, cbam2=options))
    two = randomise(timm.create_model("test_convnext_cbam2", num_classes=7, in_chans=1))
    explanations = [Explainer("a $ name", 32, m)(Image.fromarray(digits[0][0])) for m in (one, two)]
    first = explanations[0].blocks[0]
    learned = [part.temperature(torch.float32).item() for part in (one.layer1[0].se.channel, one.layer1[0].se.spatial)]
    assert list(first.temperatures) == learned
    assert (first.fusion is None) == (options.get("fusion") == "sum")
    assert len(first.branches) == first.attention.router_weights.shape[1]
    assert first.neutral == (0.5 if "gate" in options else 1.0)
    assert first.by_position == (options.get("router_pool") == "none") and first.shares.sum() == pytest.approx(1)
    draw(explanations, tmp_path / "two.png", "$\\frac", every_block=True)
    draw(explanations[:1], tmp_path / "one.png", "a name")
    with Image.open(tmp_path / "one.png") as single, Image.open(tmp_path / "two.png") as both:
        assert both.width > 1.3 * single.width  # side by side


def test_routing_by_position_is_a_picture():
    """Each position has the colour of the branch that was chosen there."""
    weights = torch.zeros(1, 3, 1, 4)
    weights[0, [0, 2, 1, 1], 0, range(4)] = 1
    attention = CbamAttention(torch.ones(1, 1, 1, 1), None, torch.ones(1, 1, 1, 4), weights)
    block = BlockView("layer1.0.se", "layer1", attention, ("3x3", "5x5", "7x7"), None, (1.0, 1.0), 1.0)
    tinted = scale_overlay(np.ones((1, 4, 3)), block)[0]
    wanted = [BRANCH_COLOURS[i] for i in (0, 2, 1, 1)]
    assert ["#" + bytes(p.tolist()).hex() for p in tinted] == wanted
    assert block.shares.tolist() == [0.25, 0.5, 0.25]


def test_masks_lie_over_the_image_itself():
    """Not over the copy that a small network sees: the same cut, at the image's own resolution up to a limit."""
    network = randomise(timm.create_model("resnet20_cbam2", num_classes=3))
    ramp = np.linspace(0, 255, 600).astype(np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (300, 1))] * 3, 2))  # 600 wide, 300 high
    found = Explainer("network", model=network)(image)
    assert found.pixels.shape == (32, 32, 3) and found.picture.shape == found.shown.shape == (300, 300, 3)
    assert overlay(found.shown, found.blocks[-1], 1.0).shape == (300, 300, 3)
    for seen in (found.pixels, found.picture):  # the middle of the image
        assert seen[:, 0].mean() == pytest.approx(0.25, abs=0.03) and seen[:, -1].mean() == pytest.approx(
            0.75, abs=0.03
        )
    large = Explainer("network", model=network)(image.resize((2400, 1200)))
    assert large.picture.shape == (448, 448, 3)
    small = Explainer("network", model=network)(image.resize((40, 20)))
    assert small.picture is None and small.shown is small.pixels


def test_the_tint_is_the_colour_scale():
    """On a white image, neutral is light grey, the ends of the scale are its ends, and beyond them nothing changes."""
    mask = torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0]).reshape(1, 1, 1, 5)
    attention = CbamAttention(torch.ones(1, 1, 1, 1), None, mask, torch.ones(1, 1))
    block = BlockView("layer1.0.se", "layer1", attention, ("3x3",), None, (1.0, 1.0), 1.0)
    tinted = overlay(np.ones((1, 5, 3)), block, reach=1.0)[0]
    assert ["#" + bytes(p.tolist()).hex() for p in tinted[[0, 2, 4]]] == [LOWERS, NEUTRAL, RAISES]
    assert tinted[1, 2] > tinted[1, 0] and tinted[3, 0] > tinted[3, 2]
    assert reach_of([block]) == 2.0
    dark = overlay(np.linspace(0, 0.2, 15).reshape(1, 5, 3), block, reach=1.0)[0].astype(int)
    assert dark[0, 2] > dark[0, 0] and dark[4, 0] > dark[4, 2]  # blue stays blue, red stays red


def test_mistakes_are_one_line(refused, small_run, truncate, tmp_path):
    folder, _ = small_run
    refused("explain", folder, "nowhere.png", words=["nowhere.png", "no such image"])
    refused("explain", folder, tmp_path, words=["holds no images"])
    refused("explain", folder, truncate(tmp_path / "half.jpg"), words=["half.jpg", "cannot read"])
    refused("explain", "resnet2O_cbam2", tmp_path / "half.jpg", words=["resnet20_cbam2"])


@pytest.mark.parametrize("options", [{}, dict(kernel_sizes=(1, 4), dilated=(5, 2)), dict(dilated=None, coords=False)])
def test_a_reparameterized_model_is_explained_like_its_original(options, images, tmp_path):
    """Its branches are one convolution by then, and are told apart by their taps."""
    model = randomise(timm.create_model("test_resnet_cbam2", cbam2=options)).eval()
    image = images / "digit0" / "000.png"
    original, merged = (Explainer("m", 64, m)(image) for m in (model, reparameterize_model(model)))
    for one, other in zip(original.blocks, merged.blocks, strict=True):
        assert one.branches == other.branches and len(one.branches) == one.attention.router_weights.shape[1]
        assert len(set(one.branches)) == len(one.branches)
    for key, value in original.arrays().items():
        if value.dtype.kind == "f":
            assert np.allclose(merged.arrays()[key], value, rtol=1e-3, atol=1e-4), key
    draw([merged], tmp_path / "merged.png", "merged")
    assert (tmp_path / "merged.png").stat().st_size > 10_000


def test_a_fresh_reparameterized_model_has_numbered_branches(images, tmp_path):
    """Its kernels are all zeros, so that their sizes cannot be told."""
    merged = reparameterize_model(timm.create_model("test_resnet_cbam2")).eval()
    explanation = Explainer("m", 64, merged)(images / "digit0" / "000.png")
    assert all(block.branches == ("branch 1", "branch 2", "branch 3", "branch 4") for block in explanation.blocks)
    draw([explanation], tmp_path / "fresh.png", "fresh")
    assert len(measure(merged, torch.randn(2, 3, 64, 64))["blocks"]) == len(explanation.blocks)
