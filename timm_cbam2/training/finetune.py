"""Fine-tune any model of the zoo, or any timm model, on labelled images: an Accelerate loop over timm's parts."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.sources import Images, check_apart
from ..errors import UserError, command_line, require
from ..hub.zoo import resolve, whole_name
from .guards import lock
from .launch import is_launched, launch, lost_peers, make_accelerator, slow_precision, tracker_names
from .settings import OF_THE_CALL, Applied, apply_recipe, apply_resume, check_options, resolved_text

__all__ = ["finetune"]

DATA, MODEL, OPTIM, AUG, SAVE, MACHINE = "Data", "Model", "Optimisation", "Augmentation", "Run folder", "Machines"


def _option(panel: str, help: str, *flags: str, **more: Any) -> Any:
    return typer.Option(*flags, help=help, rich_help_panel=panel, **more)


def finetune(
    data: Annotated[str, _option(DATA, "Image folder, parquet/arrow, Hub data set owner/name, or digits.")] = "digits",
    model: Annotated[str, _option(MODEL, "Registered name, run or model folder, or hf-hub: id.")] = "resnet20_cbam2",
    pretrained: Annotated[
        bool | None,
        _option(MODEL, "Start from weights; the default wherever they lie here, and for hf-hub: ids and tags."),
    ] = None,
    epochs: Annotated[int, _option(OPTIM, "Times that every image is seen.", min=1)] = 6,
    batch_size: Annotated[int, _option(OPTIM, "Images per step and process.", min=2)] = 32,
    lr: Annotated[float | None, _option(OPTIM, "Peak learning rate; for adamw 2e-3, or 5e-4 if pretrained.")] = None,
    weight_decay: Annotated[float, _option(OPTIM, "Not applied to norms, biases, temperatures.", min=0.0)] = 0.05,
    opt: Annotated[str, _option(OPTIM, "Optimizer, by timm's name.")] = "adamw",
    opt_kwargs: Annotated[list[str], _option(OPTIM, "More of the optimizer's arguments.", metavar="KEY=VALUE")] = [],  # noqa: B006
    momentum: Annotated[float | None, _option(OPTIM, "For optimizers that have one.", min=0.0)] = None,
    sched: Annotated[str, _option(OPTIM, "Learning rate schedule, by timm's name.")] = "cosine",
    warmup_epochs: Annotated[
        float, _option(OPTIM, "Epochs of rising learning rate, at most half of all.", min=0.0)
    ] = 1.0,
    layer_decay: Annotated[
        float | None, _option(OPTIM, "Learning rate of each layer as a share of the next one's.", min=0.0)
    ] = None,
    attention_lr_scale: Annotated[float, _option(OPTIM, "Learning rate of attention, times this.", min=1e-6)] = 1.0,
    accumulate: Annotated[int, _option(OPTIM, "Batches whose gradients make one step.", min=1)] = 1,
    clip_grad: Annotated[float | None, _option(OPTIM, "Largest norm of the gradient.", min=0.0)] = None,
    ema: Annotated[
        float | None, _option(OPTIM, "Average the weights with this decay, such as 0.999; it is what is kept.", min=0.0)
    ] = None,
    bce: Annotated[bool, _option(OPTIM, "Binary cross-entropy over the classes.", "--bce/--no-bce")] = False,
    bce_target_threshold: Annotated[float | None, _option(OPTIM, "With --bce, targets above it count as 1.")] = None,
    label_smoothing: Annotated[float, _option(OPTIM, "Share of the target that is spread.", min=0.0, max=0.9)] = 0.0,
    patience: Annotated[int | None, _option(OPTIM, "Stop after so many epochs without a better one.", min=1)] = None,
    train: Annotated[str, _option(MODEL, "all, attention, attention+head, or head; the rest stays frozen.")] = "all",
    model_kwargs: Annotated[list[str], _option(MODEL, "Arguments of timm.create_model.", metavar="KEY=VALUE")] = [],  # noqa: B006
    cbam2: Annotated[list[str], _option(MODEL, "Options of every CBAM2 block.", metavar="KEY=VALUE")] = [],  # noqa: B006
    grad_checkpointing: Annotated[
        bool, _option(MODEL, "Less memory.", "--grad-checkpointing/--no-grad-checkpointing")
    ] = False,
    channels_last: Annotated[
        bool, _option(MODEL, "Memory format; often faster.", "--channels-last/--no-channels-last")
    ] = False,
    compile: Annotated[bool, _option(MODEL, "torch.compile the model.", "--compile/--no-compile")] = False,
    augment: Annotated[str, _option(AUG, "none, light (no mirroring), mild, standard (timm's), or auto.")] = "auto",
    auto_augment: Annotated[str | None, _option(AUG, "timm's, such as rand-m9-mstd0.5-inc1.")] = None,
    random_erasing: Annotated[float, _option(AUG, "Probability of erasing a part.", min=0.0, max=1.0)] = 0.0,
    aug_repeats: Annotated[int, _option(AUG, "Times in a row that an image occurs, augmented anew.", min=1)] = 1,
    mixup: Annotated[float, _option(AUG, "Mixup's alpha.", min=0.0)] = 0.0,
    cutmix: Annotated[float, _option(AUG, "CutMix's alpha.", min=0.0)] = 0.0,
    img_size: Annotated[int | None, _option(DATA, "Side in pixels, in place of the model's own.")] = None,
    val_img_size: Annotated[int | None, _option(DATA, "The same to validate with, if it differs.")] = None,
    val_split: Annotated[
        str, _option(DATA, "Share held out where the data have no val split, or last:N for the last N images.")
    ] = "0.2",
    image_column: Annotated[str | None, _option(DATA, "Column with the images, for a data set in tables.")] = None,
    label_column: Annotated[str | None, _option(DATA, "Column with the labels, for a data set in tables.")] = None,
    skip_bad_images: Annotated[
        bool, _option(DATA, "Count unreadable images and go on.", "--skip-bad-images/--no-skip-bad-images")
    ] = False,
    cache_images: Annotated[
        bool, _option(DATA, "Decode small images once and keep them in memory.", "--cache-images/--no-cache-images")
    ] = False,
    streaming: Annotated[
        bool, _option(DATA, "Read as used: sets larger than the disk.", "--streaming/--no-streaming")
    ] = False,
    workers: Annotated[int | None, _option(DATA, "Processes that read images; none for digits.", min=0)] = None,
    seed: Annotated[int, _option(OPTIM, "Of the weights, the order and the augmentation.", min=0, max=2**31 - 1)] = 0,
    recipe: Annotated[
        str | None,
        _option(
            SAVE, "Options from a recipe or a .yaml file; `list` shows them.", is_eager=True, callback=apply_recipe
        ),
    ] = None,
    output: Annotated[Path | None, _option(SAVE, "Run folder; runs/MODEL-DATA-TIME by default.")] = None,
    resume: Annotated[
        str | None,
        _option(
            SAVE,
            "A run folder to go on with, settings and all; or auto: go on in --output if there is something.",
            is_eager=True,
            callback=apply_resume,
        ),
    ] = None,
    save_every: Annotated[str, _option(SAVE, "Checkpoint after so many steps, or 'N epochs', or never.")] = "1 epoch",
    keep: Annotated[int, _option(SAVE, "Checkpoints to keep while training.", min=1)] = 2,
    track: Annotated[
        str | None, _option(SAVE, "Accelerate's trackers, such as tensorboard,trackio,wandb; metrics.jsonl anyway.")
    ] = None,
    push_to: Annotated[str | None, _option(SAVE, "Hub repository for the best model.", metavar="USER/NAME")] = None,
    num_processes: Annotated[
        int | None, _option(MACHINE, "Start so many processes here, one for each GPU or share of the CPU.", min=1)
    ] = None,
    mixed_precision: Annotated[str | None, _option(MACHINE, "no, fp16 or bf16.")] = None,
    sync_bn: Annotated[bool, _option(MACHINE, "BatchNorm over all GPUs.", "--sync-bn/--no-sync-bn")] = False,
    cpu: Annotated[bool, _option(MACHINE, "Use no GPU.", "--cpu/--no-cpu")] = False,
) -> dict[str, Any]:
    """Fine-tune a model on labelled images; with no options, resnet20_cbam2 on scikit-learn's handwritten digits.

    The run folder gets run.json (the resolved settings), metrics.jsonl, report.html with its pictures, checkpoints/,
    and the models best/ and last/. A run that was stopped (Ctrl-C, SIGTERM: exit code 75) or killed goes on with
    --resume.

    Returns:
        The last line of metrics.jsonl, with "output" and "best_accuracy".

    Raises:
        UserError: something asked for is not possible; the message says what is.
        Stopped: stopped with Ctrl-C or SIGTERM, after saving; the message says where.
    """
    settings = dict(locals())
    if recipe is not None and not isinstance(recipe, Applied):
        raise UserError(
            "recipe= is for the command line; in Python: finetune(**read_recipe(name)), from timm_cbam2.settings"
        )
    check_options(settings)
    require("matplotlib")
    _check_trackers(tracker_names(track))
    resolve(model)
    settings["model"] = whole_name(model)
    if push_to is not None and os.environ.get("RANK", "0") == "0":  # other machines push nothing and need no token
        from ..hub.push import check_push

        check_push(push_to)
    if num_processes is not None and num_processes > 1 and not is_launched():
        code = launch(num_processes, cpu)
        if code:
            raise typer.Exit(code)
        return {}
    from accelerate.utils import broadcast_object_list, set_seed

    from .prepare import open_images

    images = open_images(settings)
    where = resume if output is None and resume not in (None, "auto") else output
    folder = Path(where or _default_output(model, images)).expanduser()
    check_apart(folder, data)
    accelerator = make_accelerator(settings, str(folder) if track else None)
    with lost_peers():
        folder = Path(broadcast_object_list([str(folder)])[0])  # its name has the time in it
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output {folder} is a file: give a folder")
        set_seed(seed)
        return _run(accelerator, settings, images, folder)


def _run(accelerator: Any, settings: dict[str, Any], images: Images, folder: Path) -> dict[str, Any]:
    """Make everything, load a checkpoint if there is one to go on with, and train."""
    import torch
    from accelerate.utils import set_seed
    from timm.utils import ModelEmaV3

    from ..training import prepare
    from .finish import share_trained
    from .loop import Run
    from .optimise import freeze, make_optimizer, make_schedule

    settings["mixed_precision"] = accelerator.mixed_precision
    process = accelerator.process_index, accelerator.num_processes
    network, pretrained, beginning = prepare.build(settings, images)
    prepare.complete(settings, images, pretrained)
    config, val_config = prepare.make_configs(settings, images, network)
    parts = prepare.make_datasets(settings, images, config, val_config, process)
    train_loader, val_loader = prepare.make_loaders(settings, parts, process[1])
    trainable = freeze(network, settings["train"])
    network = prepare.use_sync_bn(settings, network, accelerator).to(accelerator.device)
    if settings["channels_last"]:
        network = network.to(memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in network.parameters())
    optimizer = make_optimizer(network, settings)
    blueprint, average = prepare.whole_copy(network, accelerator), None
    if settings["ema"] is not None:
        if blueprint is not None:
            raise UserError(
                "--ema needs the whole model in each process, which FSDP and DeepSpeed divide: leave it out"
            )
        average = ModelEmaV3(network, decay=settings["ema"], use_warmup=True)
    if settings["compile"]:
        network.compile()
    network, optimizer = accelerator.prepare(network, optimizer)
    if not settings["streaming"]:
        train_loader, val_loader = accelerator.prepare(train_loader, val_loader)

    training = {k: v for k, v in settings.items() if k not in OF_THE_CALL}
    info = {
        "settings": json.loads(json.dumps(training, default=str)),
        "data": prepare.fingerprint(images),
        "processes": process[1],
        "versions": prepare.versions(),
    }
    run = Run(
        accelerator=accelerator,
        network=network,
        ema=average,
        optimizer=optimizer,
        scheduler=None,
        train_loader=train_loader,
        val_loader=val_loader,
        parts=parts,
        folder=folder,
        settings=settings,
        images=images,
        config=val_config,
        info=info,
        trained=(trainable, parameters),
        blueprint=blueprint,
    )
    updates = -(-run.batches // settings["accumulate"])
    run.scheduler = make_schedule(optimizer, settings, updates)
    held = _on_main(accelerator, lambda: lock(folder))
    path, batch, notes = _where_to_begin(run, info)
    if accelerator.is_main_process:
        _write_settings(
            folder,
            {
                **settings,
                "data": _whole_path(settings["data"]),
                "output": str(folder),
                "command": _command(),
                "parameters": parameters,
                "trainable_parameters": trainable,
                "classes": images.classes,
                "images": {split: len(samples) for split, samples in images.splits.items()},
                "data_config": val_config,
                "processes": process[1],
                "device": str(accelerator.device),
                "distributed_type": accelerator.distributed_type.value,
                "versions": info["versions"],
                "steps_per_epoch": updates,
            },
        )
    for note in (*images.notes, *slow_precision(accelerator), *([] if path else beginning), *notes):
        accelerator.print(f"note: {note}")
    if settings["recipe"] is not None:
        accelerator.print(f"recipe {settings['recipe']}: {resolved_text(settings, finetune)}")
    start = "its checkpoint's" if path else "trained" if pretrained else "random"
    side = "x".join(str(n) for n in config["input_size"][1:])
    part = f" ({share_trained(settings['train'], trainable, parameters)})" if trainable < parameters else ""
    accelerator.print(
        f"{settings['model']}: {parameters / 1e6:.2f} M parameters{part}, {start} weights; "
        f"{images.name}: {len(parts['train'])} images to train on, {len(parts['val'])} to validate, "
        f"{len(images.classes)} classes, {side} pixels; on {accelerator.device}"
        + (f" in {process[1]} processes" if process[1] > 1 else "")
    )
    if settings["track"]:
        accelerator.init_trackers("timm_cbam2", config={k: str(v) for k, v in training.items()})
    set_seed(settings["seed"], device_specific=True)  # dropout differs between processes
    if path is not None:
        run.resume(path, batch)
        accelerator.print(f"going on from {path}: epoch {run.at.epoch}, step {run.at.updates}")
    try:
        return run.train()
    finally:
        if held is not None:
            held.close()


def _on_main(accelerator: Any, act: Any) -> Any:
    """`act()` on the main process; what it raises is raised on all."""
    from accelerate.utils import broadcast_object_list

    result, problem = None, None
    if accelerator.is_main_process:
        try:
            result = act()
        except UserError as error:
            problem = str(error)
    problem = broadcast_object_list([problem])[0]
    if problem is not None:
        raise UserError(problem)
    return result


def _where_to_begin(run: Any, info: dict[str, Any]) -> tuple[Path | None, int | None, list[str]]:
    """The checkpoint to go on from (None: begin anew), its batch, and what a person should know about it."""
    from accelerate.utils import broadcast_object_list

    from .prepare import check_resumable

    folder, resume = run.folder, run.settings["resume"]

    def decide() -> tuple[str | None, int | None, list[str]]:
        used = [n for n in ("metrics.jsonl", "best", "last", "checkpoints") if (folder / n).exists()]
        if resume is None:
            # A run never writes over another one; settings without any result are those of a run that never began.
            if used:
                raise UserError(
                    f"--output {folder} already holds a run ({', '.join(used)}): go on with it with --resume auto, "
                    "give another folder, or remove it"
                )
            return None, None, []
        path, notes = run.checkpoints.newest()
        if path is None:
            # Killed before its first checkpoint, a run begins anew; another one's results are not written over.
            if "metrics.jsonl" in used and not _is_same_run(folder, info):
                raise UserError(
                    f"--resume {resume}: {folder} has other settings' results and no checkpoint: give another folder"
                )
            if used or resume != "auto":
                notes.append(f"{folder} has no checkpoint yet, so the run begins anew")
            if "metrics.jsonl" in used:
                run.metrics.resume([])
            return None, None, notes
        saved = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        changed, batch = check_resumable(saved, info, saved["batch"])
        return str(path), batch, notes + changed

    found = _on_main(run.accelerator, decide)
    path, batch, notes = broadcast_object_list([found])[0]
    return Path(path) if path else None, batch, notes


def _is_same_run(folder: Path, info: dict[str, Any]) -> bool:
    """Whether run.json of `folder` tells of the training that `info` tells of."""
    try:
        saved = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    now = {**info["settings"], "data": _whole_path(info["settings"]["data"]), "processes": info["processes"]}
    return all(saved.get(name) == value for name, value in now.items())


def _check_trackers(names: list[str]) -> None:
    """Trackers that Accelerate knows, with their packages installed."""
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind.value != "all"]
    for name in names:
        if name not in known:
            raise UserError(f"--track {name} is unknown; Accelerate has {', '.join(known)}")
        if name in ("tensorboard", "trackio"):
            require(name, extra="track")
        elif importlib.util.find_spec(name) is None:
            raise UserError(f"--track {name} needs its package: run  pip install {name}  and try again")


def _default_output(model: str, images: Images) -> Path:
    name = f"{Path(model).name.rpartition(':')[2]}-{images.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / name
    return path if not path.exists() else path.with_name(f"{name}-{os.getpid()}")


def _whole_path(data: str) -> str:
    return data if not Path(data).expanduser().exists() else str(Path(data).expanduser().resolve())


def _command() -> str | None:
    """What was typed, None from Python."""
    arguments = command_line()
    return None if arguments is None else shlex.join(["timm-cbam2", "finetune", *arguments])


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".run.json.tmp"
        temporary.write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
        temporary.replace(folder / "run.json")
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}): give another folder") from error
