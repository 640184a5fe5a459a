"""What a run's best model gets wrong on its validation images: who is taken for whom, and the worst mistakes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..data.images import Samples
from ..data.loading import ImageDataset, data_config, make_loader
from ..data.sources import images_of_run
from ..errors import UserError
from ..hub.zoo import class_names, load
from ..training.predictions import Predictions
from .attention_picture import LOWERS, NEUTRAL, RAISES, overlay, reach_of, scale_label, short_name, shown_blocks
from .calibration import calibration, reliability_bytes, said
from .evaluate import match_classes, translated
from .explain import Explainer
from .figures import confusion_picture
from .html_parts import bytes_image, colour_scale, pixels_image, table
from .views import Explanation

__all__ = ["Seen", "calibration_part", "confusion_part", "look", "mistakes_part", "open_images", "said_in_time"]

MISTAKES = 10


@dataclass
class Seen:
    """Predictions of a run's best model on its validation images, as many as there was time for."""

    found: Predictions
    samples: Samples
    indices: Sequence[int]  # of the images in `samples`, one for each prediction
    model: nn.Module
    names: list[str]

    def some(self) -> str:
        """A note where not all images were seen."""
        if len(self.indices) == len(self.samples):
            return ""
        return (
            f'<p class="note">From {len(self.indices):,} of the {len(self.samples):,} validation images; '
            "<code>timm-cbam2 report RUN</code> looks at all of them.</p>"
        )


def look(settings: Mapping[str, Any], seconds: float | None) -> Seen:
    """Run the best model of the run with these settings on its validation images.

    Args:
        settings: run.json, with "folder".
        seconds: after which the images seen so far must do, in an order that mixes the classes; None means no limit.

    Raises:
        UserError: no model, no images any more, other classes than in the run, or not the time to load what was
            streamed.
    """
    return _predict(*open_images(settings, seconds), seconds)


def open_images(settings: Mapping[str, Any], seconds: float | None) -> tuple[nn.Module, Samples, list[str]]:
    """The best model of a run, its validation images with labels as the model's, and the names of the classes.

    Raises:
        UserError: see `look`.
    """
    if settings.get("streaming") and seconds is not None:
        raise UserError("the images were streamed; `timm-cbam2 report RUN` loads them all and looks at them")
    model = load(settings["folder"])
    images = images_of_run(settings)
    targets = match_classes(model, images, settings["folder"])
    samples = images.splits["val"]
    samples.labels = translated(samples.labels, targets, model.num_classes)
    return model, samples, class_names(model) or images.classes


def _predict(model: nn.Module, samples: Samples, names: list[str], seconds: float | None) -> Seen:
    parts = []
    for logits, labels, indices in said_in_time(model, samples, seconds):
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        parts.append((top, loss, labels, logits.softmax(1).amax(1), indices))
    *found, indices = (torch.cat(column) for column in zip(*parts))
    readable = found[2] >= 0
    if not readable.any():
        raise UserError("none of the validation images can be read")
    return Seen(
        Predictions(*(column[readable] for column in found)), samples, indices[readable].tolist(), model.cpu(), names
    )


