"""The loop: train, measure, remember, save; interrupted anywhere, it goes on as if nothing had happened."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from ..data.images import Images
from ..data.loading import kept_quiet, seeded
from ..data.stream_loader import in_turns, load_place, place
from ..errors import Stopped
from .checkpoint import Checkpoints, Position
from .finish import draw_curves, finish, push_best
from .guards import LossWatch, StopSignal, bad_loss
from .measuring import measure, record, save_model
from .optimise import keep_frozen
from .predictions import count_hits
from .progress import MetricsFile, Progress
from .settings import save_interval
from .snapshot import POSITION, fitting, going_on

__all__ = ["Run"]


@dataclass
class Run:
    """A prepared run; `train` sees it through."""

    accelerator: Any
    network: nn.Module  # prepared
    ema: Any  # timm's ModelEmaV3 or None
    optimizer: Any
    scheduler: Any
    train_loader: Any
    val_loader: Any
    parts: dict[str, Any]
    folder: Path
    settings: dict[str, Any]
    images: Images
    config: dict[str, Any]  # preprocessing of the finished model
    info: dict[str, Any]  # goes into checkpoint.json, to be compared on resuming
    trained: tuple[int, int]  # numbers of parameters, those that are trained and all
    notes: list[str]  # what a person should know of how it begins
    side: tuple[int, ...]  # pixels (H, W) to train on
    loss: tuple[nn.Module, Any]  # and what mixes a batch before it, or None
    found: dict[str, Any]  # by --lr auto and --batch-size auto
    blueprint: nn.Module | None = None  # a whole copy to save, where the model is sharded
    teacher: nn.Module | None = None  # mixes the loss with another model's answers
    at: Position = field(default_factory=Position)

    def __post_init__(self) -> None:
        accelerator, settings = self.accelerator, self.settings
        self.model = accelerator.unwrap_model(self.network)
        self.criterion, self.mixup = self.loss
        self.metrics = MetricsFile(self.folder / "metrics.jsonl")
        parts = {"position": self.at} if self.ema is None else {"position": self.at, "ema": self.ema}
        self.checkpoints = Checkpoints(accelerator, parts, self.folder, settings["keep"])
        self.save_every, self.save_unit = save_interval(settings["save_every"])
        # A GPU must not wait at every step for a look at its loss, or for the other processes' signals.
        self.look_every = 1 if accelerator.device.type == "cpu" else 20
        self.watch = LossWatch(self.parts["train"].name)
        self.found_bad: dict[str, Any] | None = None
        self.probe: Tensor | None = None
        self.resumed: Path | None = None  # file that says where
        self.warned: set[str] = set()
        self.named: set[str] = set()  # unreadable images
        self.exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        if settings["streaming"]:
            whole = len(self.parts["train"]) // (settings["batch_size"] * accelerator.num_processes)
            self.batches = max(whole // settings["accumulate"], 1) * settings["accumulate"]
        else:
            self.batches = len(self.train_loader)
        self.batch_images = settings["batch_size"] * accelerator.num_processes

    # -- going on where it stopped

    def resume(self, checkpoint: Path, batch: int | None = None) -> None:
        """Load a checkpoint; `batch` replaces the one it was made at, when batches have another size now."""
        self.checkpoints.load(checkpoint)
        self.resumed, at = checkpoint / POSITION, self.at
        if batch is not None:
            at.batch = batch
        if self.scheduler is not None:
            # A function of the steps, so that more epochs may have been asked for.
            self.scheduler.step_update(at.updates)
        with fitting(self.resumed):
            for split, indices in at.bad.items():
                if not self.settings["streaming"]:
                    self.parts[split].bad[indices] = 1
                    self.named.update(self.parts[split].name(index) for index in indices)
            if self.settings["streaming"] and 0 < at.batch < self.batches:
                load_place(self.train_loader, at.streams[self.accelerator.process_index])
        if self.accelerator.is_main_process:
            self.metrics.resume(at.rows)
        else:
            self.metrics.rows = list(at.rows)

    def checkpoint(self) -> Path:
        """Save everything; all processes call this."""
        accelerator, at = self.accelerator, self.at
        sums = self.sums if at.batch else torch.zeros_like(self.sums)
        kept, at.sums = at.sums, accelerator.gather(sums[None]).cpu()
        for split, part in self.parts.items():
            bad = accelerator.reduce(part.bad.to(accelerator.device, torch.int32)).cpu()
            at.bad[split] = bad.nonzero().flatten().tolist()
        if self.settings["streaming"]:
            from accelerate.utils import gather_object

            at.streams = gather_object([place(self.train_loader) if 0 < at.batch < self.batches else None])
        info = {"step": at.updates, "epoch": at.epoch, "batch": at.batch, **self.info}
        try:
            return self.checkpoints.save(at.updates, info)
        finally:
            at.sums = kept

    # -- the run

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.batches // self.settings["accumulate"])

    def lr(self) -> float:
        """The learning rate in force, without the scale of any layer."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    @property
    def over(self) -> bool:
        """Whether there is nothing left to train."""
        patience = self.settings["patience"]
        return self.at.epoch > self.settings["epochs"] or (patience is not None and self.at.waited >= patience)

    def train(self) -> dict[str, Any]:
        """Train to the end, or to a signal.

        Returns:
            The last row of metrics.jsonl, with "output" and "best_accuracy".

        Raises:
            UserError: the loss is no number any more, or the disk is full.
            Stopped: a signal came; everything is saved.
        """
        accelerator, at, epochs = self.accelerator, self.at, self.settings["epochs"]
        images = min(self.batches * self.batch_images, len(self.parts["train"]))
        self.progress = Progress(images * epochs, accelerator.is_main_process)
        self.progress.skip(min(images * (at.epoch - 1) + at.batch * self.batch_images, images * epochs))
        start, drawn = time.monotonic(), 0.0
        with StopSignal()() as self.stop:
            try:
                while not self.over:
                    self._epoch()
                    row = measure(self)
                    record(self, row)
                    at.epoch, at.batch, at.sums = at.epoch + 1, 0, None
                    every = self.save_every if self.save_unit == "epochs" else 0
                    if self.over or every and row["epoch"] % every == 0:
                        self.checkpoint()
                    if time.monotonic() - drawn > 30 and accelerator.is_main_process:
                        draw_curves(self.folder, self.settings, self.metrics.rows, *self._data())
                        drawn = time.monotonic()
            finally:
                self.progress.close()
            if accelerator.is_main_process:
                self.checkpoints.prune(1)
                finish(
                    self.folder,
                    self.settings,
                    self.metrics.rows,
                    at.best,
                    at.confusion,
                    self.images.classes,
                    self._data(),
                    time.monotonic() - start,
                    self.trained,
                )
            accelerator.wait_for_everyone()
        if self.settings["track"]:
            accelerator.end_training()
        if self.settings["push_to"] and accelerator.is_main_process:
            push_best(self.folder, self.settings["push_to"])
        return {**self.metrics.rows[-1], "best_accuracy": at.best["val_accuracy"], "output": str(self.folder)}

    def _data(self) -> tuple[str, int]:
        return self.images.name, len(self.parts["train"])

    def _epoch(self) -> None:
        accelerator, at, settings, network = self.accelerator, self.at, self.settings, self.network
        network.train()
        keep_frozen(self.model)
        self.progress.begin(f"epoch {at.epoch}/{settings['epochs']}")
        self.sums = torch.zeros(3, dtype=self.exact, device=accelerator.device)
        if at.sums is not None:
            mine = accelerator.process_index
            if len(at.sums) == accelerator.num_processes:
                self.sums += at.sums[mine].to(self.sums)
            elif mine == 0:
                self.sums += at.sums.sum(0).to(self.sums)
        began, first = time.monotonic(), at.batch
        for images, labels, indices in self._batches():
            at.batch += 1
            images = images.contiguous(memory_format=torch.channels_last) if settings["channels_last"] else images
            targets = labels
            if self.mixup is not None:
                with seeded(settings["seed"], at.epoch, at.batch, accelerator.process_index, 1):
                    pairs = len(images) // 2 * 2
                    images, labels, indices = images[:pairs], labels[:pairs], indices[:pairs]
                    images, targets = self.mixup(images, labels)
                labels = targets.argmax(1)
            with accelerator.accumulate(network):
                logits = network(images)
                loss = self.criterion(logits, targets)
                loss = loss if self.teacher is None else self.teacher(images, logits, loss)
                accelerator.backward(loss)
                if settings["clip_grad"] is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(network.parameters(), settings["clip_grad"])
                self.optimizer.step()
                self.optimizer.zero_grad()
            with torch.no_grad():
                hits = count_hits(logits, labels)
                batch = torch.stack([loss.detach() * len(labels), hits, torch.full_like(hits, len(labels))]).to(
                    self.sums
                )
            self.sums += batch
            self.watch.add(at.epoch, at.updates + 1, self.lr(), loss, indices)
            self.progress.step(len(labels) * accelerator.num_processes, batch)
            if accelerator.sync_gradients:
                self._updated()
        self.look()
        self.seconds, self.speed = time.monotonic() - began, self.progress.speed() if at.batch > first else 0.0

    def _batches(self) -> Iterator[Any]:
        """The batches of the epoch in hand that are not done; making them leaves the random generators alone."""
        accelerator, at, loader = self.accelerator, self.at, self.train_loader
        self.parts["train"].set_epoch(at.epoch)
        if self.settings["streaming"]:
            batches, self.resumed = going_on(in_turns(loader, self.batches - at.batch), self.resumed), None
            for batch in kept_quiet(batches):
                yield [tensor.to(accelerator.device, non_blocking=True) for tensor in batch]
            return
        loader.set_epoch(at.epoch)
        if at.batch:
            loader = accelerator.skip_first_batches(loader, at.batch)
            loader.set_epoch(at.epoch)  # which older versions of Accelerate forget
        yield from kept_quiet(loader)

    def _updated(self) -> None:
        """After each optimizer step: schedule, average, look for trouble, save."""
        at = self.at
        at.updates += 1
        if self.scheduler is not None:
            self.scheduler.step_update(at.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=at.updates)
        due = self.save_unit == "steps" and self.save_every and at.updates % self.save_every == 0
        if at.updates % self.look_every == 0 or due:
            stop = self.look()
            if stop or due:
                self.checkpoint()
            if stop:
                self.stop_here()

    def look(self) -> bool:
        """Whether any process was told to stop; raises when the loss of any is not finite."""
        self.found_bad = self.found_bad or self.watch.look()
        stop, bad = self.stop.name is not None, self.found_bad is not None
        accelerator = self.accelerator
        if accelerator.num_processes > 1:
            flags = torch.tensor([stop, bad], dtype=torch.float32, device=accelerator.device)
            stop, bad = (flag > 0 for flag in accelerator.reduce(flags).tolist())
        if bad:
            found = self.found_bad
            if accelerator.num_processes > 1:
                from accelerate.utils import gather_object

                found = next(f for f in gather_object([found]) if f is not None)
            raise bad_loss(found, self.folder, self.newest(), accelerator.is_main_process)
        return stop

    def newest(self) -> str:
        """Where the newest checkpoint is, for a person."""
        return str(next(iter(self.checkpoints.all()), None) or "none yet")

    def stop_here(self) -> None:
        """Leave after a signal; the checkpoint has been written."""
        save_model(self, "last")
        best = f"; best model so far in {self.folder / 'best'}" if self.at.best else ""
        raise Stopped(
            f"stopped by {self.stop.name or 'a signal'} in epoch {self.at.epoch} after {self.at.updates} steps: all is "
            f"saved, go on with  timm-cbam2 finetune --resume {shlex.quote(str(self.folder))}  (the model as it is now "
            f"is in {self.folder / 'last'}{best})"
        )
