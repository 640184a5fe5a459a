"""Random weights that leave nothing at its special starting value.

A fresh network hides mistakes: timm zeroes each branch's last norm and starts layer-scale at 1e-6, and CBAM2 starts at
the identity, so attention of any kind would give the same logits.
"""

import torch
import torch.nn as nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter and every BatchNorm statistic of `model`, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        saved = model.state_dict()  # leaves constants, such as blur filters, as they are
        for name, tensor in saved.items():
            if not tensor.is_floating_point():
                continue
            scale = tensor.ndim == 1 and name.endswith(("weight", "gamma", "running_var"))
            if scale:  # norms and layer-scale
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            else:
                fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 4
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan_in**0.5)
            if name.endswith("temperature.value"):
                tensor.abs_().add_(0.5)
    return model
