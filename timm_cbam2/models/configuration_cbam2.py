"""One `config.json` that timm and transformers both read: timm's own fields, completed with transformers'."""

import difflib
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, ClassVar

import torch.nn as nn
from huggingface_hub.dataclasses import strict
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models._pretrained import filter_pretrained_cfg
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .arguments_cbam2 import MAX_CLASSES, check_config, check_pretrained_cfg
from .cbam2 import resolve_options
from .convnext_cbam2 import ConvNeXtCbam2
from .resnet_cbam2 import ResNetCbam2, has_batch_norm
from .saved_cbam2 import write_config
from .weights_cbam2 import WARM_START

# isort: split
# All else that these need: of a folder, older versions of transformers take along only what this file names itself.
from .channel_cbam2 import ChannelAttn  # noqa: F401
from .compiled_cbam2 import apply_masks  # noqa: F401
from .decisions_cbam2 import DecisionNorm  # noqa: F401
from .dense_cbam2 import coordinate_rows  # noqa: F401
from .fused_cbam2 import fused  # noqa: F401
from .fusible_cbam2 import may_fuse  # noqa: F401
from .options_cbam2 import check_options  # noqa: F401
from .parts_cbam2 import Temperature  # noqa: F401
from .passes_backward_cbam2 import TorchBackward  # noqa: F401
from .passes_cbam2 import passes_for  # noqa: F401
from .pieces_cbam2 import chunks_of  # noqa: F401
from .reach_cbam2 import promptly  # noqa: F401
from .residual_cbam2 import branch_end  # noqa: F401
from .small_backward_cbam2 import ChannelByHand  # noqa: F401
from .small_cbam2 import channel_mask  # noqa: F401
from .small_networks_cbam2 import networks_for  # noqa: F401
from .spatial_cbam2 import SpatialAttn  # noqa: F401
from .twins_cbam2 import entrypoint_arguments  # noqa: F401

__all__ = ["Cbam2Config", "architectures", "entrypoint"]

# As remote code these modules are no package's attributes, and timm's registry may hold another copy of them.
_FAMILIES = [sys.modules[cls.__module__] for cls in (ResNetCbam2, ConvNeXtCbam2)]
HEAD = "Cbam2ForImageClassification"
# They would make timm fetch or change something behind the configuration's back.
_REFUSED_ARGS = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
}


def architectures() -> list[str]:
    """Every architecture that a `Cbam2Config` may name."""
    return sorted(name for family in _FAMILIES for name in family.default_cfgs if name.endswith("_cbam2"))


