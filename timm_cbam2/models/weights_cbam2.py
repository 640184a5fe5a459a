"""Weights before timm loads them: they fit, or are refused by name; a warm start is completed with the attention."""

import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Set

import torch
import torch.nn as nn
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from .cbam2 import Cbam2, is_cbam2, made_with
from .saved_cbam2 import OLD_TIMM, input_channels

__all__ = [
    "WARM_START",
    "OwnNetwork",
    "Weights",
    "check_source",
    "check_weights",
    "needs_attention",
    "require_safetensors",
    "undecayed",
]

WARM_START = "from_"  # prefix of the tags whose weights are timm's own
Weights = Dict[str, torch.Tensor]


class OwnNetwork(nn.Module):
    """A mixin of all networks of ours, as timm's and torch's own machinery sees them."""

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Weights that timm's optimizers are not to decay: the attention's, see `undecayed`."""
        return undecayed(self)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; where the attention is at the identity, the twin's weights fit strictly too, with a warning.

        So `checkpoint_path=` of `timm.create_model` takes the twin's file.
        """
        own = super().state_dict()
        attention = _attention_keys(self)
        if strict and state_dict.keys() == own.keys() - attention and _is_identity(self):
            warnings.warn(
                "These weights have no attention: it stays the identity, and the network computes what they did "
                "without it.",
                stacklevel=2,
            )
            state_dict = {**state_dict, **{key: own[key] for key in attention}}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def undecayed(model: nn.Module) -> Set[str]:
    """Names of the weights of all CBAM2 blocks that weight decay would put to sleep.

    Decay is balanced by the gradient. That of a decision which hardly matters yet is small, and SGD shrinks its weights
    to a twenty-fifth within a few epochs; what stands before a norm ends below the norm's epsilon, and the router
    answers alike for ever.
    """
    blocks = [(name, block) for name, block in model.named_modules() if is_cbam2(block)]
    names = {f"{name}.{key}" for name, block in blocks for key, p in block.named_parameters() if p.dim() > 1}
    return {name.removeprefix(".") for name in names}


def _is_identity(model: nn.Module) -> bool:
    """Whether every block multiplies by 1, whatever it is given."""
    for block in model.modules():
        if isinstance(block, Cbam2):
            last = [block.channel.fc2, *(branch.pw for branch in block.spatial.branches)]
            if block.channel.gate != "unit_sigmoid" or block.spatial.conv is not None:
                return False
            if any(parameter.detach().any() for layer in last for parameter in layer.parameters()):
                return False
    return True


def _attention_keys(model: nn.Module) -> Set[str]:
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Cbam2))
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def _hint(unexpected: Set[str]) -> str:
    """What a folder that does not tell its network's options, as timm before 1.0.31 saves it, was made with."""
    for key, on in (("router.norm.weight", True), ("spatial.router.fc2.bias", False)):
        if any(name.endswith(key) for name in unexpected):
            return f" They may be of a network with {made_with(on)}: give that; timm_cbam2.save keeps it."
    return ""


def _listed(keys: Set[str]) -> str:
    shown = sorted(keys)[:5]
    return ", ".join(shown) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def needs_attention(cfg: Any, tag: Optional[str]) -> bool:
    """Whether the weights were trained with attention: those of a model folder, or of a tag that is no warm start."""
    if isinstance(cfg, Mapping) and cfg.get("source") in ("hf-hub", "local-dir"):
        return True
    return bool(tag and not tag.startswith(WARM_START))


