"""`--start-from`: which network a run trains, and the weights, plain or with attention, that it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..data.images import Images
from ..errors import UserError
from ..hub.zoo import class_names, resolve
from ..insertion.read import read_source
from ..insertion.start import architecture_of, channels_in, describe, fit
from ..insertion.twin import twin_of

__all__ = ["load_start", "settle_model"]


def settle_model(settings: dict[str, Any]) -> None:
    """Say in `settings`, in place, which model is trained: the one named, or else what the weights are of, with CBAM2.

    Raises:
        UserError: the weights cannot be read or do not say of which network they are, or options contradict each other.
    """
    name = settings["start_from"]
    if settings["pretrained"] and settings["resume"] is None:
        raise UserError(f"--pretrained and --start-from {name} are two sets of weights to start from: give one")
    settings["start_from"] = _whole(name)
    source = read_source(name)
    given = settings["model"]
    if given is not None and ":" in resolve(given):
        raise UserError(f"--model {given} brings weights of its own: with --start-from give a registered name")
    architecture = architecture_of(source, given)
    settings["model"] = given or twin_of(architecture) or architecture
    if given is None or source.architecture in (architecture, architecture.removesuffix("_cbam2")):
        arguments = {**channels_in(source, architecture), **source.arguments}
        attention = {**(arguments.pop("cbam2", None) or {}), **settings["cbam2"]}
        settings["model_kwargs"] = {**arguments, **settings["model_kwargs"]}
        settings["cbam2"] = attention if settings["model"].endswith("_cbam2") else {}


def _whole(name: str) -> str:
    """The same file or folder from any working directory."""
    path = Path(name.removeprefix("local-dir:")).expanduser()
    return str(path.resolve()) if path.exists() else name


def load_start(network: nn.Module, settings: dict[str, Any], images: Images) -> list[str]:
    """Put the weights into the network that was built for them, and return what to know of that.

    Raises:
        UserError: they do not fit; what does not is named.
    """
    source = read_source(settings["start_from"])
    describe(network, source)
    known = class_names(network) if source.cfg.get("label_names") else None
    notes = fit(network, source, new_head=known is not None and known != images.classes)
    return [f"--start-from {settings['start_from']}: {note}" for note in notes]
