"""`timm_cbam2.load_inserted`: a folder's blocks and weights, back into a freshly built network."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model
from torch import nn

from ..hub.inserted import inserted_blocks, read_inserted
from ..models.cbam2 import Cbam2, is_cbam2, resolve_options
from .hosts import OUTPUT, Kind, attach, kind_of, output_kind, slot_of
from .insert import new_block
from .misfit import misfits
from .places import Place, known_channels

__all__ = ["load_inserted"]


def load_inserted(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the blocks and all weights that `timm_cbam2.save` wrote into a network built as the saved one was, in place.

    Loading is strict: a module that is not there, a missing, unexpected or misshapen weight is an error that names it,
    and the network is then as it was. A network that holds the same blocks already only gets the weights.

    Args:
        model: the network, built anew without CBAM2.
        folder: with `model.safetensors` and `cbam2.json`.

    Returns:
        `model`.

    Raises:
        ValueError: the folder is no such one or damaged, or does not fit `model`.
    """
    folder = Path(folder)
    saved = read_inserted(folder)["blocks"]
    blocks = {}
    if inserted_blocks(model) != [{**b, "options": resolve_options(b["options"], saved=True)} for b in saved]:
        held = [name for name, module in model.named_modules() if is_cbam2(module) and hasattr(module, "inserted")]
        if held:
            raise ValueError(f"{held[0]} is there already, and other blocks than in {folder}; build the network anew")
        blocks = {i: _place(model, block, folder) for i, block in enumerate(saved)}
    file = folder / "model.safetensors"
    found = _shapes(file)
    wanted = _wanted(model, found)
    for i, (place, options) in blocks.items():
        fresh = Cbam2(saved[i]["channels"], **options, device="meta")
        prefix = f"{place.name}.{place.kind.slot}".lstrip(".")
        wanted |= {f"{prefix}.{key}": tuple(value.shape) for key, value in fresh.state_dict().items()}
    problem = misfits(found, wanted)
    if problem:
        raise ValueError(f"{file} does not fit {type(model).__name__}: {problem}")
    for i, (place, options) in blocks.items():
        attach(place.host, place.kind, new_block(place.host, place.kind, saved[i]["channels"], options))
    load_model(model, str(file))
    return model


def _place(model: nn.Module, block: dict[str, Any], folder: Path) -> tuple[Place, dict[str, Any]]:
    """Where a saved block goes, and its options.

    Raises:
        ValueError: there is no such module, it is of another kind, or it holds something there already.
    """
    name, wanted = block["module"], block["kind"]
    try:
        host = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{folder} has a block in {name}, and {type(model).__name__} has no such module") from error
    kind: Kind | None = output_kind(host) if wanted == OUTPUT else kind_of(host)
    if kind is None or (kind.name, kind.slot) != (wanted, block["slot"]):
        raise ValueError(f"{folder} has a block in {name} as {wanted}, which here is a {type(host).__name__}")
    if slot_of(host, kind) is not None:
        raise ValueError(f"{name} holds a {type(slot_of(host, kind)).__name__} already, where {folder} has a block")
    place = Place(name, host, kind)
    counted = known_channels([place], None).get(name, block["channels"])
    if counted != block["channels"]:
        raise ValueError(f"{folder} has a block for {block['channels']} channels in {name}, which has {counted}")
    return place, resolve_options(block["options"], saved=True)


def _wanted(model: nn.Module, found: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the state dict; a tensor with several names may be in the file under one of them."""
    state = model.state_dict()
    saved = {(value.data_ptr(), value.shape) for key, value in state.items() if key in found}
    return {k: tuple(v.shape) for k, v in state.items() if k in found or (v.data_ptr(), v.shape) not in saved}


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut off ({error}); get or save it again") from error
