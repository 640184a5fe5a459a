"""The command that lists the zoo."""

from __future__ import annotations

from typing import Annotated

import typer

from ..terminal import say
from .zoo import names, table

__all__ = ["models"]


def models(
    pattern: Annotated[str | None, typer.Argument(help="Part of a name, or a glob such as 'resnet5*'.")] = None,
) -> None:
    """List the models: name, parameters, what pretrained=True means, and the tags of the weights to start from."""
    width = max(map(len, names()))
    count = weights = 0
    for row in table(pattern):
        if not count:
            say(f"{'model':<{width}}  parameters  pretrained=True loads")
        count, weights = count + 1, weights + len(row.tags)
        tags = f": {', '.join(row.tags)}" if row.tags else ""
        say(f"{row.name:<{width}}  {row.parameters / 1e6:8.2f} M  {row.pretrained}{tags}")
    say(f"{count} models, {weights} sets of weights; the first tag is the default")
