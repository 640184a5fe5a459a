"""Fine-tune any model of the zoo, or any timm model, on labelled images: an Accelerate loop over timm's parts."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Iterator

import timm
import torch
import typer
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader

from .data import AUGMENT, ImageDataset, Images, data_config, find_images, make_loader
from .errors import UserError, one_line, require, run_commands
from .evaluate import predict_all
from .hub import save
from .report import MetricsFile, Progress, curves_picture, duration
from .twins_cbam2 import WARM_START
from .zoo import class_names, load, pretrained_tags, resolve

__all__ = ["finetune"]

DEFAULT_LR = {"scratch": 2e-3, "pretrained": 5e-4}  # for AdamW, the default optimizer
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")


def finetune(
    data: Annotated[
        str, typer.Option(help="Image folder, parquet/arrow, Hub data set owner/name, or digits.")
    ] = "digits",
    model: Annotated[str, typer.Option(help="Registered name, run or model folder, or hf-hub: id.")] = "resnet20_cbam2",
    pretrained: Annotated[
        bool | None,
        typer.Option(help="Start from weights; the default wherever they lie here, and for hf-hub: ids and tags."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times that every image is seen.")] = 6,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step and process.")] = 32,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; for adamw 2e-3, or 5e-4 if pretrained.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="Not applied to norms, biases, temperatures.")] = 0.05,
    opt: Annotated[str, typer.Option(help="Optimizer, by timm's name.")] = "adamw",
    sched: Annotated[str, typer.Option(help="Learning rate schedule, by timm's name.")] = "cosine",
    warmup_epochs: Annotated[float, typer.Option(min=0.0, help="Epochs of rising learning rate.")] = 1.0,
    label_smoothing: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share of the target that is spread.")] = 0.0,
    augment: Annotated[
        str, typer.Option(help="none, light (no mirroring), mild, standard (timm's), or auto.")
    ] = "auto",
    img_size: Annotated[int | None, typer.Option(help="Side in pixels, in place of the model's own.")] = None,
    val_split: Annotated[float, typer.Option(help="Share held out where the data have no val split.")] = 0.2,
    image_column: Annotated[str | None, typer.Option(help="Column with the images, for a data set in tables.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the labels, for a data set in tables.")] = None,
    skip_bad_images: Annotated[bool, typer.Option(help="Count unreadable images and go on.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights, the order and the augmentation.")] = 0,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read images; none for digits.")] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; runs/MODEL-DATA-TIME by default.")] = None,
) -> dict[str, Any]:
    """Fine-tune a model on labelled images; with no options, resnet20_cbam2 on scikit-learn's handwritten digits.

    The run folder gets run.json (the resolved settings), metrics.jsonl, report.html and its pictures, and the models
    best/ and last/.

    Returns:
        The last line of metrics.jsonl, with "output" and "best_accuracy".

    Raises:
        UserError: something asked for is not possible; the message says what is.
        KeyboardInterrupt: stopped with Ctrl-C, after saving; the message says where.
    """
    settings = dict(locals())
    _check_options(settings)
    require("matplotlib")
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed

    resolve(model)
    images = find_images(data, image_column, label_column).with_val(val_split)
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        step_scheduler_with_optimizer=False,
    )
    folder = Path(broadcast_object_list([str(output or _default_output(model, images))])[0])
    _refuse_used(folder)
    set_seed(seed)
    network, settings["pretrained"] = _build(model, pretrained, images, accelerator.print)
    settings["lr"] = lr = lr or DEFAULT_LR["pretrained" if settings["pretrained"] else "scratch"]
    settings["augment"] = augment = images.augment if augment == "auto" else augment
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings["workers"] = workers = workers if workers is not None else 0 if data == "digits" else min(cpus, 8)
    config = data_config(network, img_size, **images.data_config)
    parts = {
        "train": ImageDataset(images.splits["train"], config, augment, seed, skip_bad_images),
        "val": ImageDataset(images.splits["val"], config, None, seed, skip_bad_images),
    }
    for part in parts.values():
        part.check_headers()
    train_loader = make_loader(
        parts["train"], batch_size, workers, shuffle=True, seed=seed, processes=accelerator.num_processes
    )
    val_loader = make_loader(parts["val"], batch_size, workers)
    try:
        optimizer = create_optimizer_v2(network, opt=opt, lr=lr, weight_decay=weight_decay)
    except (AssertionError, ImportError, NameError, ValueError) as error:  # one that needs a package or a GPU
        raise UserError(f"--opt {opt} cannot be used here: {one_line(error, 200)}; try --opt adamw") from error
    parameters = sum(p.numel() for p in network.parameters())
    network, optimizer, train_loader, val_loader = accelerator.prepare(network, optimizer, train_loader, val_loader)
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched,
            num_epochs=epochs,
            warmup_epochs=min(warmup_epochs, epochs / 2),
            warmup_lr=lr / 100,
            min_lr=lr / 1000,
            step_on_epochs=False,
            updates_per_epoch=len(train_loader),
        )
    except ValueError as error:
        raise UserError(f"--sched {sched} with --epochs {epochs}: {one_line(error, 200)}") from error

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        resolved = {
            **settings,
            "data": data if not Path(data).expanduser().exists() else str(Path(data).expanduser().resolve()),
            "output": str(folder),
            "parameters": parameters,
            "classes": images.classes,
            "images": {split: len(samples) for split, samples in images.splits.items()},
            "data_config": config,
            "processes": accelerator.num_processes,
            "device": str(accelerator.device),
            "mixed_precision": accelerator.mixed_precision,
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }
        _write_settings(folder, resolved)
    for note in images.notes:
        accelerator.print(f"note: {note}")
    side = "x".join(str(n) for n in config["input_size"][1:])
    accelerator.print(
        f"{model}: {parameters / 1e6:.2f} M parameters, {'trained' if settings['pretrained'] else 'random'} weights; "
        f"{images.name}: {len(parts['train'])} images to train on, {len(parts['val'])} to validate, "
        f"{len(images.classes)} classes, {side} pixels; on {accelerator.device}"
    )
    run = _Run(
        accelerator, network, optimizer, scheduler, train_loader, val_loader, parts, folder, settings, images, config
    )
    return run.train()


@dataclass
class _Run:
    """The loop and what it leaves in the run folder."""

    accelerator: Any
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    train_loader: DataLoader
    val_loader: DataLoader
    parts: dict[str, ImageDataset]
    folder: Path
    settings: dict[str, Any]
    images: Images
    config: dict[str, Any]
    best: dict[str, Any] | None = None
    updates: int = 0

    def __post_init__(self) -> None:
        self.criterion = nn.CrossEntropyLoss(label_smoothing=self.settings["label_smoothing"])
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")

    def train(self) -> dict[str, Any]:
        accelerator, epochs = self.accelerator, self.settings["epochs"]
        per_epoch = len(self.train_loader) * self.train_loader.total_batch_size
        progress = Progress(min(per_epoch, len(self.parts["train"])) * epochs, accelerator.is_main_process)
        start, drawn = time.monotonic(), 0.0
        with _stop_on_signal(accelerator.set_trigger):
            try:
                for epoch in range(1, epochs + 1):
                    row = self._epoch(epoch, progress)
                    if row is None:
                        break
                    self._record(row, progress)
                    if time.monotonic() - drawn > 30 and accelerator.is_main_process:
                        self._draw()
                        drawn = time.monotonic()
            finally:
                progress.close()
            stopped = row is None
            if accelerator.is_main_process:
                self._finish(stopped, epoch, time.monotonic() - start)
        if stopped:
            raise KeyboardInterrupt(self._stopped_message(epoch))
        return {**self.metrics.rows[-1], "best_accuracy": self.best["val_accuracy"], "output": str(self.folder)}

    def _epoch(self, epoch: int, progress: Progress) -> dict[str, Any] | None:
        """Train and measure once; None when asked to stop."""
        accelerator = self.accelerator
        self.network.train()
        self.train_loader.set_epoch(epoch)
        self.parts["train"].set_epoch(epoch)
        progress.begin(f"epoch {epoch}/{self.settings['epochs']}")
        sums = torch.zeros(
            3, dtype=torch.float64 if accelerator.device.type != "mps" else None, device=accelerator.device
        )
        began = time.monotonic()
        for images, labels, _ in self.train_loader:
            with accelerator.accumulate(self.network):
                logits = self.network(images)
                loss = self.criterion(logits, labels)
                accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.updates += 1
            if self.scheduler is not None:
                self.scheduler.step_update(self.updates)
            with torch.no_grad():
                hits = (logits.argmax(1) == labels).sum()
                batch = torch.stack([loss.detach() * len(labels), hits, torch.full_like(hits, len(labels))]).to(sums)
            sums += batch
            progress.step(len(labels) * accelerator.num_processes, batch)
            if accelerator.check_trigger():
                return None
        seconds, speed = time.monotonic() - began, progress.speed()
        loss, hits, count = accelerator.reduce(sums).tolist()
        if not math.isfinite(loss):
            raise UserError(
                f"the training loss became {loss / count} in epoch {epoch} at lr {self.settings['lr']:g}: "
                f"try again with a lower --lr, such as {self.settings['lr'] / 5:g}"
            )
        found = predict_all(accelerator, self.network, self.val_loader)
        if accelerator.check_trigger():
            return None
        return {
            "epoch": epoch,
            "step": self.updates,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss / count,
            "train_accuracy": hits / count,
            "val_loss": found.loss.double().mean().item(),
            "val_accuracy": found.accuracy(),
            "val_top5": found.accuracy(5),
            "val_images": len(found.labels),
            "bad_images": {split: self._bad(part) for split, part in self.parts.items()},
            "images_per_second": round(speed, 1),
            "seconds": round(seconds, 2),
        }

    def _bad(self, part: ImageDataset) -> int:
        return int(self.accelerator.reduce(part.bad.to(self.accelerator.device, torch.int32)).gt(0).sum())

    def _record(self, row: dict[str, Any], progress: Progress) -> None:
        rank = (row["val_accuracy"], -row["val_loss"])
        better = self.best is None or rank > (self.best["val_accuracy"], -self.best["val_loss"])
        if better:
            self.best = row
        if self.accelerator.is_main_process:
            if better:
                self._save("best")
            self._save("last")
            self.metrics.append(row)
        else:
            self.metrics.rows.append(row)
        bad = sum(row["bad_images"].values())
        progress.say(
            f"epoch {row['epoch']:>3}/{self.settings['epochs']}  train loss {row['train_loss']:.3f} "
            f"accuracy {100 * row['train_accuracy']:.1f} %  validation loss {row['val_loss']:.3f} "
            f"accuracy {100 * row['val_accuracy']:.2f} %{' *' if better else '  '} "
            f"{row['images_per_second']:.0f} images/s" + (f"  {bad} unreadable images left out" if bad else "")
        )

    def _save(self, name: str) -> None:
        try:
            save(self.network, self.folder / name, label_names=self.images.classes, data_config=self.config)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / name} ({error.strerror or error}): free some space"
            ) from error

    def _draw(self) -> None:
        title = f"{self.settings['model']} on {self.images.name}, {len(self.parts['train'])} training images"
        curves_picture(self.metrics.rows, self.folder / "curves.png", title)

    def _finish(self, stopped: bool, epoch: int, seconds: float) -> None:
        """Save what there is, and say where."""
        if stopped:
            self._save("last")
        if self.metrics.rows:
            self._draw()
        if stopped:
            return
        best, f = self.best, self.folder
        print(
            f"\ndone in {duration(seconds)}: best validation accuracy {100 * best['val_accuracy']:.2f} % "
            f"after epoch {best['epoch']} of {epoch}"
        )
        print(f"  best model  {f / 'best'}\n  last model  {f / 'last'}\n  curves      {f / 'curves.png'}")
        print(f"  numbers     {f / 'metrics.jsonl'}\n  settings    {f / 'run.json'}")
        self._report()
        run = shlex.quote(str(f))
        print(f"next:\n  timm-cbam2 evaluate {run}\n  timm-cbam2 predict {run} IMAGE…")
        print(f'  timm.create_model("local-dir:{f / "best"}", pretrained=True)')

    def _report(self) -> None:
        from .run_report import write_report  # which imports this module

        try:
            print(f"  report      {write_report(self.folder, seconds=5)}")
        except UserError as error:
            print(f"  no report: {one_line(error)}")

    def _stopped_message(self, epoch: int) -> str:
        best = f"; best model so far in {self.folder / 'best'}" if self.best else ""
        return f"stopped in epoch {epoch}: the model as it is now is in {self.folder / 'last'}{best}"


def _check_options(settings: dict[str, Any]) -> None:
    """Mistakes that need neither data nor model to be seen."""
    import difflib

    for option, allowed in (("opt", list_optimizers()), ("sched", SCHEDULES), ("augment", ("auto", *AUGMENT))):
        value = settings[option]
        if value not in allowed:
            near = difflib.get_close_matches(value, allowed, 3, 0.4) if len(allowed) > 10 else allowed
            raise UserError(
                f"--{option} {value} is unknown; " + (f"try {', '.join(near)}" if near else "see timm.optim")
            )
    if settings["lr"] is not None and not 0 < settings["lr"] < math.inf:
        raise UserError(f"--lr {settings['lr']:g} is not a learning rate: give a number above 0, such as 1e-3")
    if settings["lr"] is None and settings["opt"] != "adamw":
        raise UserError(f"--opt {settings['opt']} has no default learning rate here: give one with --lr")


def _default_output(model: str, images: Images) -> Path:
    name = f"{Path(model).name.rpartition(':')[2]}-{images.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path("runs") / name
    return path if not path.exists() else path.with_name(f"{name}-{os.getpid()}")


def _refuse_used(folder: Path) -> None:
    """A run never writes over another one; settings without any result are those of a run that never began."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file: give a folder")
    used = [n for n in ("metrics.jsonl", "best", "last") if (folder / n).exists()]
    if used:
        raise UserError(f"--output {folder} already holds a run ({', '.join(used)}): give another folder, or remove it")


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}): give another folder") from error


def _build(model: str, pretrained: bool | None, images: Images, say: Any) -> tuple[nn.Module, bool]:
    """The model with a head for the classes of `images`; and whether it starts from weights."""
    resolved = resolve(model)
    tags = pretrained_tags(resolved.partition(".")[0]) if ":" not in resolved else []
    if pretrained is None:  # whoever names a folder or a tag means its weights; shipped ones need no download
        shipped = bool(tags) and not tags[0].startswith(WARM_START)
        pretrained = ":" in resolved or "." in resolved or shipped
    classes = len(images.classes)
    network = load(model, pretrained=pretrained, num_classes=classes)
    if pretrained:
        known = class_names(network)
        if known != images.classes and network.pretrained_cfg["num_classes"] == classes:
            network.reset_classifier(classes)
            say("note: the weights are of other classes, so the classifier starts anew")
    elif tags:
        say(f"note: {model} starts from random weights; --pretrained starts from trained ones")
    return network, pretrained


@contextmanager
def _stop_on_signal(stop: Any) -> Iterator[None]:
    """The first Ctrl-C calls `stop`, so that the loop ends after the batch in hand; a second one ends at once."""

    def handle(number: int, frame: Any) -> None:
        stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    run_commands(finetune)
