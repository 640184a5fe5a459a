"""CBAM2 attention for timm's ResNets and ConvNeXts; importing it registers them with timm and transformers."""

import gc
import os
import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Importing torch and transformers makes hundreds of thousands of objects and no garbage to speak of: looking for it,
# again and again, would take a fifth of the time.
_collects = gc.isenabled()
gc.disable()
try:
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        TimmWrapperImageProcessor,
    )

    from .models.cbam2 import Cbam2, CbamAttention, ChannelAttn, SpatialAttn, record_attention, resolve_options
    from .models.configuration_cbam2 import Cbam2Config
    from .models.convnext_cbam2 import ConvNeXtCbam2
    from .models.modeling_cbam2 import Cbam2Backbone, Cbam2ForImageClassification, Cbam2Model
    from .models.resnet_cbam2 import CifarResNet, CifarResNetCbam2, ResNetCbam2
finally:
    if _collects:
        gc.enable()

if TYPE_CHECKING:  # the same names as in _LAZY
    from .hub.folder import save
    from .hub.zoo import suggest
    from .insertion.insert import insert
    from .insertion.remove import remove
    from .insertion.saved import load_inserted
    from .kernels.cpu import disable_cpu_kernel, enable_cpu_kernel
    from .kernels.triton import disable_triton_kernel, enable_triton_kernel
    from .models.weights_cbam2 import undecayed
    from .seeing.explain import explain
    from .training.optimise import freeze

__version__ = "0.1.0"

__all__ = [
    "Cbam2",
    "Cbam2Backbone",
    "Cbam2Config",
    "Cbam2ForImageClassification",
    "Cbam2Model",
    "CbamAttention",
    "ChannelAttn",
    "CifarResNet",
    "CifarResNetCbam2",
    "ConvNeXtCbam2",
    "ResNetCbam2",
    "SpatialAttn",
    "disable_cpu_kernel",
    "disable_triton_kernel",
    "enable_cpu_kernel",
    "enable_triton_kernel",
    "explain",
    "freeze",
    "insert",
    "load_inserted",
    "record_attention",
    "remove",
    "resolve_options",
    "save",
    "suggest",
    "undecayed",
]

# Not needed to build a model, so not imported with it.
_LAZY = {
    "disable_cpu_kernel": ".kernels.cpu",
    "disable_triton_kernel": ".kernels.triton",
    "enable_cpu_kernel": ".kernels.cpu",
    "enable_triton_kernel": ".kernels.triton",
    "explain": ".seeing.explain",
    "freeze": ".training.optimise",
    "insert": ".insertion.insert",
    "load_inserted": ".insertion.saved",
    "remove": ".insertion.remove",
    "save": ".hub.folder",
    "suggest": ".hub.zoo",
    "undecayed": ".models.weights_cbam2",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# Where these lay before the package had rooms: models and settings that were pickled whole name them so.
for _name in ("cbam2", "channel_cbam2", "configuration_cbam2", "convnext_cbam2", "modeling_cbam2"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[f"{__name__}.models.{_name}"]
for _name in ("parts_cbam2", "resnet_cbam2", "spatial_cbam2"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[f"{__name__}.models.{_name}"]


# exist_ok: this package may be imported again, or after a model repository's own copy of these classes.
AutoConfig.register(Cbam2Config.model_type, Cbam2Config, exist_ok=True)
AutoModel.register(Cbam2Config, Cbam2Model, exist_ok=True)
AutoModelForImageClassification.register(Cbam2Config, Cbam2ForImageClassification, exist_ok=True)
AutoBackbone.register(Cbam2Config, Cbam2Backbone, exist_ok=True)
# timm's transforms take pictures and tensors alike, so no backend has to fall back to another one.
AutoImageProcessor.register(
    Cbam2Config,
    image_processor_classes=dict.fromkeys(("torchvision", "pil"), TimmWrapperImageProcessor),
    exist_ok=True,
)
for _name in ("cpu", "triton"):
    if os.environ.get(f"TIMM_CBAM2_{_name.upper()}_KERNEL") == "1":
        try:
            getattr(import_module(f".kernels.{_name}", __name__), f"enable_{_name}_kernel")()
        except RuntimeError as error:
            warnings.warn(str(error), stacklevel=2)
