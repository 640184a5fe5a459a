"""Write a model for other runtimes: ONNX, torch.export, TorchScript; any batch and image size, checked before done."""

from __future__ import annotations

import io
import math
import os
import warnings
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Sequence

import torch
import typer
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.jit.frontend import FrontendError

from ..data.loading import data_config
from ..errors import UserError, one_line, require
from ..terminal import say
from .zoo import load, pretrained_tags, resolve, whole_name

__all__ = ["export", "export_onnx", "export_pt2", "export_torchscript"]

TOLERANCE = 1e-4
LARGE = 512  # side in pixels; a size that is bounded there is bounded by the model itself


def _ready(model: nn.Module) -> nn.Module:
    return reparameterize_model(model).eval().requires_grad_(False).cpu().float()


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """What torch has to say against an export, in one line."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, FrontendError) as error:
        raise UserError(f"{what}: {one_line(error, 300)}") from error


def _program(model: nn.Module, size: tuple[int, int, int]) -> torch.export.ExportedProgram:
    channels, height, width = size
    dynamic = {name: torch.export.Dim.DYNAMIC for name in (0, 2, 3)}
    # Without this a map of one position, the deepest of many a small image, would fix the size for ever.
    free = torch.fx.experimental._config.patch(backed_size_oblivious=True)
    with (
        free,
        _refusals(f"torch.export cannot trace this model with images of {height}x{width}, try another --img-size"),
    ):
        program = torch.export.export(model, (torch.randn(2, channels, height, width),), dynamic_shapes=(dynamic,))
    bounded = any(math.isfinite(allowed.upper) for allowed in program.range_constraints.values())
    if bounded and max(height, width) < LARGE:
        # Older versions of torch let such a map bound the size from above all the same; larger images have none.
        return _program(model, (channels, 2 * height, 2 * width))
    # Guesses about memory layout leave guards such as "a batch above 1", which what was traced does not need: what it
    # computes is compared on several sizes instead. Older versions of torch make none.
    if hasattr(program, "_guards_code"):
        program._guards_code = []
    return program


def _samples(size: tuple[int, int, int]) -> list[Tensor]:
    """Inputs of the size asked for, and of others in batch, height and width."""
    channels, height, width = size
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, height, width), (3, height, width), (2, height + 32, width), (1, height, width + 64)]
    return [torch.randn(batch, channels, h, w, generator=generator) for batch, h, w in shapes]


def _compare(
    path: Path, model: nn.Module, size: tuple[int, int, int], run: Callable[[Tensor], Tensor], tolerance: float
) -> float:
    """The largest difference between what `run` and the model compute, on several sizes."""
    worst = 0.0
    for images in _samples(size):
        with torch.no_grad(), _refusals(f"{path} was not written: images of shape {tuple(images.shape)} fail"):
            expected = model(images)
            got = run(images)
        difference = (got - expected).abs().max().item() if got.shape == expected.shape else float("inf")
        if not difference <= tolerance * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"{path} was not written: for images of shape {tuple(images.shape)} the exported model differs by "
                f"{difference:.2g}, more than {tolerance:g}; please report this with the model's name"
            )
        worst = max(worst, difference)
    return worst


def _in_onnxruntime(file: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def _in_openvino(file: Path) -> Callable[[Tensor], Tensor]:
    import openvino

    with _refusals("OpenVINO cannot compile this model"):
        # Some processors would compute in bf16 otherwise.
        compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


CHECKS = {"openvino": _in_openvino}


def _write(
    path: Path,
    model: nn.Module,
    size: tuple[int, int, int],
    save: Callable[[Path], None],
    reopen: Sequence[Callable[[Path], Callable[[Tensor], Tensor]]],
    tolerance: float,
) -> float:
    """Save beside `path`, compare what each of `reopen` makes of it with the model, and only then give it its name."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        try:
            save(temporary)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        worst = max(_compare(path, model, size, each(temporary), tolerance) for each in reopen)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # a file that could not be made
            temporary.unlink()
    return worst


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    size: tuple[int, int, int],
    tolerance: float = TOLERANCE,
    checks: Sequence[str] = (),
) -> float:
    """Write `model` to an ONNX file with free batch, height and width, and compare it in onnxruntime on several sizes.

    Args:
        model: Network from images (B, channels, H, W) to a tensor; its attention is reparameterized in a copy.
        path: File to write, whole or not at all.
        size: (channels, H, W) to trace with.
        tolerance: Largest difference allowed, times the largest output where that is above 1.
        checks: Other runtimes to compare the file in: "openvino".

    Returns:
        The largest difference seen.

    Raises:
        UserError: onnx, onnxscript or onnxruntime is missing, torch cannot export the model or trace it with this size,
            the file cannot be written, or computes something else.
    """
    require("onnx", "onnxscript", "onnxruntime", extra="onnx")
    for check in checks:
        require(check, extra=check)
    model = _ready(model)

    def save(file: Path) -> None:
        program = _program(model, size)
        with _refusals("torch.onnx cannot convert this model"):
            program = torch.onnx.export(
                program, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
            )
        program.save(file)

    reopen = [_in_onnxruntime, *(CHECKS[check] for check in checks)]
    return _write(Path(path), model, size, save, reopen, tolerance)