def check_weights(weights: Weights, model: nn.Module, remap: Optional[Callable], trained: bool) -> Weights:
    """Refuse weights that do not fit, and complete a warm start with the attention the model was built with.

    timm's loader turns lenient as soon as the number of classes differs, so strictness is enforced here, before it.

    Args:
        weights: By name, as read.
        model: What they are for.
        remap: Renames foreign weights to timm's keys, called with (weights, model).
        trained: Whether they must have attention, see `needs_attention`.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape; each is named.
    """
    cfg = model.pretrained_cfg
    if remap is not None:
        weights = remap(weights, model)
    weights = dict(weights)
    own = model.state_dict()
    attention = _attention_keys(model)
    classifier = {f"{cfg['classifier']}.{part}" for part in ("weight", "bias")} if cfg.get("classifier") else set()
    first_conv = f"{cfg.get('first_conv')}.weight"

    warm_start = not trained and not attention & weights.keys()
    optional = set(attention) if warm_start else set()
    if (cfg.get("tag") or "").endswith("fcmae"):
        optional |= {key for key in own if key.startswith("head.norm.")}  # as in timm
    if cfg["num_classes"] != model.num_classes:
        optional |= classifier
    missing = own.keys() - weights.keys() - optional
    unexpected = weights.keys() - own.keys()
    if cfg["num_classes"] != model.num_classes:
        unexpected -= classifier
    adapted = {first_conv} if cfg["input_size"][0] != input_channels(model) else set()
    if cfg["num_classes"] != model.num_classes or cfg.get("label_offset"):
        adapted |= classifier  # timm drops or shortens it
    reshaped = {k for k in own.keys() & weights.keys() - adapted if own[k].shape != weights[k].shape}

    problems = [f"missing: {_listed(missing)}"] if missing else []
    problems += [f"unexpected: {_listed(unexpected)}"] if unexpected else []
    problems += [f"{k}: shape {tuple(weights[k].shape)}, not {tuple(own[k].shape)}" for k in sorted(reshaped)[:5]]
    problems += _settle_first_conv(first_conv, weights, own, cfg)
    if problems:
        raise ValueError(
            f"These weights do not fit {cfg['architecture']}: {'; '.join(problems)}. "
            f"Give the weights of this architecture and these options, or pretrained=False.{_hint(unexpected)}"
        )
    if warm_start and any(m.channel.gate != "unit_sigmoid" for m in model.modules() if isinstance(m, Cbam2)):
        warnings.warn(
            "This warm start changes the backbone's function: only gate='unit_sigmoid' is the identity at its start.",
            stacklevel=2,
        )
    for key in optional - weights.keys() - classifier:
        weights[key] = own[key]
    return weights


def _settle_first_conv(key: str, weights: Weights, own: Weights, cfg: Dict[str, Any]) -> Iterator[str]:
    """Keep an old timm from adapting what it takes, unseen, for weights of 3 channels: others it would draw anew."""
    if not OLD_TIMM or key not in weights:
        return
    has, takes = weights[key].shape[1], own[key].shape[1]
    if has == takes:
        cfg["first_conv"] = None  # `build_twin` puts it back
    elif has != 3:
        yield f"{key}: of {has} input channels, not {takes}: timm 1.0.31 or newer can adapt it"


def require_safetensors(where: Any, **options: Any) -> None:
    """Refuse a model folder or repository whose weights are not in safetensors, before anything reads them.

    Args:
        where: The folder, or the repository's id.
        **options: For `hf_hub_download`, such as `revision`.

    Raises:
        ValueError: It has other weights or none.
    """
    for name in ("model.safetensors", "model.safetensors.index.json"):
        try:
            if Path(where, name).is_file() if Path(where).is_dir() else hf_hub_download(str(where), name, **options):
                return
        except RemoteEntryNotFoundError:
            continue
    raise ValueError(
        f"{where} has no model.safetensors. Other weights, such as pytorch_model.bin, are pickles, which can run code "
        "when they are read: have them saved anew as safetensors."
    )


def check_source(cfg: Any) -> None:
    """Refuse a model folder or repository from which timm would read a pickle."""
    if not isinstance(cfg, Mapping) or cfg.get("source") not in ("hf-hub", "local-dir"):
        return
    if cfg["source"] == "local-dir":
        require_safetensors(cfg["file"])
        return
    repo, _, revision = cfg["hf_hub_id"].partition("@")
    require_safetensors(repo, revision=revision or None)
