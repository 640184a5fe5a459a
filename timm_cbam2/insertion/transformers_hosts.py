"""transformers' ConvNeXt layers with attention after the MLP, before layer-scale; each is made of one of theirs."""

import torch
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

__all__ = ["ConvNextLayerCbam2", "ConvNextV2LayerCbam2"]


class ConvNextLayerCbam2(ConvNextLayer):
    """transformers' ConvNextLayer with CBAM2."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the layer's output."""
        x = self.layernorm(self.dwconv(features).permute(0, 2, 3, 1))
        x = self.pwconv2(self.act(self.pwconv1(x)))
        x = self.cbam2(x.permute(0, 3, 1, 2))
        if self.layer_scale_parameter is not None:
            x = self.layer_scale_parameter[:, None, None] * x
        return features + self.drop_path(x)


class ConvNextV2LayerCbam2(ConvNextV2Layer):
    """transformers' ConvNextV2Layer with CBAM2."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the layer's output."""
        x = self.layernorm(self.dwconv(features).permute(0, 2, 3, 1))
        x = self.pwconv2(self.grn(self.act(self.pwconv1(x))))
        return features + self.drop_path(self.cbam2(x.permute(0, 3, 1, 2)))
