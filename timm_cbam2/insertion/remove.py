"""`timm_cbam2.remove`: the network without its attention."""

from __future__ import annotations

import copy
from typing import Any, Callable, Iterable, Sequence

from torch import nn

from ..models.modeling_cbam2 import Cbam2PreTrainedModel
from .fold import MaskMeans, fold_means, last_layers, mean_masks
from .hosts import Seat, detach, own_blocks, seats
from .measure import compared
from .twin import become_plain

__all__ = ["remove"]


def remove(
    model: nn.Module, fold: bool = False, data: Iterable[Any] | None = None, *, say: Callable[[str], None] = print
) -> nn.Module:
    """Take every CBAM2 block out of a network, in place: one that `insert` put in, or of a `…_cbam2` model.

    A `…_cbam2` model becomes the plain timm model of the same name. What the blocks had learned goes with them; with
    `fold`, what is the same for every image stays: each channel mask's mean over `data`, times the spatial mask's mean
    over `data` and positions, is multiplied into the norm, convolution or linear layer before the block. *Where* a
    spatial mask is high or low cannot be kept in a weight for each channel and is lost; `say` is told how much that
    costs.

    Args:
        model: the network, which is changed.
        fold: keep the masks' means in the weights.
        data: with `fold`, batches as `model` takes them: tensors, (images, labels, …), or dicts with "labels".
        say: called with the line that tells what folding changes: the accuracy before and after where there are labels
            and the model classifies, otherwise the outputs.

    Returns:
        `model`.

    Raises:
        ValueError: it has no block, one that its own code calls, no `data` to fold with, or a block without a layer
            before it to fold into. The network is then as it was.
    """
    if isinstance(model, Cbam2PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is CBAM2 in transformers' form; take it out of its .timm_model")
    found = seats(model)
    own = list(own_blocks(model))
    if own:
        raise ValueError(f"{own[0]} is called by the network's own code; only what insert puts in can be taken out")
    if not found:
        raise ValueError(f"{type(model).__name__} has no CBAM2 block to take out")
    if fold and data is None:
        raise ValueError("fold=True needs data: batches of images, over which the masks are averaged")
    folding = _fold(model, found, data) if fold and data is not None else None
    for seat in found:
        detach(seat.host, seat.kind)
    become_plain(model)
    if folding is not None:
        before, data, means = folding
        say(_report(before, model, data, means))
    return model


def _fold(model: nn.Module, found: Sequence[Seat], data: Iterable[Any]) -> tuple[nn.Module, Iterable[Any], dict]:
    """Fold, and return the network as it was, the data to compare on, and the means of the masks."""
    layers = last_layers(found)
    if iter(data) is data:  # a generator, which could be read once only
        data = list(data)
    before = copy.deepcopy(model).eval()
    means = mean_masks(before, found, data)
    fold_means(layers, means)
    return before, data, means


def _report(before: nn.Module, after: nn.Module, data: Iterable[Any], means: dict[str, MaskMeans]) -> str:
    modes = {module: module.training for module in after.modules()}
    try:
        change = compared(before, after.eval(), data)
    finally:
        for module, mode in modes.items():
            module.training = mode
    spread = sum(mean.spread for mean in means.values()) / len(means)
    images = next(iter(means.values())).images
    return (
        f"{len(means)} blocks folded into the layers before them by their mean masks over {images} images: {change}; "
        f"where a spatial mask is high or low cannot be folded and is lost (it varied by {100 * spread:.1f} % of its "
        "mean)"
    )