def export_pt2(
    model: nn.Module, path: str | os.PathLike[str], size: tuple[int, int, int], tolerance: float = TOLERANCE
) -> float:
    """Write `model` with torch.export to a `.pt2` file; arguments, result and errors as for `export_onnx`."""
    model = _ready(model)

    def save(file: Path) -> None:
        buffer = io.BytesIO()  # torch would say in its own words that a file cannot be written
        torch.export.save(_program(model, size), buffer)
        file.write_bytes(buffer.getbuffer())

    return _write(Path(path), model, size, save, [lambda file: torch.export.load(file).module()], tolerance)


def export_torchscript(
    model: nn.Module, path: str | os.PathLike[str], size: tuple[int, int, int], tolerance: float = TOLERANCE
) -> float:
    """Write `model` as TorchScript, scripted and so free in batch and size; arguments and result as for `export_onnx`.

    Raises:
        UserError: torch cannot script the model, the file cannot be written, or computes something else.
    """
    model = _ready(model)

    def save(file: Path) -> None:
        buffer = io.BytesIO()
        with _refusals("torch.jit cannot script this model"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # asked for all the same
            torch.jit.save(torch.jit.script(model), buffer)
        file.write_bytes(buffer.getbuffer())

    def reopen(file: Path) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            return torch.jit.load(file)

    return _write(Path(path), model, size, save, [reopen], tolerance)


def export(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="Run or model folder, hf-hub: id, or name.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write MODEL.onnx, for onnxruntime.")] = False,
    torch_export: Annotated[
        bool, typer.Option("--torch-export", help="Write MODEL.pt2, for torch.export.load.")
    ] = False,
    torchscript: Annotated[bool, typer.Option("--torchscript", help="Write MODEL.pt, for torch.jit.load.")] = False,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("."),
    check: Annotated[
        list[str] | None, typer.Option(help="Compare the ONNX file in another runtime too: openvino (extra openvino).")
    ] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="Side in pixels to trace with; others work too.")] = None,
    pretrained: Annotated[bool, typer.Option(help="With its weights; --no-pretrained for random ones.")] = True,
) -> dict[str, Any]:
    """Export a model, with free batch and image size; it is compared with the original before it is called done.

    Raises:
        UserError: no format asked for, no such model, a missing package, a model or an image size that torch cannot
            export, or an export that computes something else.
    """
    if not (onnx or torch_export or torchscript):
        raise UserError("say what to write: --onnx, --torch-export, --torchscript, or several of them")
    for name in check or ():
        if name not in CHECKS:
            raise UserError(f"--check {name} is no runtime known here; give {', '.join(CHECKS)}")
        if not onnx:
            raise UserError(f"--check {name} reads the ONNX file: add --onnx")
        require(name, extra=name)
    if onnx:
        require("onnx", "onnxscript", "onnxruntime", extra="onnx")
    resolved = resolve(model)
    if pretrained and ":" not in resolved and not pretrained_tags(resolved.partition(".")[0]):
        raise UserError(f"{model} has no pretrained weights: give a run or a model folder, or --no-pretrained")
    network = load(model, pretrained=pretrained)
    config = data_config(network, img_size)
    size = tuple(config["input_size"])
    name = Path(whole_name(model)).name.replace(":", "-")
    done = {}
    formats = (
        (torchscript, ".pt", export_torchscript),
        (torch_export, ".pt2", export_pt2),
        (onnx, ".onnx", partial(export_onnx, checks=check or ())),
    )
    for wanted, suffix, write in formats:
        if wanted:
            path = output / f"{name}{suffix}"
            done[str(path)] = write(network, path, size)
            say(f"{path}: images (batch, {size[0]}, height, width), the largest difference is {done[str(path)]:.2g}")
    return done
