"""Channel attention: what each channel is multiplied by."""

from typing import Final, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import make_divisible

from .decisions_cbam2 import QUIET, DecisionNorm
from .options_cbam2 import MAX_COUNT, check_options
from .parts_cbam2 import (
    Fc,
    Router,
    Temperature,
    apply_gate,
    as_dtype,
    as_one_node,
    compute_dtype,
    is_traced,
    mean_in,
    no_autocast,
    reset_convs,
)

__all__ = ["ChannelAttn"]


class ChannelAttn(nn.Module):
    """Channel attention: one mask value per sample and channel, from a mix of average and maximum squeezes."""

    is_sum: Final[bool]
    center: Final[bool]

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1.0 / 16,
        rd_channels: Optional[int] = None,
        rd_divisor: int = 8,
        fusion: str = "router",
        router_channels: int = 16,
        temperature: float = 1.0,
        learnable_temperature: bool = True,
        gate: str = "sigmoid",
        mlp_bias: bool = False,
        device=None,
        dtype=None,
        *,
        center: bool = False,
        squeeze_norm: bool = False,
        router_norm: bool = False,
    ) -> None:
        """
        Args:
            channels: Number of input channels.
            rd_ratio: Hidden channels of the shared perceptron as a share of `channels`.
            rd_channels: Hidden channels given directly, overrides `rd_ratio`.
            rd_divisor: Hidden channels are rounded to a multiple of this.
            fusion: "router" mixes the two squeezes per sample, "static" by one learned mix, "sum" adds them (CBAM).
            router_channels: Hidden channels of the router.
            temperature: Starting value of the number that divides the gate's input.
            learnable_temperature: Train the temperature; otherwise it is a saved buffer.
            gate: "sigmoid", "hard_sigmoid" or "unit_sigmoid" (2·sigmoid, 1 at 0: a fresh layer is the identity).
            mlp_bias: Give the shared perceptron biases.
            device: Device of the parameters.
            dtype: Data type of the parameters.
            center: Take the mean over channels off the gate's input, so that the mask redistributes and cannot merely
                scale.
            squeeze_norm: Normalise both squeezes over the batch, so that the mask sees how an image differs; by a
                learnable gain that starts at a tenth.
            router_norm: Normalise the router's logits over the batch likewise, so that over the data no squeeze leads
                by itself.

        Raises:
            ValueError: For an option that is not allowed.
        """
        check_options(locals())
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        hidden = min(channels * rd_ratio, 2.0 * MAX_COUNT)  # which may be infinite
        rd_channels = rd_channels or make_divisible(hidden, rd_divisor, round_limit=0.0)
        if rd_channels > MAX_COUNT:
            raise ValueError(
                f"CBAM2 option rd_ratio={rd_ratio!r} is not allowed; give one that makes at most {MAX_COUNT} hidden "
                f"channels of {channels}."
            )
        self.gate = gate
        self.center = center
        self.is_sum = fusion == "sum"
        self.fc1 = Fc(channels, rd_channels, mlp_bias, **dd)
        self.fc2 = Fc(rd_channels, channels, mlp_bias, **dd)
        self.router = Router(2 * channels, router_channels, 2, norm=router_norm, **dd) if fusion == "router" else None
        self.norm = DecisionNorm(2 * channels, QUIET, **dd) if squeeze_norm else None
        self.register_parameter("fusion_logits", nn.Parameter(torch.empty(2, **dd)) if fusion == "static" else None)
        self.temperature = Temperature(temperature, learnable_temperature, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew; with "unit_sigmoid" the result is the identity."""
        reset_convs(self)
        if self.fusion_logits is not None:
            nn.init.zeros_(self.fusion_logits)
        if self.gate == "unit_sigmoid":
            nn.init.zeros_(self.fc2.weight)
            if self.fc2.bias is not None:
                nn.init.zeros_(self.fc2.bias)

    def mask_of(self, s_avg: torch.Tensor, s_max: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The mask (B, C), and the fusion weights (B, 2) or None, of the two squeezes (B, C)."""
        dtype = s_avg.dtype
        batch, channels = s_avg.shape
        if self.norm is not None:
            both = self.norm(torch.cat([s_avg, s_max], 1))
            s_avg, s_max = both[:, :channels], both[:, channels:]
        both = F.relu(self.fc1(torch.cat([s_avg, s_max])))  # (2B, R)
        hidden_avg, hidden_max = both[:batch], both[batch:]  # ONNX cannot fold a dynamic chunk
        weights: Optional[torch.Tensor] = None
        # fc2 is linear and the weights sum to 1, so mixing before it equals mixing after it at half the cost.
        if self.router is not None:
            weights = self.router(torch.cat([s_avg, s_max], 1))  # (B, 2)
            hidden = weights[:, :1] * hidden_avg + weights[:, 1:] * hidden_max
        elif self.fusion_logits is not None:
            mix = as_dtype(self.fusion_logits, dtype).softmax(0)  # (2,)
            hidden = mix[0] * hidden_avg + mix[1] * hidden_max
        else:
            hidden = hidden_avg + hidden_max
        z = self.fc2(hidden)  # (B, C)
        bias = self.fc2.bias
        if self.is_sum and bias is not None:
            z = z + as_dtype(bias, dtype)  # both squeezes carry it
        if self.center:
            z = z - z.mean(1, keepdim=True)
        return apply_gate(z / self.temperature(dtype), self.gate), weights

    def attend(self, x: torch.Tensor) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The mask (B, C, 1, 1) in x's dtype, and the fusion weights (B, 2) or None, of x (B, C, H, W)."""
        dtype = compute_dtype(x)
        mask, weights = self.mask_of(mean_in(x, [2, 3], dtype), as_dtype(x.amax((2, 3)), dtype))
        return as_dtype(mask, x.dtype)[:, :, None, None], weights

    def forward(self, x: torch.Tensor, return_attention: bool = False) -> torch.Tensor:
        """
        Args:
            x: Features (B, C, H, W).
            return_attention: Return (y, mask (B, C, 1, 1), fusion weights (B, 2) or None) instead of y.
        """
        if torch.jit.is_scripting():
            return x * self.attend(x)[0]
        if is_traced(x) and x.tracer.root is not self:
            return as_one_node(self, x)
        with no_autocast(x):
            mask, weights = self.attend(x)
            y = x * mask
        return (y, mask, weights) if return_attention else y
