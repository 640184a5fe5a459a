"""Every option of `finetune`, with its type, default, limits and help: what the command line and Python both take."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Callable, get_type_hints

import typer

from .automatic import number_or_auto
from .recipe import apply_recipe, apply_resume

__all__ = ["DEFAULT_MODEL", "Options", "option_names", "takes_options"]

DEFAULT_MODEL = "resnet20_cbam2"
DATA, MODEL, OPTIM, AUG, SAVE, MACHINE = "Data", "Model", "Optimisation", "Augmentation", "Run folder", "Machines"


def _pairs(panel: str, help: str) -> Any:
    return _option(panel, help, metavar="KEY=VALUE")


def _option(panel: str, help: str, *flags: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


@dataclass
class Options:
    """One field an option; `--batch-size` on the command line is `batch_size` in Python."""

    data: Annotated[str, _option(DATA, "Image folder, parquet/arrow, Hub set owner/name, digits or clutter.")] = (
        "digits"
    )
    model: Annotated[
        str | None,
        _option(
            MODEL, f"Registered name, run or model folder, or hf-hub: id; {DEFAULT_MODEL} if nothing says another."
        ),
    ] = None
    start_from: Annotated[
        str | None,
        _option(MODEL, "Weights of any origin, plain or with CBAM2: folder, file or hf-hub: id."),
    ] = None
    pretrained: Annotated[
        bool | None,
        _option(MODEL, "Start from weights; the default wherever they lie here, and for hf-hub: ids and tags."),
    ] = None
    epochs: Annotated[int, _option(OPTIM, "Times that every image is seen.", min=1)] = 6
    batch_size: Annotated[
        int,
        _option(
            OPTIM,
            "Images per step and process; auto: as many as a GPU takes.",
            parser=number_or_auto(int),
            metavar="NUMBER|auto",
        ),
    ] = 32
    lr: Annotated[
        float | None,
        _option(
            OPTIM,
            "Peak learning rate; for adamw 2e-3, or 5e-4 if pretrained; auto: found by 100 steps with a rising one.",
            parser=number_or_auto(float),
            metavar="NUMBER|auto",
        ),
    ] = None
    weight_decay: Annotated[float, _option(OPTIM, "Not of norms, biases and CBAM2.", min=0.0)] = 0.05
    opt: Annotated[str, _option(OPTIM, "Optimizer, by timm's name.")] = "adamw"
    opt_kwargs: Annotated[list[str], _pairs(OPTIM, "More of the optimizer's arguments.")] = field(default_factory=list)
    momentum: Annotated[float | None, _option(OPTIM, "For optimizers that have one.", min=0.0)] = None
    sched: Annotated[str, _option(OPTIM, "Learning rate schedule, by timm's name.")] = "cosine"
    warmup_epochs: Annotated[float, _option(OPTIM, "Epochs of rising learning rate, at most half of all.", min=0.0)] = (
        1.0
    )
    layer_decay: Annotated[
        float | None, _option(OPTIM, "Learning rate of each layer as a share of the next one's.", min=0.0)
    ] = None
    attention_lr_scale: Annotated[
        float | None,
        _option(
            OPTIM,
            "Learning rate of attention, times this; not given, 0.3 by adamw and 3 by sgd in a ResNet with CBAM2 from "
            "random weights, else 1.",
            min=1e-6,
        ),
    ] = None
    attention_weight_decay: Annotated[
        float | None, _option(OPTIM, "That of attention, where it is another; CBAM2 has none.", min=0.0)
    ] = None
    attention_delay_epochs: Annotated[
        float, _option(OPTIM, "Epochs in which attention does not learn; a new CBAM2 then changes nothing.", min=0.0)
    ] = 0.0
    accumulate: Annotated[int, _option(OPTIM, "Batches whose gradients make one step.", min=1)] = 1
    clip_grad: Annotated[float | None, _option(OPTIM, "Largest norm of the gradient.", min=0.0)] = None
    ema: Annotated[
        float | None, _option(OPTIM, "Average the weights with this decay, such as 0.999; it is what is kept.", min=0.0)
    ] = None
    bce: Annotated[bool, _option(OPTIM, "Binary cross-entropy over the classes.", "--bce/--no-bce")] = False
    bce_target_threshold: Annotated[float | None, _option(OPTIM, "With --bce, targets above it count as 1.")] = None
    balance: Annotated[
        str,
        _option(
            OPTIM,
            "For classes of unequal size: none; sampler (each class is drawn equally often); or weights (each class "
            "counts equally in the loss).",
        ),
    ] = "none"
    distill_from: Annotated[
        str | None,
        _option(OPTIM, "Learn from this model's answers too: a run, such as of the twin without attention."),
    ] = None
    distill_alpha: Annotated[float, _option(OPTIM, "Share of the teacher in the loss.", min=0.0, max=1.0)] = 0.5
    distill_temperature: Annotated[
        float, _option(OPTIM, "Divides the logits of both, so that small probabilities count.", min=0.01)
    ] = 2.0
    label_smoothing: Annotated[float, _option(OPTIM, "Share of the target that is spread.", min=0.0, max=0.9)] = 0.0
    patience: Annotated[int | None, _option(OPTIM, "Stop after so many epochs without a better one.", min=1)] = None
    train: Annotated[str, _option(MODEL, "all, attention, attention+head, or head; the rest stays frozen.")] = "all"
    drop: Annotated[
        float | None, _option(MODEL, "Dropout before the classifier (timm's drop_rate), such as 0.2.", min=0.0)
    ] = None
    drop_path: Annotated[
        float | None,
        _option(MODEL, "Share of residual branches that are left out (timm's drop_path_rate), such as 0.1.", min=0.0),
    ] = None
    model_kwargs: Annotated[list[str], _pairs(MODEL, "Arguments of timm.create_model.")] = field(default_factory=list)
    cbam2: Annotated[list[str], _pairs(MODEL, "Options of every CBAM2 block.")] = field(default_factory=list)
    grad_checkpointing: Annotated[
        bool, _option(MODEL, "Less memory.", "--grad-checkpointing/--no-grad-checkpointing")
    ] = False
    channels_last: Annotated[
        bool, _option(MODEL, "Memory format; often faster.", "--channels-last/--no-channels-last")
    ] = False
    compile: Annotated[bool, _option(MODEL, "torch.compile the model.", "--compile/--no-compile")] = False
    augment: Annotated[
        str, _option(AUG, "none, light (no mirroring), mild, padded (CIFAR's), standard (timm's), or auto.")
    ] = "auto"
    auto_augment: Annotated[str | None, _option(AUG, "timm's, such as rand-m9-mstd0.5-inc1.")] = None
    random_erasing: Annotated[float, _option(AUG, "Probability of erasing a part.", min=0.0, max=1.0)] = 0.0
    aug_repeats: Annotated[int, _option(AUG, "Times in a row that an image occurs, augmented anew.", min=1)] = 1
    mixup: Annotated[float, _option(AUG, "Mixup's alpha.", min=0.0)] = 0.0
    cutmix: Annotated[float, _option(AUG, "CutMix's alpha.", min=0.0)] = 0.0
    img_size: Annotated[int | None, _option(DATA, "Side in pixels, in place of the model's own.")] = None
    val_img_size: Annotated[int | None, _option(DATA, "The same to validate with, if it differs.")] = None
    val_split: Annotated[
        str,
        _option(DATA, "Share held out where the data have no val split, last:N for the last N images, or fold:2/5."),
    ] = "0.2"
    folds: Annotated[
        int | None,
        _option(DATA, "Cross-validation: so many runs, each validated on another part of the images.", min=2),
    ] = None
    image_column: Annotated[str | None, _option(DATA, "Column with the images, for a data set in tables.")] = None
    label_column: Annotated[str | None, _option(DATA, "Column with the labels, for a data set in tables.")] = None
    labels: Annotated[
        str | None, _option(DATA, "Table that says what is in the images of a folder: .csv, .tsv or .jsonl.")
    ] = None
    multi_label: Annotated[
        bool,
        _option(
            DATA,
            "Several labels an image: a text with | ; , or spaces between them, or a column of 0 and 1 for each class.",
            "--multi-label/--no-multi-label",
        ),
    ] = False
    skip_bad_images: Annotated[
        bool, _option(DATA, "Count unreadable images and go on.", "--skip-bad-images/--no-skip-bad-images")
    ] = False
    cache_images: Annotated[
        bool, _option(DATA, "Decode small images once and keep them in memory.", "--cache-images/--no-cache-images")
    ] = False
    streaming: Annotated[
        bool, _option(DATA, "Read as used: sets larger than the disk.", "--streaming/--no-streaming")
    ] = False
    workers: Annotated[int | None, _option(DATA, "Processes that read images; none for digits, clutter.", min=0)] = None
    seed: Annotated[int, _option(OPTIM, "Of the weights, the order and the augmentation.", min=0, max=2**31 - 1)] = 0
    recipe: Annotated[
        str | None,
        _option(
            SAVE, "Options from a recipe or a .yaml file; `list` shows them.", is_eager=True, callback=apply_recipe
        ),
    ] = None
    output: Annotated[Path | None, _option(SAVE, "Run folder; runs/MODEL-DATA-TIME by default.")] = None
    resume: Annotated[
        str | None,
        _option(
            SAVE,
            "A run folder to go on with, settings and all; or auto: go on in --output if there is something.",
            is_eager=True,
            callback=apply_resume,
        ),
    ] = None
    save_every: Annotated[str, _option(SAVE, "Checkpoint after so many steps, or 'N epochs', or never.")] = "1 epoch"
    keep: Annotated[int, _option(SAVE, "Checkpoints to keep while training.", min=1)] = 2
    track: Annotated[
        str | None, _option(SAVE, "Accelerate's trackers, such as tensorboard,trackio,wandb; metrics.jsonl anyway.")
    ] = None
    push_to: Annotated[str | None, _option(SAVE, "Hub repository for the best model.", metavar="USER/NAME")] = None
    num_processes: Annotated[
        int | None, _option(MACHINE, "Start so many processes here, one for each GPU or share of the CPU.", min=1)
    ] = None
    mixed_precision: Annotated[str | None, _option(MACHINE, "no, fp16 or bf16.")] = None
    sync_bn: Annotated[bool, _option(MACHINE, "BatchNorm over all GPUs.", "--sync-bn/--no-sync-bn")] = False
    cpu: Annotated[bool, _option(MACHINE, "Use no GPU.", "--cpu/--no-cpu")] = False


def option_names() -> list[str]:
    """The names of all options, in the order of the help."""
    return [f.name for f in fields(Options)]


def takes_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give `function(**options)` the signature of `Options`, for Python's help and for the command line."""
    hints = get_type_hints(Options, include_extras=True)
    parameters = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=f.default if f.default is not MISSING else f.default_factory(),
            annotation=hints[f.name],
        )
        for f in fields(Options)
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=dict[str, Any])
    function.__annotations__ = {**hints, "return": dict[str, Any]}
    return function
