"""Where blocks go: the residual blocks of a network, or the modules that a person names."""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import nn

from ..models.cbam2 import is_cbam2
from .hosts import OUTPUT, Kind, kind_of, output_kind, slot_of

__all__ = ["Place", "Where", "choose", "known_channels"]

Where = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Place:
    """A module that is to hold a block, and how."""

    name: str
    host: nn.Module
    kind: Kind


def choose(model: nn.Module, where: Where, replace: bool) -> list[Place]:
    """The modules that are to hold blocks, in the network's order.

    Args:
        model: the network.
        where: see `insert`.
        replace: whether a block may take the place of another attention layer.

    Raises:
        ValueError: nothing is found, a name matches nothing, or a place is taken.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("a scripted model cannot be changed: insert before torch.jit.script")
    if hasattr(model, "_orig_mod"):
        raise ValueError("a compiled model cannot be changed: insert into the model itself, then compile it")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(f"{type(model).__name__} does not learn of new parameters: insert into its .module first")
    modules = dict(model.named_modules())
    if where is None:
        names = [name for name, module in modules.items() if kind_of(module) is not None]
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no residual block of timm's, torchvision's or transformers' ResNet or "
                "ConvNeXt; say after which modules attention goes with where=, such as "
                f"where={_example(modules)!r}"
            )
    else:
        names = _named(modules, where)
    places = [Place(name, modules[name], kind_of(modules[name]) or _output(name, modules[name])) for name in names]
    _check_free(places, replace)
    return places


def _example(modules: dict[str, nn.Module]) -> str:
    named = [name for name, m in modules.items() if name and "." not in name and isinstance(m, nn.Sequential)]
    return f"{named[-1]}.*" if named else next((name for name in reversed(modules) if name), "layer3.*")


def _output(name: str, module: nn.Module) -> Kind:
    try:
        return output_kind(module)
    except ValueError as error:
        raise ValueError(f"where: {name}: {error}") from error


def _named(modules: dict[str, nn.Module], where: Where) -> list[str]:
    """The names that `where` chooses, the network itself never being one."""
    candidates = [
        name
        for name, module in modules.items()
        if name and not any(is_cbam2(modules[name[:i]]) for i in _dots(name)) and not is_cbam2(module)
    ]
    if callable(where):
        chosen = [name for name in candidates if where(name, modules[name])]
        if not chosen:
            raise ValueError("where: the function is true for no module; it is called with each name and module")
        return chosen
    patterns = [where] if isinstance(where, str) else list(where or ())
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"where={where!r} is not allowed; give names of modules, or a function of name and module")
    found: set[str] = set()
    for pattern in patterns:
        matched = [name for name in candidates if _matches(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, candidates, 3, 0.3)
            raise ValueError(
                f"where={pattern!r} names no module" + (f"; near it are {', '.join(near)}" if near else "")
            )
        found.update(matched)
    return [name for name in candidates if name in found]


def _dots(name: str) -> list[int]:
    return [i for i, letter in enumerate(name) if letter == "."]


def _matches(name: str, pattern: str) -> bool:
    """Part by part, so that `*` stands for one name between dots."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _check_free(places: Sequence[Place], replace: bool) -> None:
    held = [(place, slot_of(place.host, place.kind)) for place in places]
    if any(is_cbam2(module) for _, module in held if module is not None):
        names = [place.name for place, module in held if module is not None and is_cbam2(module)]
        raise ValueError(f"{_some(names)} hold CBAM2 already; take it out first with timm_cbam2.remove(model)")
    others = [(place.name, type(module).__name__) for place, module in held if module is not None]
    if any(place.kind.name == OUTPUT for place, module in held if module is not None):
        raise ValueError(f"{others[0][0]} has a part called cbam2 of its own; choose another module")
    if others and not replace:
        raise ValueError(
            f"{_some([name for name, _ in others])} have another attention layer ({others[0][1]}); pass replace=True "
            "to put CBAM2 in its place, which changes the outputs, or choose other modules with where="
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def known_channels(places: Sequence[Place], channels: int | dict[str, int] | None) -> dict[str, int]:
    """The channels of those places that need no forward pass to tell, by name.

    Raises:
        ValueError: `channels` is no number or names a module that is not among `places`.
    """
    known = {}
    for place in places:
        if place.kind.name != OUTPUT:
            layer = place.host.get_submodule(place.kind.last)
            weight: Any = getattr(layer, "weight", None)
            known[place.name] = layer.num_features if weight is None else weight.shape[0]
        elif isinstance(channels, int):
            known[place.name] = channels
    if isinstance(channels, dict):
        unknown = channels.keys() - {place.name for place in places}
        if unknown:
            raise ValueError(f"channels names {sorted(unknown)[0]!r}, where no block goes; give those that where names")
        known |= {name: count for name, count in channels.items() if name not in known}
    elif channels is not None and (not isinstance(channels, int) or isinstance(channels, bool)):
        raise ValueError(f"channels={channels!r} is not allowed; give a number, or a dict of them by module name")
    return known
