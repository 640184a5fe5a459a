"""Recipes and earlier runs as defaults: `--recipe NAME` and `--resume FOLDER` bring many options at once."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Mapping, Sequence

import typer

from ..errors import UserError, one_line
from ..hub.run_folder import read_settings, with_attention_decay
from .folds import read_folds

__all__ = ["Applied", "apply_recipe", "apply_resume", "list_recipes", "read_recipe"]

RECIPES = Path(__file__).with_name("recipes")


def read_recipe(name: str | Path, allowed: Sequence[str] | None = None) -> dict[str, Any]:
    """The options that a recipe sets, as keyword arguments of `finetune`: `finetune(**read_recipe("finetune"), …)`.

    Args:
        name: one of those in timm_cbam2/training/recipes, or a YAML file.
        allowed: the names that options may have; None leaves it to `finetune` to refuse others.

    Raises:
        UserError: no such recipe, not YAML, or a key that is no option; the nearest is given.
    """
    import yaml

    path = Path(name).expanduser()
    if not path.suffix:
        path = RECIPES / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
            near = difflib.get_close_matches(str(name), known, 1, 0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--recipe {name}: {hint}there are {', '.join(known)}, or give a .yaml file")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--recipe {name} cannot be read: {one_line(error, 200)}") from error
    if not isinstance(options, dict):
        raise UserError(f"--recipe {name} holds no options: write one 'epochs: 10' per line")
    renamed = {str(key).replace("-", "_"): value for key, value in options.items()}
    for key in renamed:
        if key in ("recipe", "resume") or allowed is not None and key not in allowed:
            near = difflib.get_close_matches(key, allowed or (), 1, 0.4)
            hint = f"did you mean {near[0]}?" if near else f"options are {', '.join(allowed or ())}"
            raise UserError(f"--recipe {name}: {key} is not an option; {hint}")
    return renamed


def list_recipes() -> str:
    """A table of the recipes and the Accelerate configurations in the package, with the first line of each."""
    lines = []
    for title, folder, option in (
        ("recipes, for --recipe NAME", RECIPES, "stem"),
        (
            "Accelerate configurations, for accelerate launch --config_file FILE -m timm_cbam2.finetune",
            RECIPES / "accelerate",
            "name",
        ),
    ):
        lines.append(f"{title} (in {folder}):")
        for path in sorted(folder.glob("*.yaml")):
            first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            lines.append(f"  {getattr(path, option):<20} {first}")
    return "\n".join(lines)


def _as_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values as click wants them in a default map."""
    defaults = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            value = [f"{k}={v!r}" for k, v in value.items()]
        defaults[key] = value
    return defaults


def _remember(context: typer.Context, options: Mapping[str, Any]) -> None:
    """Make `options` the defaults of this command, so that what is typed overrides them."""
    context.default_map = {**(context.default_map or {}), **_as_defaults(options)}


def _options_of(context: typer.Context) -> list[str]:
    return [parameter.name for parameter in context.command.params]


class Applied(str):
    """The name of a recipe whose options have become the defaults of the command."""


def apply_recipe(context: typer.Context, name: str | None) -> str | None:
    """Callback of --recipe."""
    if name is None or context.resilient_parsing:
        return name
    if name == "list":
        print(list_recipes())
        raise typer.Exit
    _remember(context, read_recipe(name, _options_of(context)))
    return Applied(name)


def apply_resume(context: typer.Context, where: str | None) -> str | None:
    """Callback of --resume: a run folder brings its own settings along."""
    if where is None or where == "auto" or context.resilient_parsing:
        return where
    settings = read_settings(Path(where).expanduser()) or read_folds(Path(where).expanduser())
    if settings is None:
        raise UserError(f"--resume {where} is no run folder (it has no run.json): give one, or auto")
    settings = with_attention_decay(settings)
    options = {name: settings[name] for name in _options_of(context) if name in settings}
    options = {k: v for k, v in options.items() if k not in ("recipe", "resume") and v is not None}
    _remember(context, options | {"output": str(Path(where).expanduser())})
    return where
