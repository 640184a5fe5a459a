"""`timm-cbam2 VERB …`: each verb is the function of the module of that name."""

from __future__ import annotations

from typing import NoReturn

from .errors import run_commands
from .evaluate import evaluate
from .finetune import finetune
from .predict import predict
from .zoo import models

__all__ = ["main"]


def main() -> NoReturn:
    """Entry point of the console script."""
    run_commands(finetune, evaluate, predict, models, help="CBAM2 image models: fine-tune, measure, use, list.")


if __name__ == "__main__":
    main()
