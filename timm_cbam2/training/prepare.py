"""From the options of a run to its model and its data, and whether an interrupted run may go on with them."""

from __future__ import annotations

import copy
import hashlib
import os
from typing import Any, Mapping

import numpy as np
import timm
import torch
from torch import nn

from ..data.balance import BalancedSampler, class_weights
from ..data.built_in import BUILT_IN
from ..data.cached import CachedImages
from ..data.folders import FileSamples
from ..data.images import Images
from ..data.loading import ImageDataset, data_config, make_loader
from ..data.sources import images_of_run
from ..data.stream import StreamedImages, find_stream
from ..data.stream_loader import make_stream_loader
from ..errors import UserError, one_line
from ..hub.run_folder import with_attention_decay
from ..hub.zoo import class_names, load, pretrained_tags, resolve
from ..models.passes_cbam2 import registered
from ..models.weights_cbam2 import WARM_START
from .launch import usable_cpus
from .multi_label import check_multi_label
from .optimise import make_loss
from .settings import DEFAULT_LR, DROPS, OF_THE_CALL

__all__ = ["build", "check_resumable", "complete", "fingerprint", "make_datasets", "make_loaders", "open_images"]

ADAPTS = ("epochs", "patience", "cpu", "data", "skip_bad_images")  # may change from one part of a run to the next


def open_images(settings: dict[str, Any]) -> Images:
    """The images of `--data`, with a train and a val split."""
    if settings["streaming"]:
        columns = settings["image_column"], settings["label_column"]
        return find_stream(settings["data"], *columns, settings["val_split"])
    return images_of_run(settings)


def build(settings: dict[str, Any], images: Images) -> tuple[nn.Module, bool, list[str]]:
    """The model with a head for the classes of `images`, whether it starts from weights, and what to know of that.

    Raises:
        UserError: the model cannot be made like this.
    """
    model, pretrained = settings["model"], settings["pretrained"]
    resolved = resolve(model)
    tags = pretrained_tags(resolved.partition(".")[0]) if ":" not in resolved else []
    if pretrained is None:  # whoever names a folder or a tag means its weights; shipped ones need no download
        shipped = (
            bool(tags) and not tags[0].startswith(WARM_START) and not (settings["cbam2"] or settings["model_kwargs"])
        )
        pretrained = ":" in resolved or "." in resolved or shipped
    arguments = dict(settings["model_kwargs"])
    if settings["cbam2"]:
        arguments["cbam2"] = {**arguments.get("cbam2", {}), **settings["cbam2"]}
    for option, key in DROPS.items():
        if settings[option] is not None:
            arguments[key] = settings[option]
    classes = len(images.classes)
    start_from = settings["start_from"]
    network = load(model, pretrained=pretrained and start_from is None, num_classes=classes, **arguments)
    network.multi_label = images.multi_label  # goes into the configurations that are saved
    notes = []
    if start_from is not None:
        from .start_from import load_start

        notes, pretrained = load_start(network, settings, images), True
    elif pretrained:
        known = class_names(network)
        if known != images.classes and network.pretrained_cfg["num_classes"] == classes:
            network.reset_classifier(classes)
            notes.append("the weights are of other classes, so the classifier starts anew")
    elif tags:
        notes.append(f"{model} starts from random weights; --pretrained starts from trained ones")
    if settings["grad_checkpointing"]:
        try:
            network.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise UserError(f"--grad-checkpointing: {model} has no such thing ({one_line(error, 100)})") from error
    return network, pretrained, notes


def complete(settings: dict[str, Any], images: Images, pretrained: bool) -> None:
    """Fill in, in place, what depends on model and data.

    Raises:
        UserError: options that do not go with several labels an image.
    """
    settings["multi_label"] = images.multi_label
    if images.multi_label:
        check_multi_label(settings)
    settings["pretrained"] = pretrained
    settings["lr"] = settings["lr"] or DEFAULT_LR["pretrained" if pretrained else "scratch"]
    if settings["augment"] == "auto":
        settings["augment"] = images.augment
    if settings["workers"] is None:
        in_memory = settings["data"] in BUILT_IN or settings["cache_images"]
        share = usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        settings["workers"] = 0 if in_memory else max(1, min(share, 8))


def make_datasets(
    settings: dict[str, Any],
    images: Images,
    config: dict[str, Any],
    val_config: dict[str, Any],
    process: tuple[int, int],
    resumed: bool = False,
) -> dict[str, Any]:
    """The data sets "train" and "val", their files checked as far as that is quick, if not `resumed`."""
    more = {}
    if settings["auto_augment"]:
        more["auto_augment"] = settings["auto_augment"]
    if settings["random_erasing"]:
        more |= {"re_prob": settings["random_erasing"], "re_mode": "pixel"}
    parts = {}
    for split, split_config, augment, extra in (
        ("train", config, settings["augment"], more),
        ("val", val_config, None, {}),
    ):
        arguments = (images.splits[split], split_config, augment, settings["seed"], settings["skip_bad_images"])
        if settings["streaming"]:
            parts[split] = StreamedImages(*arguments, process, **extra)
        elif settings["cache_images"]:
            parts[split] = CachedImages(*arguments)
        else:
            parts[split] = ImageDataset(*arguments, **extra)
        if not resumed:
            parts[split].check_headers()
    return parts


