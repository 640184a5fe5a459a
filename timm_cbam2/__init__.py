"""CBAM2 attention for every timm ResNet and ConvNeXt; importing this registers the models with timm."""

from .cbam2 import Cbam2, CbamAttention, ChannelAttn, SpatialAttn, record_attention, resolve_options
from .convnext_cbam2 import ConvNeXtCbam2
from .resnet_cbam2 import CifarResNet, CifarResNetCbam2, ResNetCbam2

__version__ = "0.1.0"

__all__ = [
    "Cbam2",
    "CbamAttention",
    "ChannelAttn",
    "CifarResNet",
    "CifarResNetCbam2",
    "ConvNeXtCbam2",
    "ResNetCbam2",
    "SpatialAttn",
    "record_attention",
    "resolve_options",
]
