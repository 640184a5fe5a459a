"""See what a model attends to: one picture per image, drawn from `record_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Sequence

import numpy as np
import torch
import typer
from torch import Tensor, nn

from .attention_picture import draw
from .cbam2 import Cbam2, CbamAttention, record_attention
from .data import UNREADABLE, build_transform, data_config, read_image
from .errors import UserError, one_line, require, run_commands
from .sources import EXTENSIONS
from .zoo import class_names, load

__all__ = ["BlockView", "Explanation", "Explainer", "explain"]

INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Attention of {model}</title>
<style>body{{font-family:system-ui,sans-serif;margin:1rem}}figure{{margin:0 0 2rem}}img{{max-width:100%}}</style></head>
<body><h1>Attention of {model}</h1><p>{count} images.</p>
{figures}
</body></html>
"""


@dataclass(frozen=True)
class BlockView:
    """What one block decided for one image, and what it is made of."""

    name: str
    stage: str
    attention: CbamAttention  # of a batch of one
    branches: tuple[str, ...]  # what each router weight is for, such as "5x5"
    fusion: np.ndarray | None  # (2,) shares of average and maximum; None where they are added
    temperatures: tuple[float, float]  # of the channel and of the spatial gate
    neutral: float  # the mask value that changes nothing, or the middle of the gate's range


@dataclass(frozen=True)
class Explanation:
    """One image as the model saw it, what the model answers, and what each of its blocks decided."""

    model: str
    pixels: np.ndarray  # (H, W, 3) in [0, 1], after the model's own resizing and cropping
    answers: list[tuple[str, float]]  # the five best classes and their probabilities
    blocks: list[BlockView]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, named `<block>/<field>`."""
        out = {"pixels": self.pixels, "probabilities": np.array([p for _, p in self.answers])}
        out["classes"] = np.array([name for name, _ in self.answers])
        for block in self.blocks:
            for field, value in block.attention._asdict().items():
                if value is not None:
                    out[f"{block.name}/{field}"] = value[0].float().cpu().numpy()
            out[f"{block.name}/temperatures"] = np.array(block.temperatures)
        return out


def _branch_names(block: Cbam2) -> tuple[str, ...]:
    names = []
    for branch in block.spatial.branches:
        side = branch.dw.kernel_size[0]
        names.append(f"{side}x{side}" + (f" dilated {branch.dilation}" if branch.dilation > 1 else ""))
    return tuple(names)


def _view(name: str, block: Cbam2, attention: CbamAttention) -> BlockView:
    fusion = None
    if attention.fusion_weights is not None:
        fusion = attention.fusion_weights[0].float().cpu().numpy()
    elif block.channel.fusion_logits is not None:
        fusion = block.channel.fusion_logits.detach().float().softmax(0).cpu().numpy()
    stage, _, rest = name.partition(".")
    if stage == "stages":
        stage = f"stage {rest.partition('.')[0]}"
    temperatures = tuple(part.temperature(torch.float32).item() for part in (block.channel, block.spatial))
    neutral = 1.0 if block.channel.gate == "unit_sigmoid" else 0.5
    return BlockView(name, stage, attention, _branch_names(block), fusion, temperatures, neutral)


class Explainer:
    """Explains images with one model.

    Args:
        name: registered name, run or model folder, or hf-hub: id.
        img_size: side in pixels, in place of the model's own.

    Raises:
        UserError: no such model, or one without a CBAM2 block.
    """

    def __init__(self, name: str, img_size: int | None = None):
        self.name = name
        self.model: nn.Module = load(name).eval()
        self.blocks = {n: m for n, m in self.model.named_modules() if isinstance(m, Cbam2)}
        if not self.blocks:
            raise UserError(f"{name} has no CBAM2 block to look at: give a model named …_cbam2")
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
        with record_attention(self.model) as records:
            logits = self.model(x)
        best = logits.float().softmax(1)[0].topk(min(5, logits.shape[1]))
        names = self.names or [f"class {i}" for i in range(logits.shape[1])]
        answers = [(names[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist())]
        views = [_view(name, self.blocks[name], attention) for name, attention in records.items()]
        return Explanation(self.name, self._pixels(x[0]), answers, views)

    def _pixels(self, x: Tensor) -> np.ndarray:
        mean, std = (torch.tensor(self.config[key])[:, None, None] for key in ("mean", "std"))
        return (x * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()


def _find(images: Sequence[str]) -> list[Path]:
    """The image files among files and folders, each once.

    Raises:
        UserError: nothing there, or a folder without images.
    """
    found: list[Path] = []
    for given in images:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
            if not inside:
                raise UserError(f"{given} holds no images ({', '.join(EXTENSIONS)})")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise UserError(f"{given}: no such image or folder")
    return list(dict.fromkeys(found))


def _outputs(images: Sequence[Path], folder: Path) -> list[Path]:
    """A file name for each image; two images called alike get numbers."""
    used: dict[str, int] = {}
    outputs = []
    for image in images:
        used[image.stem] = used.get(image.stem, 0) + 1
        number = used[image.stem]
        outputs.append(folder / (f"{image.stem}.png" if number == 1 else f"{image.stem}-{number}.png"))
    return outputs


def explain(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Run or model folder, hf-hub: id, or registered name.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("attention"),
    blocks: Annotated[bool, typer.Option("--blocks", help="Show every block's mask, not each stage's last.")] = False,
    compare: Annotated[str | None, typer.Option(help="A second model, drawn below the first.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side in pixels, in place of the model's own.")] = None,
) -> list[Path]:
    """Draw what a model attends to: one PNG and one .npz of the raw arrays per image, and an index page for several.

    Raises:
        UserError: no such model or image, or a model without attention.
    """
    require("matplotlib")
    from tqdm import tqdm

    paths = _find(images)
    explainers = [Explainer(name, img_size) for name in (model, compare) if name is not None]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
    pictures = _outputs(paths, output)
    for path, picture in zip(tqdm(paths, unit=" images", disable=None if len(paths) > 1 else True), pictures):
        explanations = [explainer(path) for explainer in explainers]
        draw(explanations, picture, path.name, every_block=blocks)
        arrays = {}
        for number, explanation in enumerate(explanations):
            prefix = "" if number == 0 else "compare/"
            arrays |= {prefix + key: value for key, value in explanation.arrays().items()}
        np.savez_compressed(picture.with_suffix(".npz"), **arrays)
        if len(paths) == 1:
            answer, probability = explanations[0].answers[0]
            print(f"{path}: {answer} {100 * probability:.1f} %")
    if len(paths) > 1:
        figures = "\n".join(f'<figure><img src="{p.name}" alt="{p.stem}" loading="lazy"></figure>' for p in pictures)
        index = output / "index.html"
        index.write_text(INDEX.format(model=model, count=len(paths), figures=figures), encoding="utf-8")
        print(f"{len(paths)} pictures, their arrays and {index} in {output}")
    else:
        print(f"picture {pictures[0]}, arrays {pictures[0].with_suffix('.npz')}")
    return pictures


if __name__ == "__main__":
    run_commands(explain)
