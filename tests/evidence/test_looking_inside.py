"""What the ablation measures besides accuracy: position, cost, routing, and masks held at their mean."""

import json

import numpy as np
import pytest
import timm
import torch
from randomise import randomise

from timm_cbam2 import record_attention
from timm_cbam2.evidence.ablation import cost, position, routing
from timm_cbam2.evidence.ablation.masks import KINDS, Moments, averaged, fixed_mask_accuracy


def test_the_position_task_is_about_position_alone():
    images, labels = position.make(320, seed=1)
    assert np.bincount(labels).tolist() == [5] * 64
    for image, label in zip(images, labels):
        blue = (image == (0, 0, 255)).all(-1).nonzero()
        rows, columns = np.unique(blue[0]), np.unique(blue[1])
        assert rows[0] // 4 == rows[-1] // 4 == label // 8 and columns[0] // 4 == columns[-1] // 4 == label % 8
    assert (position.make(320, seed=1)[0] == images).all()


def test_the_position_task_can_be_trained_on(tmp_path):
    from timm_cbam2.data.sources import find_images

    position.write(tmp_path / "task.parquet")
    images = find_images(str(tmp_path / "task.parquet")).with_val("last:1000")
    assert len(images.splits["train"]) == 4000 and len(images.splits["val"]) == 1000 and len(images.classes) == 64


def test_what_is_folded_is_what_is_stored():
    """The table of `cost` compares ways that compute the same thing, and counts what they hold."""
    kinds = cost._kinds()
    stored, folded, block, full, wide = kinds.values()
    for branch, (depthwise, pointwise) in zip(folded.branches, stored.branches):
        branch.dw.weight.data.copy_(depthwise.weight.data)
        branch.pw.weight.data.copy_(pointwise.weight.data)
    maps = torch.randn(2, 4, 9, 11)
    maps[:, 2:] = maps[:1, 2:]  # the coordinates are the same for every image
    assert torch.allclose(folded(maps), stored(maps), atol=1e-5)
    attention = block.attention
    assert torch.allclose(
        block(maps), attention.mask_of(maps[:, :2], *attention.prepare(9, 11, maps.dtype))[0], atol=1e-5
    )
    assert full(maps).shape == wide(maps).shape == stored(maps).shape == (2, 4, 9, 11)
    rows = cost.measure(2, 8, 1)
    taps = 9 + 25 + 49 + 9
    router = 4 * 16 + 16 + 16 * 4 + 4
    parameters = [4 * taps + 16, 4 * taps + 16, 4 * taps + 16 + router + 1, 4 * taps, 16 * taps + 16]
    assert [r["parameters"] for r in rows] == parameters
    assert rows[0]["macs"] == (4 * taps + 16) * 64 and all(r["step"] > r["forward"] > 0 for r in rows)


def test_routing_numbers():
    labels = torch.tensor([0, 0, 1, 1])
    by_class = torch.tensor([[0.9, 0.1, 0.0]] * 2 + [[0.5, 0.5, 0.0]] * 2)
    found = routing.summary(by_class, labels)
    assert found["dead"] == [2] and found["class_share"] == pytest.approx(1)
    assert found["between_samples"] == pytest.approx(0.2) == found["between_classes"]
    assert routing.summary(torch.full((4, 3), 1 / 3), labels)["entropy"] == pytest.approx(1)
    by_sample = torch.tensor([[0.9, 0.1], [0.5, 0.5]] * 2)
    assert routing.summary(by_sample, labels)["class_share"] == pytest.approx(0)


def test_routing_of_a_run(start_python, small_run, tmp_path):
    command = ("-m", "timm_cbam2.ablation", "routing", small_run[0], "-o", "routing.json")
    result = start_python(*command, cwd=tmp_path, brief=True).wait()
    assert result.code == 0, result
    out = result.out
    assert "| layer3.2.se | branches |" in out and "- both averaged: " in out
    found = json.loads((tmp_path / "routing.json").read_text())
    blocks = found["blocks"].values()
    assert len(blocks) == 9 and all(sum(block["fusion"]["mean"]) == pytest.approx(1) for block in blocks)
    assert len(found["accuracy"]) == 4 and found["images"] > 0


def test_what_masks_do_between_images():
    masks = torch.tensor([[0.0, 1.0], [2.0, 1.0]])[:, :, None, None]  # two images, two channels
    moments = Moments("unit_sigmoid")
    for image in masks:
        moments.add(image[None])
    assert moments.mean.flatten().tolist() == [1, 1]
    assert moments.summary() == pytest.approx(
        {"mean": 1.0, "between_samples": 0.5**0.5, "within": 0.0, "low": 0.25, "high": 0.25}
    )


def test_masks_can_be_held_at_their_mean():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet_cbam2", num_classes=4).eval()
    randomise(model)
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        others = model(images[1:])
        with record_attention(model) as records:
            own = model(images[:1])
    means = {name: {"channel": seen.channel_mask, "spatial": seen.spatial_mask} for name, seen in records.items()}
    with torch.no_grad():
        for parts in ((), ("channel",), ("spatial",), ("channel", "spatial")):
            with averaged(model, means, parts):
                assert torch.allclose(model(images[:1]), own, atol=1e-5)  # its own masks are the ones held
                same = torch.allclose(model(images[1:]), others, atol=1e-5)
                assert same == (not parts)  # another image's are not
    loader = [(images, torch.arange(6) % 4, None)]
    found = fixed_mask_accuracy(model, loader, means)
    assert set(found) == set(KINDS) and all(0 <= share <= 1 for share in found.values())
