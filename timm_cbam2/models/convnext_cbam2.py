"""ConvNeXts with CBAM2 on every residual branch, after the MLP and before layer-scale: a twin of each of timm's."""

import sys
from typing import Any, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from timm.models import convnext as timm_convnext
from timm.models.convnext import ConvNeXt, ConvNeXtBlock, checkpoint_filter_fn

from .cbam2 import Cbam2, resolve_options
from .parts_cbam2 import has_hooks
from .residual_cbam2 import branch_end, owns_end
from .saved_cbam2 import TellsOptions
from .twins_cbam2 import (
    attended_stages,
    build_twin,
    register_once,
    twin_cfgs,
    twin_entrypoints,
)
from .weights_cbam2 import OwnNetwork, Weights

__all__ = ["ConvNeXtCbam2", "ConvNeXtCbam2Block"]


class ConvNeXtCbam2Block(ConvNeXtBlock):
    """timm's ConvNeXt block with attention; it is made of one, since timm's stages build their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's output."""
        shortcut = x
        x = self.conv_dw(x)
        if self.use_conv_mlp:
            x = self.mlp(self.norm(x))
        else:
            x = self.mlp(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        if not torch.jit.is_scripting():
            if owns_end(self.attn, x):
                fresh = not any(has_hooks(module) for module in self.mlp.modules())
                return branch_end(self.attn, x, self.shortcut(shortcut), None, self.gamma, self.drop_path, None, fresh)
        x = self.attn(x)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)


class ConvNeXtCbam2(TellsOptions, OwnNetwork, ConvNeXt):
    """timm's ConvNeXt with a CBAM2 block in every residual branch."""

    def __init__(
        self,
        *args: Any,
        cbam2: Optional[Mapping[str, Any]] = None,
        cbam2_stages: Optional[Sequence[int]] = None,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            *args: For timm's class.
            cbam2: Options of every block, see `resolve_options`.
            cbam2_stages: Stages whose blocks carry attention, the first being 0; all by default.
            device: Device of the parameters.
            dtype: Data type of the parameters.
            **kwargs: For timm's class.

        Raises:
            ValueError: For an option that is unknown or not allowed.
        """
        options = resolve_options(cbam2, batch_norm=False)
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.cbam2_options = options
        # After timm's initialiser, which would otherwise walk over the attention too.
        attended = attended_stages(cbam2_stages, len(self.stages))
        for number, (stage, info) in enumerate(zip(self.stages, self.feature_info)):
            for block in stage.blocks if number in attended else ():
                block.__class__ = ConvNeXtCbam2Block
                block.attn = Cbam2(info["num_chs"], **options, device=device, dtype=dtype)


def _remap(weights: Weights, model: nn.Module) -> Weights:
    """Rename the original authors' keys; timm's are taken as they are, so that an error names the file's own keys."""
    return weights if "stem.0.weight" in weights else checkpoint_filter_fn(weights, model)


def _create_convnext_cbam2(variant: str, /, pretrained: bool = False, **kwargs: Any) -> ConvNeXtCbam2:
    arguments = {"feature_cfg": dict(out_indices=(0, 1, 2, 3), flatten_sequential=True), **kwargs}
    return build_twin(ConvNeXtCbam2, f"{variant}_cbam2", pretrained, _remap, **arguments)


_twins = {twin.__name__: twin for twin in twin_entrypoints(timm_convnext, "_create_convnext", _create_convnext_cbam2)}

default_cfgs = twin_cfgs(timm_convnext.default_cfgs, _twins)

register_once(sys.modules[__name__], _twins.values())
