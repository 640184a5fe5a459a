"""Detectors and segmentation networks, whose encoders are ResNets and ConvNeXts, take blocks like any other."""

import copy

import pytest
import torch
import torchvision
from networks import blocks, images
from randomise import randomise

from timm_cbam2 import insert, record_attention, remove


def test_detection_and_segmentation():
    # What fasterrcnn_resnet50_fpn builds around pretrained weights: frozen BatchNorm, without parameters.
    frozen = torchvision.ops.FrozenBatchNorm2d
    body = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=frozen
    )
    detector = torchvision.models.detection.FasterRCNN(body, 3, min_size=64, max_size=64)
    randomise(detector).eval()
    picture = [torch.rand(3, 40, 40)]
    plain = copy.deepcopy(detector)
    insert(detector)
    assert len(blocks(detector)) == 16 and type(detector.backbone.body.layer1[0].bn3) is frozen
    (before,), (after,) = plain(picture), detector(picture)
    assert len(before["boxes"]) > 0 and all(torch.equal(before[key], after[key]) for key in before)
    with record_attention(detector) as records:
        detector(picture)
    assert len(records) == 16
    said = []
    randomise(detector)
    remove(detector, fold=True, data=[picture], say=said.append)
    assert blocks(detector) == [] and "16 blocks folded" in said[0]

    fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3)
    plain = randomise(fcn).eval()
    model = insert(copy.deepcopy(plain))
    assert torch.equal(plain(images())["out"], model(images())["out"])


def test_what_segmentation_models_pytorch_builds():
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    more = dict(encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 16, 8))
    for encoder in ("resnet18", "tu-resnet18", "tu-test_convnext"):
        plain = randomise(smp.Unet(encoder, **more)).eval()
        model = insert(copy.deepcopy(plain))
        assert len(blocks(model)) > 2
        assert torch.equal(plain(images(side=64)), model(images(side=64)))
