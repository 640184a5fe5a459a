"""What an epoch of a `loop.Run` came to: measured on the validation images, written down, and the best model kept."""

from __future__ import annotations

import json
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object
from torch import Tensor, nn

from ..files import write_whole
from ..hub.folder import save
from ..hub.run_folder import rank, score
from .checkpoint import writing
from .guards import check_validation
from .observer import observer
from .predictions import Predictions, predict_all
from .progress import tracked

__all__ = ["measure", "record", "save_model"]

NAMED = 5  # unreadable images that are named in a line
PROBED = 32  # images that an observer looks at: enough to see a spread, few enough to cost little


def measure(run: Any) -> dict[str, Any]:
    """The row of the epoch in hand for metrics.jsonl; a signal meanwhile ends the run as its last step left it."""
    accelerator, at = run.accelerator, run.at
    loss, hits, count = accelerator.reduce(run.sums).tolist()
    if run.blueprint is not None:  # FSDP, unlike DDP, leaves each process the statistics of its own batches
        for buffer in run.model.buffers():
            broadcast(buffer)
    raw = _predict(run, run.network)
    found = raw
    if run.ema is not None:
        for buffer in run.ema.module.buffers():  # each process averaged the statistics of its own batches
            broadcast(buffer)
        found = _predict(run, run.ema.module)
    check_validation((found.loss, raw.loss), at.epoch, run.lr(), run.newest())
    run.confusion = None if run.images.multi_label else found.confusion(len(run.images.classes)).to(torch.int32)
    row = {
        "epoch": at.epoch,
        "step": at.updates,
        "lr": run.lr(),
        "train_loss": loss / max(count, 1),
        "train_accuracy": hits / max(count, 1),
        "val_loss": found.loss.double().mean().item(),
        "val_accuracy": found.accuracy(),
        **(found.measures() if run.images.multi_label else {"val_top5": found.accuracy(5)}),
        "val_images": len(found.labels),
    }
    if run.ema is not None:  # val_… are those of the average, which is what is saved as a model
        row |= {"raw_val_loss": raw.loss.double().mean().item(), "raw_val_accuracy": raw.accuracy()}
    return row | {
        "bad_images": _bad_images(run),
        "health": observer().measure(run.model if run.ema is None else run.ema.module, _probe(run)),
        "images_per_second": round(run.speed, 1),
        "seconds": round(run.seconds, 2),
    }


def record(run: Any, row: dict[str, Any]) -> None:
    """Keep the best model, write and show the row."""
    at = run.at
    better = at.best is None or rank(row) > rank(at.best)
    if better:
        at.best, at.waited, at.confusion = row, 0, run.confusion
        save_model(run, "best")
    else:
        at.waited += 1
    save_model(run, "last")
    if run.accelerator.is_main_process:
        with writing(run.metrics.path):
            run.metrics.append(row)
    else:
        run.metrics.rows.append(row)
    at.rows = list(run.metrics.rows)
    if run.settings["track"]:
        run.accelerator.log(tracked(row), step=row["step"])
    bad = sum(row["bad_images"].values())
    run.progress.say(
        f"epoch {row['epoch']:>3}/{run.settings['epochs']}  train loss {row['train_loss']:.3f} "
        f"accuracy {100 * row['train_accuracy']:.1f} %  validation loss {row['val_loss']:.3f} "
        f"{'mAP' if 'val_map' in row else 'accuracy'} {100 * score(row):.2f} %{' *' if better else '  '} "
        f"{row['images_per_second']:.0f} images/s" + (f"  {bad} unreadable images left out" if bad else "")
    )
    for text in (row["health"] or {}).get("warnings", ()):
        if text not in run.warned and len(run.warned) < 20:
            run.progress.say(f"  attention: {text}")
        run.warned.add(text)


def save_model(run: Any, name: str) -> None:
    """Write a model folder that both doors open."""
    accelerator = run.accelerator
    model = run.network if run.ema is None else run.ema.module
    if run.blueprint is not None:
        state = accelerator.get_state_dict(run.network)
        if accelerator.is_main_process:
            run.blueprint.load_state_dict(state)
        model = run.blueprint
    if not accelerator.is_main_process:
        return
    with writing(run.folder / name):
        save(model, run.folder / name, label_names=run.images.classes, data_config=run.config)


def _predict(run: Any, model: nn.Module) -> Predictions:
    found = predict_all(run.accelerator, model, run.val_loader, stop=run.look)
    if found is None:
        run.checkpoint()
        run.stop_here()
    return found


def _probe(run: Any) -> Tensor:
    """A few validation images, spread over the split, the same at every evaluation."""
    if run.probe is None:
        if run.settings["streaming"]:
            images = next(iter(run.val_loader))[0][:PROBED]
        else:
            part = run.parts["val"]
            chosen = torch.linspace(0, len(part) - 1, min(PROBED, len(part))).long().unique().tolist()
            images = torch.stack([part[index][0] for index in chosen])
        run.probe = images.to(run.accelerator.device)
    return run.probe


def _bad_images(run: Any) -> dict[str, int]:
    """Unreadable images of each split, over all processes; those not named before are named."""
    counts = {}
    for split, part in run.parts.items():
        bad = run.accelerator.reduce(part.bad.to(run.accelerator.device, torch.int32)).cpu()
        if run.settings["streaming"]:  # whose images have no number
            counts[split], names = int(bad.sum()), gather_object(part.left_out())
        else:
            found = bad.nonzero().flatten().tolist()
            counts[split], names = len(found), [part.name(index) for index in found]
        if run.accelerator.is_main_process:
            _name(run, names)
    return counts


def _name(run: Any, bad: list[str]) -> None:
    new = [name for name in bad if name not in run.named]
    if not new:
        return
    run.named.update(new)
    path = run.folder / "bad_images.txt"
    with writing(path):
        write_whole(path, "".join(f"{json.dumps(name)}\n" for name in sorted(run.named)).encode())
    first = ", ".join(json.dumps(name) for name in new[:NAMED])
    more = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
    run.progress.say(f"  left out, since they cannot be read: {first}{more}; all of them in {path}")