def make_configs(settings: dict[str, Any], images: Images, network: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The preprocessing to train with, and the one to validate with, which is also the model's own afterwards."""
    config = data_config(network, settings["img_size"], **images.data_config)
    if settings["val_img_size"] is None:
        return config, config
    return config, data_config(network, settings["val_img_size"], "--val-img-size", **images.data_config)


def make_loaders(settings: dict[str, Any], parts: dict[str, Any], processes: int) -> tuple[Any, Any]:
    """Loaders to train and to validate with."""
    batch_size, workers, seed = settings["batch_size"], settings["workers"], settings["seed"]
    if settings["streaming"]:
        return tuple(make_stream_loader(parts[split], batch_size, workers) for split in ("train", "val"))
    order = dict(shuffle=True, seed=seed, processes=processes, repeats=settings["aug_repeats"])
    if settings["balance"] == "sampler":
        order["sampler"] = BalancedSampler(parts["train"].samples.labels, seed)
    train = make_loader(parts["train"], batch_size, workers, **order)
    return train, make_loader(parts["val"], batch_size, workers)


def make_run_loss(settings: dict[str, Any], images: Images, accelerator: Any) -> tuple[nn.Module, Any]:
    """The training loss on the run's device, and what mixes a batch before it or None."""
    weights = class_weights(images) if settings["balance"] == "weights" else None
    criterion, mixup = make_loss(settings, len(images.classes), weights)
    return criterion.to(accelerator.device), mixup


def use_sync_bn(settings: dict[str, Any], network: nn.Module, accelerator: Any) -> nn.Module:
    """BatchNorm over all processes; PyTorch has it for GPUs.

    Raises:
        UserError: not on GPUs.
    """
    if not settings["sync_bn"]:
        return network
    if accelerator.device.type != "cuda":
        raise UserError("--sync-bn needs GPUs: on CPU each process normalises its own batch; leave it out")
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(network)


def whole_copy(network: nn.Module, accelerator: Any) -> nn.Module | None:
    """A copy on the CPU to put whole weights into, for when the processes divide the model between them."""
    if accelerator.distributed_type.value not in ("FSDP", "DEEPSPEED"):
        return None
    return copy.deepcopy(network).cpu()


def fingerprint(images: Images) -> dict[str, Any]:
    """What tells whether data are the same: counts, classes, and a digest of labels and file names."""
    digest = hashlib.sha256(repr(images.classes).encode())
    for split, samples in sorted(images.splits.items()):
        digest.update(split.encode() + np.array(samples.labels, dtype=np.int64).tobytes())
        if isinstance(samples, FileSamples):
            for number, name in enumerate(samples.items.relative()):
                digest.update(os.fsencode(f"\n{name}" if number else name))
    counts = {split: len(samples) for split, samples in images.splits.items()}
    return {"images": counts, "classes": len(images.classes), "sha256": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Of the libraries whose change may change a number, and which code the blocks run."""
    import accelerate

    from .. import __version__

    return {
        "timm_cbam2": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "CPU kernel": "on" if registered("cpu") is not None else "off",
    }


def check_resumable(saved: Mapping[str, Any], now: Mapping[str, Any], at_batch: int) -> tuple[list[str], int]:
    """Whether a run may go on from a checkpoint.

    Args:
        saved: `checkpoint.json`'s "settings", "data", "processes" and "versions".
        now: the same for this call.
        at_batch: batches of the epoch that were done.

    Returns:
        A line about each thing that changed and is adapted to; and `at_batch` in batches of today's size.

    Raises:
        UserError: something changed that the run cannot go on with.
    """
    notes = []
    if saved["data"] != now["data"]:
        before, after = saved["data"], now["data"]
        what = f"{before['images']} images of {before['classes']} classes, now {after['images']} of {after['classes']}"
        if before["images"] == after["images"] and before["classes"] == after["classes"]:
            what = "as many images, but with other names or labels"
        raise UserError(f"cannot resume: the data changed ({what}): a run goes on with the data it began with")
    old, new = with_attention_decay(saved["settings"]), now["settings"]
    size_before, size_now = (x["processes"] * x["settings"]["batch_size"] for x in (saved, now))
    for name in sorted(old.keys() & new.keys(), key=lambda name: (name != "model", name)):  # others follow from it
        if old[name] == new[name] or name in OF_THE_CALL or (name == "batch_size" and size_before == size_now):
            continue
        flag = "--" + name.replace("_", "-")
        if name not in ADAPTS:
            raise UserError(
                f"cannot resume: {flag} was {old[name]} and is now {new[name]}: leave it as it was, or start a new run"
            )
        notes.append(f"{flag} was {old[name]} and is now {new[name]}")
    if size_before != size_now:
        fitting = size_before // now["processes"]
        hint = f": give --batch-size {fitting}" if fitting * now["processes"] == size_before else ""
        raise UserError(
            f"cannot resume: {saved['processes']} processes of {old['batch_size']} images took steps of {size_before}, "
            f"{now['processes']} of {new['batch_size']} would take steps of {size_now}{hint}, or start a new run"
        )
    if saved["processes"] != now["processes"]:
        if new["streaming"]:
            raise UserError(
                f"cannot resume: a stream is divided among {saved['processes']} processes and there are now "
                f"{now['processes']}: give as many, or start a new run"
            )
        notes.append(
            f"{saved['processes']} processes were used and are now {now['processes']}: each step takes the same "
            f"{size_now} images as before, at the same learning rate; not bit-identical, since BatchNorm and dropout "
            "see them in other parts, and random generators begin anew"
        )
    versions = {k: (v, now["versions"].get(k)) for k, v in saved["versions"].items()}
    changed = [f"{k} {before} is now {after}" for k, (before, after) in versions.items() if before != after]
    if changed:
        notes.append(f"{', '.join(changed)}: not bit-identical")
    return notes, at_batch * saved["settings"]["batch_size"] * saved["processes"] // size_now
