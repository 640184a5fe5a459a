"""What the three transformers models share: building timm's network, and loading that is strict."""

import re
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.initialization import guard_torch_init_functions

from .arguments_cbam2 import naming
from .cbam2 import CbamAttention, is_cbam2, record_attention
from .configuration_cbam2 import Cbam2Config, entrypoint
from .reach_cbam2 import promptly
from .weights_cbam2 import require_safetensors

__all__ = ["Attentions", "Cbam2PreTrainedModel"]

Attentions = Tuple[CbamAttention, ...]


class Cbam2PreTrainedModel(PreTrainedModel):
    """What the three models share: building timm's network, and files whose keys are timm's."""

    config_class = Cbam2Config
    config: Cbam2Config
    base_model_prefix = "timm_model"  # transformers adds it to the keys of a file that lacks it
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    model_tags = ["timm", "cbam2"]
    _no_split_modules = ["BasicBlock", "Bottleneck", "ConvNeXtCbam2Block"]

    def _build(self, num_classes: int) -> None:
        config = self.config
        arguments = dict(config.model_args or {})
        with naming(config.architecture, config.model_args):
            self.timm_model = entrypoint(config.architecture)(pretrained=False, num_classes=num_classes, **arguments)
        self.timm_model._model_args = arguments  # as timm's factory does, for its own save
        cfg = self.timm_model.pretrained_cfg
        cfg.update(config.pretrained_cfg, architecture=config.architecture, num_classes=num_classes)
        classifier = cfg.get("classifier")
        self._classifier_keys = {f"timm_model.{classifier}.{part}" for part in ("weight", "bias")}
        if num_classes == 0:
            self._keys_to_ignore_on_load_unexpected = [rf"(^|\.){re.escape(str(classifier))}\.(weight|bias)$"]
        self.post_init()

    def init_weights(self) -> None:
        """Nothing to do: timm's constructor has initialised the network."""

    @torch.no_grad()
    @guard_torch_init_functions()  # leaves alone what came from a file
    def initialize_weights(self) -> None:
        """Initialise what a file lacked: a new classifier as timm's `reset_classifier` does, or the attention.

        transformers' own walk passes over modules without direct parameters, so that no block would be reset as one.
        """
        for module in self.timm_model.modules():
            if is_cbam2(module):
                module.reset_parameters()
        classifier = self.timm_model.get_classifier()
        if isinstance(classifier, nn.Linear):
            classifier.reset_parameters()

    @classmethod
    def from_timm(cls, model: nn.Module) -> "Cbam2PreTrainedModel":
        """Take over a timm model with its weights, such as one from `timm.create_model("resnet50_cbam2.from_a1_in1k")`.

        Args:
            model: A CBAM2 model; its weights are copied.

        Raises:
            ValueError: For a model that is not a CBAM2 one, or one without a classifier where this class has one.
        """
        if not hasattr(model, "cbam2_options"):
            raise ValueError(f"{type(model).__name__} is not a CBAM2 model; create one named '…_cbam2'.")
        wrapper = cls(Cbam2Config.from_timm(model))
        weights = model.state_dict()
        own = wrapper.timm_model.state_dict()
        classifier = {key.removeprefix("timm_model.") for key in wrapper._classifier_keys}
        wrapper.timm_model.load_state_dict({k: v for k, v in weights.items() if k in own or k not in classifier})
        like = next(model.parameters())
        return wrapper.to(device=like.device, dtype=like.dtype).train(model.training)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, warm_start: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers', but strict: transformers only warns when a network is partly random.

        Args:
            pretrained_model_name_or_path: Folder or Hub id, saved by timm, by transformers or by `timm_cbam2.save`.
            *model_args: For transformers.
            warm_start: Accept a file without any attention, also of a plain timm model, which then starts anew (the
                identity, by default).
            **kwargs: For transformers.

        Raises:
            ValueError: When weights of the backbone are missing or misshapen, or some are unexpected; they are named.
                When there are no safetensors weights, or damaged ones. When
                `device_map` offloads: several small kernels run as one, past the hooks that would fetch them.
            OSError: When they cannot be fetched.
        """
        with_info = kwargs.pop("output_loading_info", False)
        other_classes = kwargs.pop("ignore_mismatched_sizes", False)  # transformers would redraw any weight for it
        kwargs.setdefault("use_safetensors", True)  # a pickle can run code
        name = pretrained_model_name_or_path
        with promptly(name is not None and not Path(name).is_dir()):
            _require_safetensors(name, kwargs)
            if warm_start and name is not None and kwargs.get("config") is None:
                twin = cls.config_class.of_twin(name, **kwargs)
                if twin is not None:
                    kwargs = {**twin[1], "config": twin[0]}
            try:
                model, info = super().from_pretrained(
                    name, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
                )
            except SafetensorError as error:
                raise ValueError(f"The weights of {name} are damaged or cut off ({error}). Get them again.") from error
        _refuse_offloading(model)
        problems, hint = _problems(model, info, warm_start, other_classes)
        if problems:
            raise ValueError(f"The weights in {name} do not fit {model.config.architecture}: {problems}.{hint}")
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                # Views of the mapped file lie unaligned, for which kernels round in another order than for timm's.
                tensor.data = tensor.data.clone()
        return (model, info) if with_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Optional[Dict[str, torch.Tensor]] = None,
        **kwargs: Any,
    ) -> None:
        """As transformers', with timm's keys in the file, so that timm opens the folder too."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        state_dict = {key.removeprefix("timm_model."): value for key, value in state_dict.items()}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def load_state_dict(self, state_dict: Dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """As torch's, also with timm's keys: `Trainer` gives the contents of a saved file when it resumes."""
        prefix = "timm_model."
        state_dict = {key if key.startswith(prefix) else prefix + key: value for key, value in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _set_gradient_checkpointing(self, enable: bool = True, every_n_layers: int = 1, **kwargs: Any) -> None:
        if enable and every_n_layers != 1:
            raise ValueError(
                f"every_n_layers={every_n_layers} is not allowed: timm checkpoints every block; leave it out."
            )
        self.timm_model.set_grad_checkpointing(enable)

    def get_input_embeddings(self) -> None:
        """None: images are not embedded."""
        return None

    def _wanted(self, output_attentions: Optional[bool], output_hidden_states: Optional[bool]) -> Tuple[bool, bool]:
        config = self.config
        return (
            bool(config.output_attentions if output_attentions is None else output_attentions),
            bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states),
        )

    def _features(
        self, pixel_values: torch.Tensor, with_attentions: bool, with_hidden_states: bool
    ) -> Tuple[torch.Tensor, Optional[Tuple[torch.Tensor, ...]], Optional[Attentions]]:
        """The last map (B, C, H, W), all maps, and what each block decided."""
        if with_attentions:
            record = self._recorded_features
            if torch.compiler.is_compiling():
                record = torch.compiler.disable(record)  # hooks added after compiling never fire
            return record(pixel_values, with_hidden_states)
        pixel_values = pixel_values.to(self.dtype)
        if with_hidden_states:
            last, maps = self.timm_model.forward_intermediates(pixel_values)
            return last, tuple(maps), None
        return self.timm_model.forward_features(pixel_values), None, None

    def _recorded_features(self, pixel_values: torch.Tensor, with_hidden_states: bool) -> Any:
        with record_attention(self.timm_model) as records:
            last, maps, _ = self._features(pixel_values, False, with_hidden_states)
        return last, maps, tuple(records.values())


def _require_safetensors(name: Any, kwargs: Dict[str, Any]) -> None:
    if name is None or kwargs.get("subfolder") or kwargs.get("variant"):
        return
    wanted = ("revision", "token", "cache_dir", "local_files_only", "force_download")
    try:
        require_safetensors(name, **{key: kwargs[key] for key in wanted if kwargs.get(key)})
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise OSError(f"{name} is no folder and not in the cache, and the Hub cannot be reached. Go online.") from error
    except HTTPError as error:
        raise OSError(f"The weights of {name} could not be fetched ({error}). Try again.") from error


def _refuse_offloading(model: nn.Module) -> None:
    devices = set(getattr(model, "hf_device_map", {}).values())
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError("Weights of CBAM2 models cannot be offloaded: give a device_map without disk or spare cpu.")


def _problems(model: Any, info: Dict[str, Any], warm_start: bool, other_classes: bool) -> Tuple[str, str]:
    """What did not fit when weights were loaded, and what to do about it; both empty where all fits.

    Args:
        model: The loaded model.
        info: What transformers tells of the loading.
        warm_start: Whether attention may be missing altogether.
        other_classes: Whether the classifier may have another shape.
    """
    missing = set(info["missing_keys"]) - model._classifier_keys
    attention = {
        f"{name}.{key}" for name, block in model.named_modules() if is_cbam2(block) for key in block.state_dict()
    }
    if warm_start and attention <= missing:
        missing -= attention
    misshapen = {
        f"{key} has shape {tuple(found)}, not {tuple(wanted)}"
        for key, found, wanted in info["mismatched_keys"]
        if not (other_classes and key in model._classifier_keys)
    }
    kinds = (("missing", missing), ("unexpected", set(info["unexpected_keys"])), ("misshapen", misshapen))
    problems = [
        f"{what}: {', '.join(sorted(key.removeprefix('timm_model.') for key in keys)[:5])} ({len(keys)} in all)"
        for what, keys in kinds
        if keys
    ]
    hint = " For weights without attention, pass warm_start=True." if attention <= missing else ""
    if not other_classes and {key for key, *_ in info["mismatched_keys"]} & model._classifier_keys:
        hint += " For a new classifier, pass ignore_mismatched_sizes=True."
    return "; ".join(problems), hint
