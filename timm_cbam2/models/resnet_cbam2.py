"""ResNets with CBAM2 in timm's attention slot: a twin of every timm ResNet, and the small ResNets for CIFAR.

The CIFAR networks follow section 4.2 of `Deep Residual Learning for Image Recognition`,
https://arxiv.org/abs/1512.03385, with 1x1 convolutions on the shortcuts that change shape.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import get_norm_layer
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models import resnet as timm_resnet
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch.nn.modules.batchnorm import _BatchNorm

from .arguments_cbam2 import refuse_fixed
from .cbam2 import Cbam2, resolve_options
from .residual_cbam2 import BasicBlockCbam2, BottleneckCbam2
from .saved_cbam2 import TellsOptions
from .twins_cbam2 import (
    attended_stages,
    build_twin,
    register_once,
    reset_attention,
    twin_cfgs,
    twin_entrypoints,
)
from .weights_cbam2 import OwnNetwork

__all__ = ["CifarResNet", "CifarResNetCbam2", "ResNetCbam2", "has_batch_norm"]

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)
CIFAR_STAGES = 3
OWN_END = {BasicBlock: BasicBlockCbam2, Bottleneck: BottleneckCbam2}
CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}


def has_batch_norm(norm_layer: Any = None) -> bool:
    """Whether a timm ResNet that is made with this `norm_layer`, None for its own, normalises over the batch."""
    layer = get_norm_layer(nn.BatchNorm2d if norm_layer is None else norm_layer)
    layer = getattr(layer, "func", layer)
    return isinstance(layer, type) and issubclass(layer, _BatchNorm)


class _AttentionSlot(TellsOptions, OwnNetwork, ResNet):
    """Fills timm's attention slot in every residual block of the ResNet it is mixed into."""

    def __init__(
        self,
        *args: Any,
        cbam2: Optional[Mapping[str, Any]] = None,
        cbam2_stages: Optional[Sequence[int]] = None,
        block_args: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            *args: For timm's class.
            cbam2: Options of every block, see `resolve_options`.
            cbam2_stages: Stages whose blocks carry attention, the first being 0; all by default.
            block_args: Further arguments of timm's residual blocks.
            **kwargs: For timm's class.

        Raises:
            ValueError: For an option that is unknown or not allowed, or when `block_args` names another attention.
        """
        if block_args and "attn_layer" in block_args:
            raise ValueError(
                f"block_args attn_layer={block_args['attn_layer']!r} is not allowed: the slot holds CBAM2. "
                "Use the architecture without _cbam2 for another attention layer."
            )
        options = resolve_options(cbam2, batch_norm=has_batch_norm(kwargs.get("norm_layer")))
        super().__init__(*args, block_args={**(block_args or {}), "attn_layer": partial(Cbam2, **options)}, **kwargs)
        self.cbam2_options = options
        stages = [stage for stage in (self.layer1, self.layer2, self.layer3, self.layer4) if len(stage)]
        attended = attended_stages(cbam2_stages, len(stages))
        for number, stage in enumerate(stages):
            for block in stage:
                if number in attended:
                    block.__class__ = OWN_END.get(type(block), type(block))
                else:
                    block.se = None

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """timm's initialisation, then CBAM2's own."""
        super().init_weights(zero_init_last)
        reset_attention(self)


class ResNetCbam2(_AttentionSlot, ResNet):
    """timm's ResNet with a CBAM2 block after the last norm of every residual branch."""


class CifarResNet(ResNet):
    """A ResNet for images of 32x32 pixels: a 3x3 stem of stride 1, three stages of 16, 32 and 64 channels.

    The empty `layer4` lets timm's own forward run as it is.
    """

    def __init__(self, *args: Any, in_chans: int = 3, output_stride: int = 32, device=None, dtype=None, **kwargs: Any):
        """
        Args:
            *args: For timm's ResNet.
            in_chans: Number of input channels.
            output_stride: 2 dilates the last stage instead of striding; 4, the stride of the network, or more changes
                nothing.
            device: Device of the parameters.
            dtype: Data type of the parameters.
            **kwargs: For timm's ResNet.

        Raises:
            ValueError: For another output stride.
        """
        if output_stride not in (2, 4, 8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r} is not allowed; give 2 or 4 for a ResNet of this kind.")
        dd = {"device": device, "dtype": dtype}
        # timm counts a stem of stride 4, this one has 1; a deep stem of width 8 makes the 16 channels it takes in.
        stem = dict(stem_type="deep", stem_width=8, output_stride=8 if output_stride == 2 else 32)
        super().__init__(*args, in_chans=in_chans, **stem, **kwargs, **dd)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        self.layer4 = nn.Sequential()
        for info in self.feature_info[1:]:
            info["reduction"] //= 4
        self.feature_info[0]["reduction"] = 1

    def forward_intermediates(
        self, x: torch.Tensor, indices: Optional[Union[int, List[int]]] = None, **kwargs: Any
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """As timm's, over the stem and three stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Last n features if int, all if None, those named if a list.
            **kwargs: Further arguments of timm's `ResNet.forward_intermediates`.
        """
        taken, _ = feature_take_indices(CIFAR_STAGES + 1, indices)
        return super().forward_intermediates(x, taken, **kwargs)

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """As timm's, over the stem and three stages: drop the stages after the last feature asked for."""
        taken, last = feature_take_indices(CIFAR_STAGES + 1, indices)
        if last < CIFAR_STAGES:
            super().prune_intermediate_layers(taken, prune_norm, prune_head)
        elif prune_head:
            self.reset_classifier(0, "")
        return taken


class CifarResNetCbam2(_AttentionSlot, CifarResNet):
    """A CIFAR ResNet with a CBAM2 block after the last norm of every residual branch."""


def _create_resnet_cbam2(variant: str, /, pretrained: bool = False, **kwargs: Any) -> ResNetCbam2:
    return build_twin(ResNetCbam2, f"{variant}_cbam2", pretrained, **kwargs)


def _create_cifar(variant: str, /, pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    refuse_fixed(variant, kwargs, "block", "layers", "channels", "stem_type", "stem_width")
    depth = CIFAR_DEPTHS[variant.removesuffix("_cbam2")]
    arguments = dict(
        block=BasicBlock,
        layers=(depth,) * CIFAR_STAGES,
        channels=(16, 32, 64),
        **{"feature_cfg": dict(out_indices=(0, 1, 2, 3)), **kwargs},
    )
    if variant.endswith("_cbam2"):
        if pretrained and not isinstance(kwargs.get("pretrained_cfg"), Mapping):  # a folder tells its own options
            cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
            arguments["cbam2"] = {**_shipped_options(cfg.file), **(kwargs.get("cbam2") or {})}
        return build_twin(CifarResNetCbam2, variant, pretrained, **arguments)
    return build_model_with_cfg(CifarResNet, variant, pretrained, **arguments)


def _cifar_entrypoint(name: str):
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
        return _create_cifar(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    attention = " with a CBAM2 block in every residual branch" if name.endswith("_cbam2") else ""
    entrypoint.__doc__ = f"The CIFAR {name.removesuffix('_cbam2').replace('resnet', 'ResNet-')}{attention}."
    return entrypoint


def _cifar_cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def _shipped_options(weights: Optional[str]) -> Dict[str, Any]:
    """The attention that weights were trained with, by the config.json beside them; nothing where there is none."""
    config = Path(weights).with_name("config.json") if weights else None
    if config is None or not config.is_file():
        return {}
    arguments = json.loads(config.read_text(encoding="utf-8")).get("model_args") or {}
    return resolve_options(arguments.get("cbam2"), saved=True)


def _by_tag(weights: Path) -> Tuple[str, int]:
    """For sorting, newest version first: weights behind a tag never change, better ones get `tag_v2` and so on."""
    tag = weights.parent.name.partition(".")[2]
    older, found, version = tag.rpartition("_v")
    return (older, -int(version)) if found and version.isdecimal() else (tag, -1)


def _shipped_cfgs(name: str) -> Dict[str, Any]:
    """Configurations of the weights that come with this package, by `name.tag`, the default first.

    In a wheel they lie in the package, in a source checkout beside it; as remote code there are none.
    """
    package = Path(__file__).parent.parent
    found: Dict[str, Any] = {}
    for root in (package.parent, package):
        for weights in sorted(root.glob(f"checkpoints/{name}.*/model.safetensors"), key=_by_tag):
            config = json.loads(weights.with_name("config.json").read_text(encoding="utf-8"))
            cfg = {
                key: tuple(value) if isinstance(value, list) else value  # as timm's own configurations have them
                for key, value in config["pretrained_cfg"].items()
                if key != "tag"
            }
            found[weights.parent.name] = _cifar_cfg(**cfg, label_names=config.get("label_names"), file=str(weights))
    return found


_twins = {twin.__name__: twin for twin in twin_entrypoints(timm_resnet, "_create_resnet", _create_resnet_cbam2)}
_cifar_names = [name + suffix for name in CIFAR_DEPTHS for suffix in ("", "_cbam2")]

default_cfgs = {
    **twin_cfgs(timm_resnet.default_cfgs, _twins),
    **generate_default_cfgs(
        {key: cfg for name in _cifar_names for key, cfg in (_shipped_cfgs(name) or {name: _cifar_cfg()}).items()}
    ),
}

register_once(sys.modules[__name__], [*_twins.values(), *(_cifar_entrypoint(name) for name in _cifar_names)])
