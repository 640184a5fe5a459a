"""`timm_cbam2.insert`: CBAM2 at the identity in a network that is built, and maybe trained."""

from __future__ import annotations

import warnings
from typing import Any, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.cbam2 import Cbam2, resolve_options
from .hosts import Kind, attach, detach, slot_of
from .places import Place, Where, choose, known_channels
from .probe import Probe, like
from .twin import become_twin

__all__ = ["insert", "new_block"]


def insert(
    model: nn.Module,
    where: Where = None,
    *,
    channels: int | dict[str, int] | None = None,
    replace: bool = False,
    example: Any = None,
    **cbam2_options: Any,
) -> nn.Module:
    """Put CBAM2 blocks into a trained network, in place; its outputs stay what they were, bit for bit.

    A fresh block is the identity, in evaluation and in training, until it is trained. Without `where`, every residual
    block of timm's, torchvision's and transformers' ResNets and ConvNeXts gets one, also where such a network is part
    of a larger one (detection, segmentation, segmentation_models_pytorch): in a ResNet after the branch's last norm and
    before the add, in a ConvNeXt after the MLP and before layer-scale. A whole timm network whose `…_cbam2` twin is
    registered becomes that twin. Device, dtype, training mode and `requires_grad` stay; new parameters can be trained.

    Args:
        model: the network, which is changed. Make optimizers, `torch.compile` and DistributedDataParallel afterwards.
        where: modules to put one into: names or patterns, in which `*` stands for one name between dots ("layer3.*"),
            or a function of a module's name and the module. A residual block that is understood gets it on its branch,
            any other module after its output, which must be (B, C, H, W).
        channels: C of those other modules, one for all or by name; otherwise one pass over a tiny picture, which
            leaves no trace in statistics or random generators, finds them.
        replace: let it take the place of the squeeze-and-excitation or other attention of a timm ResNet, which changes
            the outputs.
        example: an input of `model` for that pass, or a tuple of several, where noise of 64 pixels is none.
        **cbam2_options: of every block, see `resolve_options`.

    Returns:
        `model`.

    Raises:
        ValueError: nothing is understood or found, a place is taken, a module's output is not (B, C, H, W), or an
            option is not allowed. The network is then as it was.
    """
    batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
    options = resolve_options(cbam2_options, batch_norm=batch_norm)
    places = choose(model, where, replace)
    probe = Probe(model, example)
    counts = _channels(places, channels, probe)
    blocks = [new_block(place.host, place.kind, counts[place.name], options) for place in places]
    if options["gate"] != "unit_sigmoid":
        warnings.warn(
            f"gate={options['gate']!r} is not the identity at its start, so the network's outputs change; "
            "only gate='unit_sigmoid' keeps them.",
            stacklevel=2,
        )
    replaced = [type(held).__name__ for held in (slot_of(p.host, p.kind) for p in places) if held is not None]
    if replaced:
        warnings.warn(f"CBAM2 replaces {len(replaced)} {replaced[0]}, so the network's outputs change.", stacklevel=2)
    # The parts of a residual block are known; what a person's own module does with its parts is seen by running it.
    probed = options["gate"] == "unit_sigmoid" and not replaced and bool(probe.inputs)
    before = probe.outputs() if probed else []
    for place, block in zip(places, blocks):
        attach(place.host, place.kind, block)
    if probed and not _same(before, probe.outputs()):
        for place in places:
            detach(place.host, place.kind)
        raise ValueError(
            "the network's outputs change with these blocks at the identity: a module that was chosen is used in "
            "another way than by being called; choose others"
        )
    become_twin(model)
    return model


def new_block(host: nn.Module, kind: Kind, channels: int, options: dict[str, Any]) -> Cbam2:
    """A block for `host`, which says itself where it goes and what it was made with, as a saved folder does."""
    block = Cbam2(channels, **options, **like(host)).train(host.training)
    block.inserted = dict(kind=kind.name, slot=kind.slot, channels=channels, options=dict(options))
    return block


def _channels(places: Sequence[Place], channels: int | dict[str, int] | None, probe: Probe) -> dict[str, int]:
    """The channels of every place, by name."""
    known = known_channels(places, channels)
    asked = {place.name: place.host for place in places if place.name not in known}
    for name, shapes in (probe.shapes(asked) if asked else {}).items():
        if not shapes:
            raise ValueError(f"where: {name} was not called when the network ran; choose a module that is")
        for shape in shapes:
            if not isinstance(shape, tuple) or len(shape) != 4:
                gave = "x".join(map(str, shape)) if isinstance(shape, tuple) else shape
                raise ValueError(f"where: {name} gave {gave}; CBAM2 goes after modules that give (B, C, H, W)")
        counts = {shape[1] for shape in shapes}
        if len(counts) > 1:
            raise ValueError(
                f"where: {name} is called with {sorted(counts)} channels in turn; choose modules around it"
            )
        known[name] = counts.pop()
    return known


def _same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape
        and bool(((a == b) | (a.isnan() & b.isnan())).all() if a.is_floating_point() else (a == b).all())
        for a, b in zip(before, after)
    )
