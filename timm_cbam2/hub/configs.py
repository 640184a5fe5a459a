"""`hf_configs/ARCHITECTURE/config.json`: every architecture for transformers, without weights and without network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..models.configuration_cbam2 import HEAD, Cbam2Config, architectures
from ..terminal import say

__all__ = ["config_texts", "configs"]


def config_texts() -> dict[str, str]:
    """The text of config.json for each architecture; class names are those both libraries infer from their number."""
    texts = {}
    for name in architectures():
        fields = Cbam2Config(architecture=name, architectures=[HEAD]).to_diff_dict()
        del fields["transformers_version"]  # or every new version would change every file
        texts[name] = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    return texts


def configs(
    folder: Annotated[Path, typer.Argument(help="Where to.")] = Path("hf_configs"),
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when a file is missing or old.")] = False,
) -> None:
    """Write config.json of every architecture, for AutoConfig, AutoModel.from_config and AutoImageProcessor."""
    texts = config_texts()
    old = [n for n, text in texts.items() if not _is_current(folder / n / "config.json", text)]
    extra = sorted(p.name for p in folder.glob("*") if p.name not in texts) if folder.is_dir() else []
    if check:
        if old or extra:
            raise UserError(f"{folder}: run `timm-cbam2 configs`; old: {', '.join(old + extra)[:300]}")
        say(f"{folder}: {len(texts)} files are current")
        return
    try:
        for name in old:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(texts[name], encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): give another folder") from error
    say(f"{folder}: {len(texts)} files, {len(old)} of them new or changed")


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text
