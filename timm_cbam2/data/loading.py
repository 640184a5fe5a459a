"""From images to batches: reading any image the same way everywhere, timm's transforms, seeded loaders."""

from __future__ import annotations

import random
import signal
from contextlib import contextmanager
from typing import Any, Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import Compose, RandomCrop

from ..errors import UserError, one_line
from ..models.saved_cbam2 import input_channels
from .folders import FileSamples
from .headers import bad_headers, remember, remembered, sample
from .images import Samples
from .reading import UNREADABLE, read_image
from .repeated import RepeatedSampler

__all__ = [
    "ImageDataset",
    "build_transform",
    "data_config",
    "kept_quiet",
    "make_loader",
    "seeded",
    "start_worker",
]

MAX_SIDE = 4096  # pixels; a mistyped size must not take all memory
AUGMENT = {
    "none": dict(no_aug=True),
    # Keeps what is written in the image: for digits, letters, signs, anything with a handedness.
    "light": dict(scale=(0.7, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=None),
    # Mirrors and crops little: for pictures that the subject fills.
    "mild": dict(scale=(0.6, 1.0), ratio=(0.9, 1.1), color_jitter=None),
    # Mirrors and moves by up to an eighth, and resamples nothing: for small pictures, such as CIFAR's.
    "padded": dict(color_jitter=None),
    "standard": dict(),  # timm's own: random resized crop, horizontal flip, colour jitter
}


def data_config(
    model: nn.Module, img_size: int | None = None, option: str = "--img-size", **overrides: Any
) -> dict[str, Any]:
    """timm's preprocessing for `model`, from its own `pretrained_cfg`: input_size, mean, std, interpolation, crop.

    Args:
        model: any timm model; of another one, which says nothing, timm's defaults for ImageNet are taken.
        img_size: side in pixels, in place of the model's own.
        option: which gave it.
        overrides: values that the data set asks for, such as `crop_pct`.

    Raises:
        UserError: a size that the model cannot take, or a model that takes neither 1 nor 3 channels.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    config = resolve_data_config({"crop_pct": overrides.pop("crop_pct", None)}, pretrained_cfg=cfg) | overrides
    channels = input_channels(model)
    size = config["input_size"][1:]
    if img_size is not None:
        if not 8 <= img_size <= MAX_SIDE:
            raise UserError(f"{option} {img_size} makes no sense: give 8 to {MAX_SIDE} pixels")
        if cfg.get("fixed_input_size") and tuple(size) != (img_size, img_size):
            raise UserError(f"{option} {img_size}: {cfg.get('architecture')} takes {size[0]} pixels only; leave it out")
        size = (img_size, img_size)
    if channels not in (1, 3):
        raise UserError(f"the model takes {channels} channels; images give 1 or 3")
    config["input_size"] = (channels, *size)
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def build_transform(config: dict[str, Any], augment: str | None = None, **more: Any) -> Any:
    """A timm transform from a PIL image to a normalised (C, H, W) tensor; `augment` None is the one for evaluation.

    Args:
        config: see `data_config`.
        augment: a key of `AUGMENT`.
        more: further arguments of timm's `create_transform`, such as `auto_augment` and `re_prob`.

    Raises:
        UserError: timm knows no such augmentation.
    """
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    options = {k: config[k] for k in keys}
    if augment is not None and (augment != "none" or more):
        options |= dict(is_training=True, no_aug=augment == "none") | AUGMENT[augment]
    try:
        transform = create_transform(**options | more)
    except (AssertionError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"timm knows no such augmentation {more}: {one_line(error, 150)}") from error
    if augment == "padded":
        transform.transforms[0] = _moved(config["input_size"][1:], config["interpolation"])  # was a resized crop
    return transform


def _moved(size: tuple[int, int], interpolation: str) -> Any:
    """Images that cover `size` (H, W), moved by up to an eighth of it, where zeros move in.

    As in "Deep Residual Learning for Image Recognition", 4.2, https://arxiv.org/abs/1512.03385.
    """
    padding = [size[1] // 8, size[0] // 8]
    return Compose([ResizeKeepRatio(size, longest=0.0, interpolation=interpolation), RandomCrop(size, padding)])


class ImageDataset(Dataset):
    """Map-style data set of (tensor (C, H, W), label, index).

    The augmentation of an image is a function of (seed, epoch, index), whatever the number of workers or processes; an
    index beyond the end, `n * len(self) + index`, gives it once more with an augmentation of its own.
    With `skip_bad`, an unreadable image is marked in `bad`; when training the next readable one stands in for it,
    otherwise its label is -1, which every metric leaves out.

    Args:
        samples: the images and their labels.
        config: see `data_config`.
        augment: a key of `AUGMENT` to train, None to evaluate.
        seed: of the augmentation.
        skip_bad: count unreadable images and go on, instead of stopping at the first.
        more: further arguments of timm's `create_transform`.
    """

    collate = None  # torch's own

    def __init__(
        self,
        samples: Samples,
        config: dict[str, Any],
        augment: str | None = None,
        seed: int = 0,
        skip_bad: bool = False,
        **more: Any,
    ):
        self.samples, self.seed, self.skip_bad = samples, seed, skip_bad
        self.training = augment is not None
        self.transform = build_transform(config, augment, **more)
        self.input_size = tuple(config["input_size"])
        self.mode = "L" if self.input_size[0] == 1 else "RGB"
        # Shared memory: worker processes that outlive an epoch read the one and report in the other.
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self.bad = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's augmentation to give; also in worker processes that are running."""
        self.epoch.fill_(epoch)

    def name(self, index: int) -> str:
        """What to call an image of a batch, by its index."""
        return self.samples.name(index)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        copy, index = divmod(index, len(self))
        image = self._read(index)
        if image is None and not self.training:
            return torch.zeros(self.input_size), self._label(None), index
        steps = 0
        while image is None:
            steps += 1
            if steps == len(self):
                raise UserError("none of the training images can be read")
            index = (index + 1) % len(self)
            image = self._read(index)
        if not self.training:
            return self.transform(image), self._label(index), index
        with seeded(self.seed, int(self.epoch), index, *([copy] if copy else [])):
            return self.transform(image), self._label(index), index

    def _label(self, index: int | None) -> Any:
        """A class index, or zeros and ones (K,); of an unreadable image, None, -1 throughout."""
        label = self.samples.labels[index or 0]
        if isinstance(label, int):
            return label if index is not None else -1
        return torch.from_numpy(label if index is not None else np.full_like(label, -1))

    def _read(self, index: int) -> Image.Image | None:
        try:
            return read_image(self.samples.source(index), self.mode)
        except UNREADABLE as error:
            return self._give_up(index, error)

    def _give_up(self, index: int, error: Exception) -> None:
        if not self.skip_bad:
            reason = one_line(error, 150)
            raise UserError(
                f"cannot read {self.samples.name(index)} as an image ({reason}): remove or replace it, "
                "or leave such images out with --skip-bad-images"
            ) from error
        self.bad[index] = 1

    def check_headers(self) -> None:
        """Open image *files* without decoding them, so that a folder of bad ones shows before any training.

        All of them or, where there are many, a sample; not at all where that went well before. The rest show as they
        come.

        Raises:
            UserError: one cannot be opened and `skip_bad` is off, or none of them can.
        """
        if not isinstance(self.samples, FileSamples) or remembered(self.samples):
            return
        indices = sample(self.samples)
        for index, error in bad_headers(self.samples, indices):
            self._give_up(index, error)
        if not self.bad.any():
            remember(self.samples, len(indices))
        elif self.bad[indices].all():
            raise UserError(f"none of {len(indices)} images can be read, the first is {self.samples.name(0)}")


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators as a function of `words`, and afterwards as they were.

    Without any, only the latter.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    if words:
        seeds = np.random.SeedSequence(words).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        # torch.manual_seed would also queue work for the GPU each time
        torch.default_generator.manual_seed(int(seeds[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def kept_quiet(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; making them leaves this process's random generators as they were."""
    with seeded():
        iterator = iter(batches)
        batch = next(iterator, None)
    while batch is not None:
        yield batch
        with seeded():
            batch = next(iterator, None)


def start_worker(worker: int) -> None:
    """Signals reach every process of the terminal or job: the main one decides when to stop, workers just serve it.

    One thread each, as in DataLoader, and seeded by it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the run's own handler, which it inherits, would not end it


def make_loader(
    dataset: Dataset,
    batch_size: int,
    workers: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    processes: int = 1,
    repeats: int = 1,
    sampler: Sampler[int] | None = None,
) -> DataLoader:
    """Batches of (images (B, C, H, W), labels (B,), indices (B,)), in an order that depends on `seed` alone.

    `batch_size` is that of each of `processes`; with `repeats`, a shuffled image occurs so often in a row.
    A `sampler` shuffles in its own way.
    """
    if sampler is None and shuffle and repeats > 1:
        sampler = RepeatedSampler(len(dataset), repeats, batch_size, processes, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle and sampler is None,
        sampler=sampler,
        # BatchNorm cannot train on a last batch of one image; yet something must be left to train on.
        drop_last=shuffle and len(dataset) >= batch_size * processes,
        num_workers=workers,
        collate_fn=dataset.collate,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
