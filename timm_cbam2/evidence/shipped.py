"""The models that come with this project: `checkpoints/ARCHITECTURE.TAG/`, with checksums and an answer to replay."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Sequence

import timm
import torch
import typer
from safetensors.torch import load_file, save_file
from timm.models import get_arch_name
from torch import Tensor

from ..errors import UserError, one_line, run_commands
from ..hub.card import card
from ..hub.folder import check_folder, whole
from ..hub.zoo import run_settings
from ..models.resnet_cbam2 import CIFAR_DEPTHS
from ..seeing.report import command

__all__ = ["make", "ship", "verify"]

SUMS = "SHA256SUMS"
EXAMPLE = "example.safetensors"
LOG = "training.jsonl"
DEFAULTS = dict(in_chans=3, global_pool="avg")  # of the models that have names
TOLERANCE = dict(rtol=1e-3, atol=1e-4)  # between machines; the same machine gives the same bits


def make(source: str | Path, name: str, root: str | Path = "checkpoints") -> Path:
    """Turn the folder of a trained model into `ROOT/NAME`, ready to be shipped.

    Args:
        source: Folder of a model; a run beside it is described in the card, with those that it started from.
        name: "architecture.tag". Weights of a CIFAR ResNet are found under it; another model is opened as a folder.
        root: Where to.

    Returns:
        The folder, which holds config.json, model.safetensors, README.md, an input with its logits, and SHA256SUMS;
        and, of a run, the measurements of each epoch.

    Raises:
        ValueError: The model is damaged, of another architecture, or has arguments that its name does not tell; or the
            images to measure it on, or the run it started from, are gone.
    """
    source = Path(source)
    config = check_folder(source)
    architecture, _, tag = name.partition(".")
    if config["architecture"] != architecture or not tag or not tag.isidentifier():
        raise ValueError(f"{name!r} does not fit: write {config['architecture']}.TAG, with a TAG of letters and digits")
    arguments = dict(config.get("model_args") or {})
    arguments.pop("cbam2", None)  # read from the folder by whoever asks for the name
    if _has_a_name(name):
        untold = {key: value for key, value in arguments.items() if DEFAULTS.get(key) != value}
        if untold:
            raise ValueError(f"{source} has {untold}, which {name!r} does not tell")
    config["pretrained_cfg"]["tag"] = tag
    place = f"checkpoints/{name}"  # where it will lie, whatever `root` is
    with whole(Path(root) / name) as folder:
        shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        # It is on no Hub: timm has it by name or opens the folder, as transformers does.
        text = card(source, f"user/{name}", figures=_figures(source))
        text = text.replace(f"hf-hub:user/{name}", name if _has_a_name(name) else f"local-dir:{place}")
        text = text.replace(f'"user/{name}"', f'"{place}"')
        runs = _runs(source)
        if runs:
            one_by_one = ", one run after the other" if len(runs) > 1 else ""
            text += (
                f"\n## Commands\n\nTo train it, and to measure it again; {LOG} has each epoch's figures, in the "
                f"training's precision{one_by_one}.\n\n"
                f"```bash\n{_commands(runs, name if _has_a_name(name) else place)}\n```\n"
            )
            (folder / LOG).write_bytes(b"".join((run / "metrics.jsonl").read_bytes() for run in runs))
        (folder / "README.md").write_text(text, encoding="utf-8")
        images = torch.randn(2, *config["pretrained_cfg"]["input_size"], generator=torch.Generator().manual_seed(0))
        save_file({"input": images, "logits": _answer(folder, images)}, folder / EXAMPLE)
        lines = [f"{_sha256(file)}  {file.name}" for file in sorted(folder.iterdir())]
        (folder / SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(root) / name


def verify(folder: str | Path) -> None:
    """Check a shipped folder: its checksums, its form, and that it still gives the stored answer.

    Raises:
        ValueError: What is not as it was shipped.
    """
    folder = Path(folder)
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    names = {file.name for file in folder.iterdir()} - {SUMS}
    if names != sums.keys():
        raise ValueError(f"{folder}: {', '.join(sorted(names ^ sums.keys()))}: not both there and in {SUMS}")
    for name, digest in sums.items():
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} is not the file that was shipped: its checksum differs")
    config = check_folder(folder)
    if folder.name != f"{config['architecture']}.{config['pretrained_cfg'].get('tag')}":
        raise ValueError(f"{folder} holds {config['architecture']}.{config['pretrained_cfg'].get('tag')}")
    example = load_file(folder / EXAMPLE)
    logits = _answer(folder, example["input"])
    if not torch.allclose(logits, example["logits"], **TOLERANCE):
        gap = (logits - example["logits"]).abs().max().item()
        raise ValueError(f"{folder} gives other logits than when it was shipped (by up to {gap:.3g})")


def _has_a_name(name: str) -> bool:
    """Whether `timm.create_model(name, pretrained=True)` finds weights in `checkpoints/`."""
    return name.partition(".")[0].removesuffix("_cbam2") in CIFAR_DEPTHS


def _figures(source: Path) -> dict[str, float] | None:
    """What `evaluate` says of the model, in full precision, where its run measured it in mixed precision."""
    run = run_settings(str(source))
    if run is None or run.get("mixed_precision") in (None, "no"):
        return None
    from ..seeing.evaluate import evaluate

    with tempfile.TemporaryDirectory() as folder:
        found = evaluate(str(source), output=Path(folder))
    return {"val_accuracy": found["top1"], "val_top5": found.get("top5"), "val_loss": found["loss"]}


def _runs(source: Path) -> list[Path]:
    """The runs that made a model, the first one first: a run may start from the model of another."""
    runs: list[Path] = []
    settings = run_settings(str(source))
    while settings is not None:
        runs.insert(0, Path(settings["folder"]))
        start = str(settings["model"])
        settings = run_settings(start)
        if settings is None and not start.startswith("hf-hub:") and not timm.is_model(start.partition(".")[0]):
            raise ValueError(f"{runs[0]} started from {start}, which is no run here: go to where it was started")
    return runs


def _commands(runs: Sequence[Path], model: str) -> str:
    """The command lines that train and measure a model, without the places where its images and earlier runs lay."""
    lines = []
    for number, run in enumerate(runs, 1):
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
        settings["data"] = Path(settings["data"]).name
        if number > 1:  # from a folder best/ or last/, or from the run
            start = Path(settings["model"].removeprefix("local-dir:")).relative_to(runs[number - 2])
            settings["model"] = str(Path(f"run{number - 1}") / start)
        lines.append(command(settings) + (f" --output run{number}" if number < len(runs) else ""))
    held = ["--val-split", settings["val_split"]] if settings.get("val_split") else []
    return "\n".join([*lines, shlex.join(["timm-cbam2", "evaluate", model, "--data", settings["data"], *held])])


def _answer(folder: Path, images: Tensor) -> Tensor:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        return model(images)  # (B, num_classes)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def ship(
    source: Annotated[Path, typer.Argument(help="Folder of a trained model, such as a run's best/.")],
    name: Annotated[str, typer.Argument(metavar="ARCHITECTURE.TAG", help="What to call it.")],
    root: Annotated[Path, typer.Option(help="Where the shipped models lie.")] = Path("checkpoints"),
) -> None:
    """Make a model one that comes with the project."""
    try:
        folder = make(source, name, root)
        verify(folder)
    except (OSError, ValueError) as error:
        raise UserError(one_line(error)) from error
    size = sum(file.stat().st_size for file in folder.iterdir())
    model = get_arch_name(name) if _has_a_name(name) else f"local-dir:{folder}"
    print(f"{folder}: {size / 1e6:.1f} MB; `timm.create_model({model!r}, pretrained=True)` starts from it")


if __name__ == "__main__":
    run_commands(ship)
