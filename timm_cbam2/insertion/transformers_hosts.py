"""transformers' ConvNeXt layers with attention after the MLP, before layer-scale; each is made of one of theirs."""

import torch
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

from ..models.parts_cbam2 import has_hooks
from ..models.residual_cbam2 import branch_end, owns_end

__all__ = ["ConvNextLayerCbam2", "ConvNextV2LayerCbam2"]


def _end(layer: nn.Module, x: torch.Tensor, features: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
    """features + drop_path(gamma·attention(x)), for x (B, H, W, C)."""
    x = x.permute(0, 3, 1, 2)
    if owns_end(layer.cbam2, x):
        drops = layer.drop_path.training or has_hooks(layer.drop_path)  # by a class that only transformers knows
        return branch_end(layer.cbam2, x, features, gamma=gamma, drop_path=layer.drop_path if drops else None)
    x = layer.cbam2(x)
    return features + layer.drop_path(x if gamma is None else gamma[:, None, None] * x)


class ConvNextLayerCbam2(ConvNextLayer):
    """transformers' ConvNextLayer with CBAM2."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the layer's output."""
        x = self.layernorm(self.dwconv(features).permute(0, 2, 3, 1))
        return _end(self, self.pwconv2(self.act(self.pwconv1(x))), features, self.layer_scale_parameter)


class ConvNextV2LayerCbam2(ConvNextV2Layer):
    """transformers' ConvNextV2Layer with CBAM2."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the layer's output."""
        x = self.layernorm(self.dwconv(features).permute(0, 2, 3, 1))
        return _end(self, self.pwconv2(self.grn(self.act(self.pwconv1(x)))), features, None)