@torch.no_grad()
def said_in_time(model: nn.Module, samples: Samples, seconds: float | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits (B, K), labels and indices of batches of images, in an order that mixes the classes if time is short."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    order = torch.arange(len(samples))
    if seconds is not None:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    dataset = ImageDataset(samples.select(order.tolist()), data_config(model), skip_bad=True)
    start = time.monotonic()
    for x, labels, indices in make_loader(dataset, 32, 0):
        yield model(x.to(device)).float().cpu(), labels, order[indices]
        if seconds is not None and time.monotonic() - start > seconds:
            break


def confusion_part(seen: Seen, known: Tensor | None, path: Path) -> str:
    """The confusion matrix as HTML, and as a PNG at `path`, where that of `known`, counts of all images, is already."""
    names = seen.names
    matrix = seen.found.confusion(len(names)) if known is None else known
    present = (matrix.sum(0) + matrix.sum(1)) > 0 if len(names) > 60 else torch.ones(len(names), dtype=torch.bool)
    kept = present.nonzero().flatten().tolist()
    if known is None:
        title = f"{int(matrix.sum())} validation images"
        confusion_picture(matrix[kept][:, kept], [names[i] for i in kept], path, title)
    picture = path.read_bytes()

    off = matrix.clone().fill_diagonal_(0)
    pairs = [divmod(i, len(names)) for i in off.flatten().argsort(descending=True, stable=True)[:5].tolist()]
    worst = [(names[truth], names[taken], int(off[truth, taken])) for truth, taken in pairs if off[truth, taken]]
    often = "<p>Most often confused:</p>" + table(worst, ("true class", "taken for", "times")) if worst else ""
    some = seen.some() if known is None else ""
    image = bytes_image(picture, "confusion matrix")
    kind = "plots" if len(kept) <= 12 else "scroll wide"  # more would be too small to read on a phone
    return f'<h2>Confusion</h2><div class="{kind}">{image}</div>{some}{often}'


def calibration_part(seen: Seen) -> str:
    """Whether the model is right as often as it is sure to be, as HTML."""
    found = calibration(seen.found.confidence, seen.found.correct)
    picture = bytes_image(reliability_bytes(found), "accuracy against confidence")
    return f'<h2>Calibration</h2><p>{said(found)}</p><div class="plots">{picture}</div>{seen.some()}'


def mistakes_part(seen: Seen) -> str:
    """The wrong answers with the highest loss, each with the image and the mask of each stage's last block."""
    found = seen.found
    wrong = (found.top[:, 0] != found.labels).nonzero().flatten()
    order = wrong[found.loss[wrong].argsort(descending=True, stable=True)][:MISTAKES].tolist()
    if not order:
        return f"<h2>Worst mistakes</h2><p>None: all {len(found.labels)} images are named rightly.</p>{seen.some()}"
    explainer = Explainer("best", model=seen.model)
    explained = [explainer(seen.samples.source(seen.indices[i])) for i in order]
    blocks = [block for explanation in explained for block in shown_blocks(explanation)]
    reach = reach_of(blocks) if blocks else 1.0
    figures = []
    for i, explanation in zip(order, explained):
        name = Path(seen.samples.name(seen.indices[i])).name
        said, truth = (seen.names[int(n)] for n in (found.top[i, 0], found.labels[i]))
        figures.append(
            f'<figure class="mistake"><figcaption>Taken for <b>{escape(said)}</b> '
            f"({100 * explanation.answers[0][1]:.1f} %), is <b>{escape(truth)}</b> "
            f'({100 * torch.exp(-found.loss[i]).item():.2g} %). <span class="note">{escape(name)}</span></figcaption>'
            f"{_strip(explanation, name, reach)}</figure>"
        )
    lead = f"The {len(order)} with the highest loss, of {len(wrong)} wrong answers in {len(found.labels)}."
    scale = ""
    if blocks:
        lead += " Beside each image the spatial mask of each stage's last block."
        middle = blocks[0].neutral
        low, high = f"spatial mask {middle - reach:.2f}", f"{middle + reach:.2f} ({scale_label(blocks[0])})"
        scale = colour_scale(low, high, (LOWERS, NEUTRAL, RAISES))
    return f'<h2>Worst mistakes</h2><p>{lead}</p>{seen.some()}{scale}<div class="mistakes">{"".join(figures)}</div>'


def _strip(explanation: Explanation, name: str, reach: float) -> str:
    cells = [f"<div>{pixels_image(explanation.shown, name)}the image</div>"]
    for block in shown_blocks(explanation):
        tinted = overlay(explanation.shown, block, reach, side=64)
        cells.append(f"<div>{pixels_image(tinted, f'mask of {block.name}')}{escape(short_name(block))}</div>")
    return f'<div class="strip">{"".join(cells)}</div>'
