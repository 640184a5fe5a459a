"""See what a model attends to: one picture per image, drawn from `record_attention`."""

from __future__ import annotations

import io
import os
from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Sequence
from urllib.parse import quote

import numpy as np
import torch
import typer
from torch import Tensor, nn

from ..data.formats import EXAMPLES, is_image
from ..data.loading import build_transform, data_config
from ..data.reading import UNREADABLE, read_image
from ..errors import UserError, one_line, require
from ..files import write_whole
from ..hub.zoo import check_classifier, class_names, load
from ..models.cbam2 import Cbam2, CbamAttention, record_attention
from ..terminal import say
from .attention_picture import draw
from .health import branch_names
from .views import BlockView, Explanation

__all__ = ["BlockView", "Explainer", "Explanation", "explain", "write_arrays"]

FINE = 448  # pixels on the longer side of a picture under a mask: about what a panel shows
if TYPE_CHECKING:
    Named = str | nn.Module
else:
    Named = str  # all that a command line can give
TITLE = "<title>Attention of "
INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention of {model}</title>
<style>
body{{font-family:system-ui,sans-serif;margin:1rem;color:#222}}figure{{margin:0 0 2.5rem}}img{{max-width:100%}}
</style></head>
<body><h1>Attention of {model}</h1><p>{count}</p>
{figures}
</body></html>
"""
FIGURE = """<figure><figcaption><b>{name}</b>: {answers} (<a href="{arrays}">arrays</a>)</figcaption>
<a href="{picture}"><img src="{picture}" alt="attention on {name}" loading="lazy"></a></figure>"""


def _view(name: str, block: Cbam2, attention: CbamAttention) -> BlockView:
    fusion = None
    if attention.fusion_weights is not None:
        fusion = attention.fusion_weights[0].float().cpu().numpy()
    elif block.channel.fusion_logits is not None:
        fusion = block.channel.fusion_logits.detach().float().softmax(0).cpu().numpy()
    temperatures = tuple(part.temperature(torch.float32).item() for part in (block.channel, block.spatial))
    neutral = 1.0 if block.channel.gate == "unit_sigmoid" else 0.5
    return BlockView(name, _stage(name, block), attention, tuple(branch_names(block)), fusion, temperatures, neutral)


def _stage(name: str, block: Cbam2) -> str:
    """What a block's neighbours have in common with it: one of them stands for all in a picture."""
    first, _, rest = name.partition(".")
    if first == "stages":
        return f"stage {rest.partition('.')[0]}"
    slot = getattr(block, "inserted", {}).get("slot", "se")
    module = name.removesuffix(slot).rstrip(".")  # of any library
    parent, _, last = module.rpartition(".")
    return parent if last.isdigit() and parent else module


class Explainer:
    """Explains images with one model.

    Args:
        name: registered name, run or model folder, or hf-hub: id.
        img_size: side in pixels, in place of the model's own.
        model: the model itself, of any library, where it is loaded already; `name` is then only what to call it. It
            may lack CBAM2 blocks, and so do its explanations then.

    Raises:
        UserError: no such model, or one without a CBAM2 block.
    """

    def __init__(self, name: str, img_size: int | None = None, model: nn.Module | None = None):
        self.name = name
        self.model: nn.Module = (load(name) if model is None else model).eval()
        self.blocks = {n: m for n, m in self.model.named_modules() if isinstance(m, Cbam2)}
        if not self.blocks and model is None:
            raise UserError(f"{name} has no CBAM2 block to look at: give a model named …_cbam2")
        check_classifier(self.model, name)
        self.config = data_config(self.model, img_size)
        self.transform = build_transform(self.config)
        self.names = class_names(self.model, describe=True)
        self.mode = "L" if self.config["input_size"][0] == 1 else "RGB"

    @torch.no_grad()
    def __call__(self, source: Any) -> Explanation:
        """Explain one image: a path, bytes, or a PIL image.

        Raises:
            UserError: it cannot be read.
        """
        try:
            image = read_image(source, self.mode)
        except UNREADABLE as error:
            raise UserError(f"cannot read {source} as an image ({one_line(error, 150)})") from error
        x = self.transform(image)[None]
        place = next(self.model.parameters())
        with record_attention(self.model) if self.blocks else nullcontext({}) as records:
            said = self.model(x.to(place))
        answers = self._answers(getattr(said, "logits", said))
        views = [_view(name, self.blocks[name], attention) for name, attention in records.items()]
        return Explanation(self.name, self._pixels(x[0]), answers, views, self._picture(image))

    def _answers(self, logits: Any) -> list[tuple[str, float]]:
        """The five best classes and their probabilities; none where the model does not classify whole images."""
        if not torch.is_tensor(logits) or logits.ndim != 2:
            return []
        if not logits.isfinite().all():
            raise UserError(f"{self.name} gives no finite numbers: its training diverged; use an earlier checkpoint")
        several = getattr(self.model, "multi_label", False)
        probabilities = logits.float().sigmoid() if several else logits.float().softmax(1)
        best = probabilities[0].topk(min(5, logits.shape[1]))
        names = self.names or [f"class {i}" for i in range(logits.shape[1])]
        return [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]

    def _picture(self, image: Any) -> np.ndarray | None:
        """What the model sees of `image`, with as many pixels as that has, up to `FINE`; None if those are no more."""
        _, *size = self.config["input_size"]
        factor = min(self.config["crop_pct"] * min(image.size) / min(size), FINE / max(size))
        if factor <= 1:
            return None
        fine = build_transform({**self.config, "input_size": (3, *(round(factor * side) for side in size))})
        return self._pixels(fine(image))

    def _pixels(self, x: Tensor) -> np.ndarray:
        mean, std = (torch.tensor(self.config[key])[:, None, None] for key in ("mean", "std"))
        return (x * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _explainer(given: Any, img_size: int | None) -> Explainer:
    """Of a model by name, or, in Python, of the model itself."""
    if not isinstance(given, nn.Module):
        return Explainer(given, img_size)
    explainer = Explainer(type(given).__name__, img_size, model=given)
    if not explainer.blocks:
        raise UserError(f"{explainer.name} has no CBAM2 block to look at: put some in with timm_cbam2.insert(model)")
    return explainer


def _find(images: Sequence[str], output: Path) -> list[Path]:
    """The image files among files and folders, each once; earlier pictures in `output` are none.

    Raises:
        UserError: nothing there, or a folder without images.
    """
    images = [images] if isinstance(images, (str, Path)) else images
    found: list[Path] = []
    own = {Path(given).expanduser().resolve() for given in images}
    for given in images:
        path = Path(given).expanduser()
        if os.path.isdir(path):
            inside = sorted(p for p in path.rglob("*") if is_image(p))
            if output.resolve() not in own:
                inside = [p for p in inside if output.resolve() not in p.resolve().parents]
            if not inside:
                raise UserError(f"{given} holds no images ({EXAMPLES})")
            found += inside
        elif os.path.exists(path):
            found.append(path)
        else:
            raise UserError(f"{given}: no such image or folder")
    return list(dict.fromkeys(found))


def _outputs(images: Sequence[Path], folder: Path) -> list[Path]:
    """A PNG for each image; a name that is taken, by another picture, an image or a file of yours, gets a number."""
    taken = {image.resolve() for image in images}
    outputs = []
    for image in images:
        output, number = folder / f"{image.stem}.png", 1
        # Of an earlier call, both the picture and its arrays are there.
        while output.resolve() in taken or output.exists() != output.with_suffix(".npz").exists():
            number += 1
            output = folder / f"{image.stem}-{number}.png"
        taken.add(output.resolve())
        outputs.append(output)
    return outputs


def _index(folder: Path) -> Path:
    """Where the index page goes: a page that is not of an earlier call stays as it is."""
    path, number = folder / "index.html", 1
    while path.exists() and TITLE not in path.read_text(encoding="utf-8", errors="replace"):
        number += 1
        path = folder / f"index-{number}.html"
    return path


def write_arrays(explanations: Sequence[Explanation], path: Path) -> None:
    """Those of the first model as they are called, those of a second one below "compare/"; whole or not at all."""
    arrays = {}
    for number, explanation in enumerate(explanations):
        prefix = "" if number == 0 else "compare/"
        arrays |= {prefix + key: value for key, value in explanation.arrays().items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def _figure(image: Path, picture: Path, explanations: Sequence[Explanation]) -> str:
    answers = [
        f"{name} {100 * probability:.1f} %" for name, probability in (e.answers[0] for e in explanations if e.answers)
    ]
    return FIGURE.format(
        name=escape(image.name),
        answers=escape(" / ".join(answers)),
        arrays=quote(os.fsencode(picture.with_suffix(".npz").name)),
        picture=quote(os.fsencode(picture.name)),
    )


def explain(
    model: Annotated[
        Named, typer.Argument(metavar="MODEL", help="Run or model folder, hf-hub: id, or registered name.")
    ],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("attention"),
    blocks: Annotated[bool, typer.Option("--blocks", help="Show every block's mask, not each stage's last.")] = False,
    compare: Annotated[Named | None, typer.Option(help="A second model, drawn beside the first.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side in pixels, in place of the model's own.")] = None,
) -> list[Path]:
    """Draw what a model attends to: one PNG and one .npz of the raw arrays per image, and an index page for several.

    In Python, `model` and `compare` may also be models themselves, of any library, that hold CBAM2 blocks.

    Returns:
        The pictures.

    Raises:
        UserError: no such model or image, a model without attention, or an image that cannot be read; the other
            images are drawn first.
    """
    require("matplotlib")
    from tqdm import tqdm

    paths = _find(images, output)
    explainers = [_explainer(given, img_size) for given in (model, compare) if given is not None]
    drawn: list[Path] = []
    figures: list[str] = []
    unread: list[str] = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        bar = tqdm(paths, unit=" images", disable=None if len(paths) > 1 else True)
        for path, picture in zip(bar, _outputs(paths, output)):
            try:
                explanations = [explainer(path) for explainer in explainers]
            except UserError as error:
                unread.append(str(error))
                continue
            draw(explanations, picture, path.name, every_block=blocks)
            write_arrays(explanations, picture.with_suffix(".npz"))
            drawn.append(picture)
            figures.append(_figure(path, picture, explanations))
            if len(paths) == 1:
                for explanation in (e for e in explanations if e.answers):
                    answer, probability = explanation.answers[0]
                    whose = f" says {explanation.model}" if compare is not None else ""
                    say(f"{path}: {answer} {100 * probability:.1f} %{whose}")
        if len(paths) > 1 and drawn:
            title = escape(" and ".join(explainer.name for explainer in explainers))
            count = "1 image." if len(drawn) == 1 else f"{len(drawn)} images."
            page = INDEX.format(model=title, count=count, figures="\n".join(figures))
            index = _index(output)
            index.write_text(page, encoding="utf-8", errors="backslashreplace")
            say(f"{len(drawn)} pictures, their arrays and {index} in {output}")
        elif drawn:
            say(f"picture {drawn[0]}, arrays {drawn[0].with_suffix('.npz')}")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or one_line(error, 200)}") from error
    if unread:
        more = f" (and {len(unread) - 1} more that cannot be read)" if len(unread) > 1 else ""
        raise UserError(unread[0] + more + (f"; the other {len(drawn)} are drawn" if drawn else ""))
    return drawn
