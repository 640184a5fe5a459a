"""torchvision's residual blocks with attention after the last norm, before the add; each is made of one of theirs."""

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck

__all__ = ["BasicBlockCbam2", "BottleneckCbam2"]


class BasicBlockCbam2(BasicBlock):
    """torchvision's BasicBlock with CBAM2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.cbam2(self.bn2(self.conv2(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class BottleneckCbam2(Bottleneck):
    """torchvision's Bottleneck with CBAM2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's output."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.cbam2(self.bn3(self.conv3(out)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)
