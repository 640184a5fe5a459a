"""torchvision's residual blocks with attention after the last norm, before the add; each is made of one of theirs."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from ..models.parts_cbam2 import has_hooks
from ..models.residual_cbam2 import branch_end, owns_end

__all__ = ["BasicBlockCbam2", "BottleneckCbam2"]


class BasicBlockCbam2(BasicBlock):
    """torchvision's BasicBlock with CBAM2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's output."""
        z = self.conv2(self.relu(self.bn1(self.conv1(x))))
        shortcut = x if self.downsample is None else self.downsample(x)
        if not torch.jit.is_scripting():
            if owns_end(self.cbam2, z):
                fresh = type(self.conv2) is nn.Conv2d and not has_hooks(self.conv2)
                return branch_end(self.cbam2, z, shortcut, self.bn2, act=self.relu, fresh=fresh)
        return self.relu(self.cbam2(self.bn2(z)) + shortcut)


class BottleneckCbam2(Bottleneck):
    """torchvision's Bottleneck with CBAM2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's output."""
        z = self.relu(self.bn1(self.conv1(x)))
        z = self.conv3(self.relu(self.bn2(self.conv2(z))))
        shortcut = x if self.downsample is None else self.downsample(x)
        if not torch.jit.is_scripting():
            if owns_end(self.cbam2, z):
                fresh = type(self.conv3) is nn.Conv2d and not has_hooks(self.conv3)
                return branch_end(self.cbam2, z, shortcut, self.bn3, act=self.relu, fresh=fresh)
        return self.relu(self.cbam2(self.bn3(z)) + shortcut)
