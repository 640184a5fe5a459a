"""`timm-cbam2 VERB …`: each verb is the function of the module of that name."""

from __future__ import annotations

from typing import NoReturn

from .errors import run_commands
from .evidence.benchmark.command import benchmark
from .finetune import finetune
from .hub.configs import configs
from .hub.doctor import doctor
from .hub.export import export
from .hub.listing import models
from .hub.push import pull, push
from .insertion.command import insert
from .insertion.remove_command import remove
from .seeing.evaluate import evaluate
from .seeing.explain import explain
from .seeing.page.app import app
from .seeing.predict import predict
from .seeing.report import report

__all__ = ["main"]


def main() -> NoReturn:
    """Entry point of the console script."""
    run_commands(
        finetune,
        insert,
        remove,
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
        doctor,
        help="CBAM2 image models: fine-tune, measure, use, look into, list, share.",
    )


if __name__ == "__main__":
    main()
