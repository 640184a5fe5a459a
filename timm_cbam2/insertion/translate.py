"""Keys of other libraries' ResNets and ConvNeXts as timm's, and the prefix that a wrapper put before every key."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor

from ..errors import UserError

__all__ = ["in_timms_keys"]

Weights = dict[str, Tensor]
_ANY = r"(?:.*\.)?"  # what a wrapper puts before
_HF_RESNET = {
    r"embedder\.embedder\.convolution\.(.+)": r"conv1.\1",
    r"embedder\.embedder\.normalization\.(.+)": r"bn1.\1",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.(.+)": r"layer{1}.\2.downsample.0.\3",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(.+)": r"layer{1}.\2.downsample.1.\3",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(.+)": r"layer{1}.\2.conv{3}.\4",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(.+)": r"layer{1}.\2.bn{3}.\4",
    r"classifier\.1\.(.+)": r"fc.\1",
}
_HF_CONVNEXT = {
    r"embeddings\.patch_embeddings\.(.+)": r"stem.0.\1",
    r"embeddings\.layernorm\.(.+)": r"stem.1.\1",
    r"encoder\.stages\.(\d+)\.downsampling_layer\.(\d+)\.(.+)": r"stages.\1.downsample.\2.\3",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.(.+)": r"stages.\1.blocks.\2.conv_dw.\3",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.(.+)": r"stages.\1.blocks.\2.norm.\3",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv(\d)\.(.+)": r"stages.\1.blocks.\2.mlp.fc\3.\4",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.grn\.(.+)": r"stages.\1.blocks.\2.mlp.grn.\3",
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter": r"stages.\1.blocks.\2.gamma",
    r"convnext(?:v2)?\.layernorm\.(.+)": r"head.norm.\1",
    r"classifier\.(weight|bias)": r"head.fc.\1",
}
_VISION_CONVNEXT = {
    r"features\.0\.([01])\.(.+)": r"stem.\1.\2",
    r"features\.(\d)\.([01])\.(weight|bias)": r"stages.{half}.downsample.\2.\3",
    r"features\.(\d)\.(\d+)\.block\.0\.(.+)": r"stages.{half}.blocks.\2.conv_dw.\3",
    r"features\.(\d)\.(\d+)\.block\.2\.(.+)": r"stages.{half}.blocks.\2.norm.\3",
    r"features\.(\d)\.(\d+)\.block\.3\.(.+)": r"stages.{half}.blocks.\2.mlp.fc1.\3",
    r"features\.(\d)\.(\d+)\.block\.5\.(.+)": r"stages.{half}.blocks.\2.mlp.fc2.\3",
    r"features\.(\d)\.(\d+)\.layer_scale": r"stages.{half}.blocks.\2.gamma",
    r"classifier\.0\.(.+)": r"head.norm.\1",
    r"classifier\.2\.(.+)": r"head.fc.\1",
}
_AUTHORS_CONVNEXT = {  # of the ConvNeXt papers' own code
    r"downsample_layers\.0\.([01])\.(.+)": r"stem.\1.\2",
    r"downsample_layers\.(\d)\.([01])\.(.+)": r"stages.\1.downsample.\2.\3",
    r"stages\.(\d)\.(\d+)\.dwconv\.(.+)": r"stages.\1.blocks.\2.conv_dw.\3",
    r"stages\.(\d)\.(\d+)\.norm\.(.+)": r"stages.\1.blocks.\2.norm.\3",
    r"stages\.(\d)\.(\d+)\.pwconv(\d)\.(.+)": r"stages.\1.blocks.\2.mlp.fc\3.\4",
    r"stages\.(\d)\.(\d+)\.grn\.gamma": r"stages.\1.blocks.\2.mlp.grn.weight",
    r"stages\.(\d)\.(\d+)\.grn\.beta": r"stages.\1.blocks.\2.mlp.grn.bias",
    r"stages\.(\d)\.(\d+)\.gamma": r"stages.\1.blocks.\2.gamma",
    r"norm\.(weight|bias)": r"head.norm.\1",
    r"head\.(weight|bias)": r"head.fc.\1",
}
_TABLES = {
    "transformers": _HF_RESNET,
    "transformers ": _HF_CONVNEXT,
    "torchvision": _VISION_CONVNEXT,
    "the ConvNeXt papers": _AUTHORS_CONVNEXT,
}


def _renamer(table: Mapping[str, str]) -> Callable[[str], str | None]:
    compiled = [(re.compile(_ANY + pattern), target) for pattern, target in table.items()]

    def rename(key: str) -> str | None:
        for pattern, target in compiled:
            found = pattern.fullmatch(key)
            if found:
                for number in (1, 3):  # {1}, {3}: counted from 1 by timm, from 0 there
                    if f"{{{number}}}" in target:
                        target = target.replace(f"{{{number}}}", str(int(found[number]) + 1))
                if "{half}" in target:  # torchvision puts a downsampling layer between two stages
                    target = target.replace("{half}", str(int(found[1]) // 2))
                return found.expand(target)
        return None

    return rename


def _prefix(keys: Collection[str], wanted: Iterable[str]) -> str:
    """What stands before the most of the `wanted` keys in `keys`.

    Raises:
        UserError: two of them stand before equally many, as where a teacher was saved beside its student.
    """
    wanted = set(wanted)
    counts: Counter[str] = Counter()
    for key in keys:
        for start in [0, *(i + 1 for i, letter in enumerate(key) if letter == ".")]:
            if key[start:] in wanted:
                counts[key[:start]] += 1
    best = counts.most_common(2)
    if len(best) == 2 and best[0][1] == best[1][1] and 4 * best[0][1] > len(keys):
        names = " and ".join(repr(name) for name, _ in best)
        raise UserError(f"the weights hold the network twice, below {names}: save the one that is wanted alone")
    return best[0][0] if best else ""


def in_timms_keys(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[Weights, list[str], str]:
    """Weights under the keys of a timm network.

    Args:
        weights: of timm, torchvision, transformers or the papers' authors, maybe inside a module that wraps them.
        wanted: the network's state dict.

    Returns:
        The weights that belong to the network, in the shapes of `wanted` where only dimensions of 1 differ; the keys
        left aside, since they lie outside what the wrapper wraps; and whose keys they were ("timm" and torchvision's
        ResNets have the same).

    Raises:
        UserError: the network is in them twice.
    """
    best, whose = {}, "timm"
    for name, table in _TABLES.items():
        rename = _renamer(table)
        renamed = {key: rename(key) for key in weights}
        found = {new: key for key, new in renamed.items() if new in wanted}
        twice = [new for new, count in Counter(renamed.values()).items() if count > 1 and new in wanted]
        if 4 * len(twice) > len(weights):
            raise UserError(
                f"the weights hold the network twice, such as {twice[0]}: save the one that is wanted alone"
            )
        if len(found) > len(best):
            best, whose = found, name.strip()
    prefix = _prefix(weights, wanted)
    plain = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
    if len(plain.keys() & wanted.keys()) >= len(best):
        best, whose = plain, "timm"
    used = set(best.values())
    out = {new: _reshaped(weights[old], wanted.get(new)) for new, old in best.items()}
    return out, sorted(key for key in weights if key not in used), whose


def _reshaped(value: Tensor, wanted: Tensor | None) -> Tensor:
    """`value` in the wanted shape, if that differs in dimensions of 1 only."""
    if wanted is None or value.shape == wanted.shape:
        return value
    same = [n for n in value.shape if n != 1] == [n for n in wanted.shape if n != 1]
    return value.reshape(wanted.shape) if same else value
