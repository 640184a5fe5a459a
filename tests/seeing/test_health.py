"""What is said of the attention's health: a collapse, a uniform router, a saturated gate."""

import json

import numpy as np
import pytest
import timm
import torch

import timm_cbam2  # noqa: F401
from timm_cbam2.seeing.health import measure


def test_health_tells_collapse_and_saturation():
    network = timm.create_model("resnet20_cbam2")
    images = torch.randn(8, 3, 32, 32)
    healthy = measure(network.train(), images)
    assert network.training and len(healthy["blocks"]) == 9
    block = healthy["blocks"]["layer1.0.se"]
    assert block["branch_names"] == ["3x3", "5x5", "7x7", "3x3 dilated 3"] and len(block["branches"]) == 4
    assert sum(block["fusion"]) == pytest.approx(1, abs=1e-4) and block["temperatures"] == [1.0, 1.0]
    assert block["channel_saturated"] == 0 and 0 < block["branches_entropy"] <= 1
    assert not [text for text in healthy["warnings"] if "uniform" not in text]
    se = network.layer1[0].se
    with torch.no_grad():
        network.layer1[0].bn2.weight.fill_(1.0)  # timm's zero there would give the block nothing to see
        se.spatial.router.norm.bias[2] = 50.0
        se.channel.router.norm.weight.zero_()
        se.channel.fc1.weight.abs_()
        se.channel.fc2.weight.normal_(0, 1e4)
    found = measure(network, images)
    texts = [text for text in found["warnings"] if text.startswith("layer1.0.se")]
    assert any("'7x7' takes 100 %" in text and "collapse" in text for text in texts), texts
    assert any("squeeze weighs the same" in text and "uniform" in text for text in texts), texts
    assert any("channel mask is at an end of its gate for every image" in text for text in texts), texts
    json.dumps(found)
    assert measure(timm.create_model("resnet20"), images) is None
    assert np.isfinite(found["blocks"]["layer1.0.se"]["fusion_entropy"])


def test_a_hard_mask_that_depends_on_the_image_is_not_dead():
    """At an end of its gate everywhere, but not at the same one for every image: that is a decision."""
    network = timm.create_model("resnet20_cbam2", cbam2=dict(center_spatial=True))
    block = network.layer1[0].se
    with torch.no_grad():
        network.layer1[0].bn2.weight.fill_(1.0)
        block.spatial.branches[0].dw.weight.fill_(1.0)
        block.spatial.branches[0].pw.weight[0, 0] = 1e4  # of the average over channels
        block.spatial.router.norm.bias[0] = 50.0
    found = measure(network, torch.randn(8, 3, 32, 32))
    seen = found["blocks"]["layer1.0.se"]
    assert seen["spatial_saturated"] > 0.9 > 0.5 > seen["spatial_dead"]
    assert not any("layer1.0.se" in text and "saturated" in text for text in found["warnings"])


def test_routing_by_position():
    network = timm.create_model("resnet20_cbam2", cbam2=dict(router_pool="none", router_norm=True))
    with torch.no_grad():
        network.layer1[0].bn2.weight.fill_(1.0)
        network.layer1[0].se.spatial.router.norm.weight.fill_(1.0)  # as after some training: it starts quiet
    found = measure(network, torch.randn(4, 3, 32, 32))["blocks"]["layer1.0.se"]
    assert len(found["branches"]) == 4 and sum(found["branches"]) == pytest.approx(1, abs=1e-4)
    assert found["branches_within"] > 0.02 > found["branches_spread"]
    json.dumps(found)
