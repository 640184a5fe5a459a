"""Write a model for other runtimes: ONNX or torch.export, any batch and image size, checked before it says done."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Callable

import torch
import typer
from timm.utils import reparameterize_model
from torch import Tensor, nn

from .data import data_config
from .errors import UserError, require, run_commands
from .zoo import load, pretrained_tags, resolve

__all__ = ["export", "export_onnx", "export_pt2"]

TOLERANCE = 1e-4


def _ready(model: nn.Module) -> nn.Module:
    return reparameterize_model(model).eval().requires_grad_(False).cpu().float()


def _program(model: nn.Module, size: tuple[int, int, int]) -> torch.export.ExportedProgram:
    channels, height, width = size
    dynamic = {name: torch.export.Dim.DYNAMIC for name in (0, 2, 3)}
    return torch.export.export(model, (torch.randn(2, channels, height, width),), dynamic_shapes=(dynamic,))


def _samples(size: tuple[int, int, int]) -> list[Tensor]:
    """Inputs of the size asked for, and of others in batch, height and width."""
    channels, height, width = size
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, height, width), (3, height, width), (2, height + 32, width), (1, height, width + 64)]
    return [torch.randn(batch, channels, h, w, generator=generator) for batch, h, w in shapes]


def _write(
    path: Path, model: nn.Module, size: tuple[int, int, int], save: Callable, reopen: Callable, tolerance: float
) -> float:
    """Save beside `path`, compare what was saved with the model, and only then give it its name."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save(temporary)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        run = reopen(temporary)
        worst = 0.0
        for images in _samples(size):
            with torch.no_grad():
                expected = model(images)
            got = run(images)
            difference = (got - expected).abs().max().item() if got.shape == expected.shape else float("inf")
            if not difference <= tolerance * max(1.0, expected.abs().max().item()):
                raise UserError(
                    f"{path} was not written: for images of shape {tuple(images.shape)} the exported model differs by "
                    f"{difference:.2g}, more than {tolerance:g}; please report this with the model's name"
                )
            worst = max(worst, difference)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return worst


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], size: tuple[int, int, int], tolerance: float = TOLERANCE
) -> float:
    """Write `model` to an ONNX file with free batch, height and width, and compare it in onnxruntime on several sizes.

    Args:
        model: Network from images (B, channels, H, W) to a tensor; its attention is reparameterized in a copy.
        path: File to write, whole or not at all.
        size: (channels, H, W) to trace with.
        tolerance: Largest difference allowed, times the largest output where that is above 1.

    Returns:
        The largest difference seen.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is missing, the file cannot be written, or computes something else.
    """
    require("onnx", "onnxscript", "onnxruntime", extra="onnx")
    model = _ready(model)

    def save(file: Path) -> None:
        program = torch.onnx.export(
            _program(model, size), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
        program.save(file)

    def reopen(file: Path) -> Callable[[Tensor], Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return _write(Path(path), model, size, save, reopen, tolerance)


def export_pt2(
    model: nn.Module, path: str | os.PathLike[str], size: tuple[int, int, int], tolerance: float = TOLERANCE
) -> float:
    """Write `model` with torch.export to a `.pt2` file; arguments, result and errors as for `export_onnx`."""
    model = _ready(model)

    def save(file: Path) -> None:
        torch.export.save(_program(model, size), file)

    return _write(Path(path), model, size, save, lambda file: torch.export.load(file).module(), tolerance)


def export(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run or model folder, hf-hub: id, or name.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write MODEL.onnx, for onnxruntime.")] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="Write MODEL.pt2, for torch.export.load.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("."),
    img_size: Annotated[int | None, typer.Option(min=32, help="Side in pixels to trace with; others work too.")] = None,
    pretrained: Annotated[bool, typer.Option(help="With its weights; --no-pretrained for random ones.")] = True,
) -> dict[str, Any]:
    """Export a model, with free batch and image size; it is compared with the original before it is called done.

    Raises:
        UserError: no format asked for, no such model, a missing package, or an export that computes something else.
    """
    if not (onnx or torch_export):
        raise UserError("say what to write: --onnx, --torch-export or both")
    if onnx:
        require("onnx", "onnxscript", "onnxruntime", extra="onnx")
    resolved = resolve(model)
    if pretrained and ":" not in resolved and not pretrained_tags(resolved.partition(".")[0]):
        raise UserError(f"{model} has no pretrained weights: give a run or a model folder, or --no-pretrained")
    network = load(model, pretrained=pretrained)
    config = data_config(network, img_size)
    size = tuple(config["input_size"])
    name = Path(model.rstrip("/")).name.replace(":", "-")
    done = {}
    for wanted, suffix, write in ((torch_export, ".pt2", export_pt2), (onnx, ".onnx", export_onnx)):
        if wanted:
            path = output / f"{name}{suffix}"
            done[str(path)] = write(network, path, size)
            print(f"{path}: images (batch, {size[0]}, height, width), the largest difference is {done[str(path)]:.2g}")
    return done


if __name__ == "__main__":
    run_commands(export)