def entrypoint(architecture: str) -> Callable[..., nn.Module]:
    """The function that builds `architecture`; it is timm's entrypoint, called without its registry.

    Raises:
        ValueError: For a name that is not one of `architectures()`.
    """
    for family in _FAMILIES:
        if isinstance(architecture, str) and architecture.endswith("_cbam2") and architecture in family.default_cfgs:
            return getattr(family, architecture)
    close = difflib.get_close_matches(str(architecture), architectures(), 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    if f"{architecture}_cbam2" in architectures():
        hint = f"; {architecture}_cbam2 starts from plain weights of {architecture} with warm_start=True"
    raise ValueError(f"Unknown architecture {str(architecture)[:80]!r} in a cbam2 configuration{hint}")


def _default_cfg(architecture: str) -> dict[str, Any]:
    """timm's description of the input and the layers, without where to get weights."""
    family = sys.modules[entrypoint(architecture).__module__]
    cfg = filter_pretrained_cfg(family.default_cfgs[architecture].default.to_dict(), remove_source=True)
    for name in ("architecture", "tag", "label_names", "label_descriptions"):  # an architecture has no weights
        cfg.pop(name, None)
    return cfg


@functools.cache
def _imagenet_names(num_classes: int) -> list[str] | None:
    """English class names where the number of classes tells the ImageNet set, as timm and its wrapper infer them."""
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return ImageNetInfo(subset).label_descriptions() if subset else None


def _checked_count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_CLASSES:
        raise ValueError(f"num_classes={str(value)[:40]} is not allowed; give a number from 0 to {MAX_CLASSES:,}.")
    return value


def _has_batch_norm(architecture: str, arguments: dict[str, Any]) -> bool:
    if "convnext" in architecture or "gn" in architecture.split("_"):
        return False
    return has_batch_norm(arguments.get("norm_layer"))


def _json(value: Any) -> Any:
    """What `value` reads as after a trip through a file: lists for tuples."""
    return json.loads(json.dumps(value))


@strict
class Cbam2Config(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a CBAM2 network.

    Args:
        architecture: Name of a registered architecture, such as "resnet50_cbam2".
        model_args: Arguments of timm's entrypoint, such as `in_chans`; the key "cbam2" holds the options of every
            block, see `resolve_options`. Absent options are filled in, so that a saved file is complete.
        pretrained_cfg: timm's description of the expected input (size, mean, std, crop) and of the layers.
        out_features: Stages that `Cbam2Backbone` returns, from `stage_names`.
        out_indices: The same as indices, which are timm's for `features_only`: 0 is the stem of a ResNet, and the
            first stage of a ConvNeXt.
        num_classes: timm's name of `num_labels`; 0 in the file of a model that has no classifier.
        label_names: timm's name of the values of `id2label`.

    Raises:
        ValueError: For an unknown architecture, or an option or a number of classes that is not allowed.
    """

    model_type: ClassVar[str] = "cbam2"

    architecture: str = "resnet50_cbam2"
    model_args: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        default_cfg = _default_cfg(self.architecture)
        check_pretrained_cfg(self.pretrained_cfg)
        self.pretrained_cfg = _json(dict(self.pretrained_cfg or default_cfg))
        arguments = dict(self.model_args or {})
        arguments.pop("num_classes", None)  # timm 1.0.31 writes it here too
        refused = sorted(arguments.keys() & _REFUSED_ARGS)
        if refused:
            raise ValueError(f"model_args {refused[0]!r} is not allowed in a cbam2 configuration; leave it out.")
        options = resolve_options(arguments.get("cbam2"), batch_norm=_has_batch_norm(self.architecture, arguments))
        self.model_args = {**arguments, "cbam2": _json(options)}
        if arguments.get("in_chans"):
            size = self.pretrained_cfg.get("input_size") or default_cfg["input_size"]
            self.pretrained_cfg["input_size"] = [arguments["in_chans"], *size[1:]]

        kwargs = self._read_labels(kwargs, default_cfg["num_classes"])
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        kwargs.pop("stage_names", None)
        info = getattr(sys.modules[entrypoint(self.architecture).__module__], "CIFAR_DEPTHS", {})
        stages = 3 if self.architecture.removesuffix("_cbam2") in info else 4
        has_stem = "convnext" not in self.architecture  # timm's ConvNeXt does not offer its stem as a feature
        self.stage_names = ["stem"] * has_stem + [f"stage{i + 1}" for i in range(stages)]
        self.set_output_features_output_indices(out_features, out_indices)
        super().__post_init__(**kwargs)

    def _read_labels(self, kwargs: dict[str, Any], default_classes: int) -> dict[str, Any]:
        """Settle `id2label` from what each library calls the number and the names of the classes."""
        given = kwargs.pop("num_labels", None)
        in_file = kwargs.pop("num_classes", None)
        names = kwargs.pop("label_names", None) or (self.pretrained_cfg or {}).get(
            "label_names"
        )  # timm may leave them there
        if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
            names = [names[key] for key in sorted(names, key=int)]
        if names and not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"label_names={str(names)[:80]} is not allowed; give a list of texts.")
        if in_file is not None:
            _checked_count(in_file)
        named = getattr(self, "id2label", None)
        if named is not None and given in (None, len(named)):
            _checked_count(len(named))
            return kwargs
        count = _checked_count(next(n for n in (given, in_file, default_classes) if n is not None))
        self.label2id = None
        if given is not None and given != in_file:
            names = None
        elif not names or len(names) != count:
            names = _imagenet_names(count)
        names = names or [f"LABEL_{i}" for i in range(count)]
        self.id2label = dict(enumerate(names))
        self.label2id = {name: index for index, name in enumerate(names)} if len(set(names)) == count else None
        return kwargs

    @classmethod
    def from_timm(cls, model: nn.Module) -> "Cbam2Config":
        """The configuration of a timm model, as timm itself would write it.

        Raises:
            ValueError: For a model that is not a CBAM2 one.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.json"
            write_config(model, path)
            written = json.loads(path.read_text(encoding="utf-8"))
        # timm writes no rates of dropping, which are of a training: it may go on in transformers.
        arguments = {**getattr(model, "_model_args", {}), **written.get("model_args", {})}
        return cls.from_dict({**written, "model_args": arguments})

    @classmethod
    def of_twin(cls, name: Any, **kwargs: Any) -> tuple["Cbam2Config", dict[str, Any]] | None:
        """The configuration of the CBAM2 twin of a plain timm model, and those of `kwargs` that it does not take.

        Args:
            name: Folder or Hub id of a model that timm saved.
            **kwargs: For `from_pretrained`.

        Returns:
            None where `name` is no such model.
        """
        of_the_hub = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
        found, _ = cls.get_config_dict(name, **{key: kwargs[key] for key in of_the_hub if key in kwargs})
        plain = found.get("architecture")
        if not isinstance(plain, str) or f"{plain}_cbam2" not in architectures():
            return None
        cfg = dict(found.get("pretrained_cfg") or {})
        found |= {"architecture": f"{plain}_cbam2", "pretrained_cfg": {**cfg, "tag": WARM_START + cfg.get("tag", "")}}
        arguments = dict(found.get("model_args") or {})
        batch_norm = _has_batch_norm(plain, arguments)  # by today's defaults, since the attention is new
        options = resolve_options(arguments.get("cbam2"), batch_norm=batch_norm)
        found["model_args"] = {**arguments, "cbam2": options}
        return cls.from_dict(found, return_unused_kwargs=True, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', which looks at few of the values.

        Raises:
            ValueError: Naming the key whose value is not allowed.
        """
        check_config(config_dict)
        arguments = dict(config_dict.get("model_args") or {})
        arguments["cbam2"] = resolve_options(arguments.get("cbam2"), saved=True)
        config_dict = {**config_dict, "model_args": arguments}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As transformers', which takes a file that plain timm wrote for one of its own wrapper's."""
        config, kwargs = super().get_config_dict(*args, **kwargs)
        if config.get("model_type") == "timm_wrapper":
            config["model_type"] = cls.model_type
        return config, kwargs

    def to_dict(self) -> dict[str, Any]:
        """The contents of `config.json`, for both libraries."""
        out = super().to_dict()
        has_head = (self.architectures or [HEAD])[0] == HEAD
        names = list(self.id2label.values())
        out["num_classes"] = self.num_labels if has_head else 0
        if has_head and names == _imagenet_names(self.num_labels):
            out.pop("id2label"), out.pop("label2id")  # both libraries infer them
        else:
            unique = len(set(names)) == len(names)
            out["label2id"] = {name: index for index, name in self.id2label.items()} if unique else None
            if has_head and names != [f"LABEL_{i}" for i in range(len(names))]:
                out["label_names"] = names
        cfg = out["pretrained_cfg"]
        for name in ("label_names", "label_descriptions"):
            cfg.pop(name, None)
        if str(cfg.get("tag", "")).startswith(WARM_START):
            del cfg["tag"]  # says that the weights are timm's own, without attention
        cfg["num_classes"] = out["num_classes"]
        out["image_processor_type"] = "TimmWrapperImageProcessor"
        out.pop("stage_names", None)
        if out.get("out_indices") == [len(self.stage_names) - 1]:
            out.pop("out_indices"), out.pop("out_features")
        if self._auto_class is None:
            out.pop("auto_map", None)  # names files that this library does not copy
        return out
