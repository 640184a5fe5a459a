"""A Hugging Face Space that serves the page of `timm-cbam2 app`: what it consists of."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, SpaceCardData

from ..errors import UserError, require
from .card import LICENSES, license_of

__all__ = ["space_operations"]

PYTHON = "3.11"


def space_operations(space_id: str, folder: Path | None, model_id: str | None = None) -> list[CommitOperationAdd]:
    """The files of a Space: app.py, this package with its embedded checkpoint, requirements.txt, a card, and a model.

    The package goes up as it is installed here, so that the Space runs the same code whether it is on an index or not.

    Args:
        space_id: "user/name".
        folder: a checked model folder to show first; None shows the embedded checkpoint.
        model_id: where that model is on the Hub, for the card.

    Raises:
        UserError: the package is not installed, so its requirements are not known, or gradio is not.
    """
    require("gradio", extra="app")
    package = Path(__file__).resolve().parent.parent
    files = {f"timm_cbam2/{path.relative_to(package).as_posix()}": path for path in _files(package)}
    checkpoints = package.parent / "checkpoints"  # of a checkout; in an installed package they lie within
    if checkpoints.is_dir():
        files |= {f"timm_cbam2/{path.relative_to(package.parent).as_posix()}": path for path in _files(checkpoints)}
    config: dict[str, Any] = {}
    if folder is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = re.sub(r"[^\w.-]+", "-", _name(folder)).strip("-.") or "model"
        files |= {f"model/{name}/{part}": folder / part for part in ("config.json", "model.safetensors")}
    return [
        CommitOperationAdd("README.md", _card(space_id, config, model_id).encode()),
        CommitOperationAdd("requirements.txt", _requirements().encode()),
        CommitOperationAdd("app.py", str(package / "seeing" / "page" / "app.py")),
        *(CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())),
    ]


def _files(folder: Path) -> list[Path]:
    hidden = ("__pycache__",)
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and not any(part in hidden for part in p.parts)]


def _name(folder: Path) -> str:
    folder = folder.resolve()
    return folder.parent.name if folder.name in ("best", "last") else folder.name


def _requirements() -> str:
    try:
        lines = requires("timm_cbam2") or []
    except PackageNotFoundError as error:
        raise UserError(
            "timm_cbam2 is not installed, so its requirements are not known: pip install it first"
        ) from error
    wanted = [line.partition(";")[0].strip() for line in lines if "extra ==" not in line or '"app"' in _quoted(line)]
    return "\n".join(wanted) + "\n"


def _quoted(line: str) -> str:
    return line.replace("'", '"')


def _card(space_id: str, config: dict[str, Any], model_id: str | None) -> str:
    license_name = license_of(config) if config else "apache-2.0"
    is_known = license_name in LICENSES
    data = SpaceCardData(
        title=space_id.partition("/")[2],
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=PYTHON,
        app_file="app.py",
        license=license_name if is_known else "other",
        license_name=None if is_known else license_name,
        models=[model_id] if model_id else None,
        tags=["timm", "cbam2", "attention", "image-classification"],
    )
    text = "What a CBAM2 image model answers, and what it attends to. The page is `timm-cbam2 app`, which also runs on "
    text += "your own machine. It loads weights as data only and runs no code of theirs."
    return f"---\n{data.to_yaml()}\n---\n\n{text}\n"
