"""Small trained-looking networks of each library, as a person brings them along."""

import timm
import torch
import torchvision
from randomise import randomise
from torch import nn
from transformers import AutoModelForImageClassification, ConvNextConfig, ConvNextV2Config, ResNetConfig

from timm_cbam2 import Cbam2

SIZES = dict(hidden_sizes=[16, 32], depths=[1, 2])


class Own(nn.Module):
    """A network of one's own: no residual block that anybody knows."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.layer = nn.ModuleList(nn.Conv2d(12, 12, 1) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.body(self.stem(x))
        for layer in self.layer:
            x = torch.relu(layer(x)) + x
        return self.fc(self.drop(x.mean((2, 3))))


def _hf(config):
    return AutoModelForImageClassification.from_config(config)


MAKERS = {
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=4),
    "timm resnet50": lambda: timm.create_model("resnet50", num_classes=4, in_chans=1, drop_path_rate=0.2),
    "timm convnext": lambda: timm.create_model("test_convnext", num_classes=4, drop_path_rate=0.2),
    "timm convnextv2": lambda: timm.create_model("test_convnext2", num_classes=4),
    "timm resnet20": lambda: timm.create_model("resnet20"),
    "timm features": lambda: timm.create_model("resnet10t", features_only=True),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "torchvision resnext50": lambda: torchvision.models.resnext50_32x4d(num_classes=4),
    "torchvision convnext": lambda: torchvision.models.convnext_tiny(num_classes=4, stochastic_depth_prob=0.3),
    "transformers resnet": lambda: _hf(ResNetConfig(embedding_size=16, **SIZES)),
    "transformers resnet, basic": lambda: _hf(ResNetConfig(embedding_size=16, layer_type="basic", **SIZES)),
    "transformers convnext": lambda: _hf(ConvNextConfig(num_stages=2, drop_path_rate=0.3, **SIZES)),
    "transformers convnextv2": lambda: _hf(ConvNextV2Config(num_stages=2, **SIZES)),
}


def make(name):
    return randomise(MAKERS[name]())


def images(name="", side=32):
    channels = 1 if name == "timm resnet50" else 3
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def answers(model, x):
    """Every tensor that the model says of `x`, the random numbers of dropout being the same each time."""
    torch.manual_seed(0)
    said = model(x)
    said = said.to_tuple() if hasattr(said, "to_tuple") else said
    said = list(said.values()) if isinstance(said, dict) else said
    return list(said) if isinstance(said, (tuple, list)) else [said]


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def blocks(model):
    """The names of its blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, Cbam2)]
