"""`timm-cbam2 VERB …`: each verb is the function of the module of that name."""

from __future__ import annotations

from typing import NoReturn

from .app import app
from .benchmark import benchmark
from .configs import configs
from .errors import run_commands
from .evaluate import evaluate
from .explain import explain
from .export import export
from .finetune import finetune
from .predict import predict
from .push import pull, push
from .run_report import report
from .zoo import models

__all__ = ["main"]


def main() -> NoReturn:
    """Entry point of the console script."""
    run_commands(
        finetune,
        evaluate,
        predict,
        explain,
        report,
        app,
        export,
        benchmark,
        models,
        push,
        pull,
        configs,
        help="CBAM2 image models: fine-tune, measure, use, look into, list, share.",
    )


if __name__ == "__main__":
    main()
