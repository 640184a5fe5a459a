"""Small images decoded once and kept as bytes: a batch is cropped, mirrored and normalised in one go."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from .images import Samples
from .loading import ImageDataset, build_transform
from .reading import UNREADABLE, read_image

__all__ = ["CachedImages"]

PAD = 8  # the border is an eighth of the side, as the usual 4 of CIFAR's 32 pixels


class CachedImages(ImageDataset):
    """`ImageDataset` that holds every image, N·C·H·W bytes in each process, and augments by the batch.

    Evaluated images are the very tensors that `ImageDataset` gives. Augmentation is padding by reflection, cropping
    and, except with "light", mirroring: like there a function of (seed, epoch, index).

    Args:
        samples: the images and their labels.
        config: see `data_config`.
        augment: "none", "light", or any other key of `AUGMENT`; None to evaluate.
        seed: of the augmentation.
        skip_bad: count unreadable images and go on, instead of stopping at the first.

    Raises:
        UserError: they need more than half of the memory there is, or one cannot be read.
    """

    def __init__(
        self,
        samples: Samples,
        config: dict[str, Any],
        augment: str | None = None,
        seed: int = 0,
        skip_bad: bool = False,
    ):
        super().__init__(samples, config, augment, seed, skip_bad)
        self.crops, self.mirrors = augment not in (None, "none"), augment not in (None, "none", "light")
        needed, free = len(self) * int(np.prod(self.input_size)), _memory()
        if free and needed > free / 2:
            raise UserError(
                f"--cache-images needs {needed / 1e9:.1f} GB for {len(self)} images of {self.input_size[1]}x"
                f"{self.input_size[2]} pixels, more than half of the memory: leave it out"
            )
        # Training sees the whole image, since it is cropped afterwards.
        whole = config | {"crop_pct": 1.0} if self.crops else config
        self.transform = build_transform(whole, None, normalize=False)
        self.mean, self.std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.pixels = torch.zeros((len(self), *self.input_size), dtype=torch.uint8)
        self.targets = torch.from_numpy(np.array(samples.labels))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for index, found in enumerate(pool.map(self._decode, samples.sources())):
                if isinstance(found, Exception):
                    self._give_up(index, found)
                else:
                    self.pixels[index] = found
        self.stand_in = self._stand_ins()

    def _decode(self, source: Any) -> Tensor | Exception:
        try:
            return self.transform(read_image(source, self.mode))
        except UNREADABLE as error:
            return error

    def _stand_ins(self) -> Tensor:
        """For each index, that of the image to give: when training, the next readable one for a bad one."""
        chosen = torch.arange(len(self))
        bad = self.bad.bool()
        if bad.all():
            raise UserError("none of the images can be read")
        if self.training:
            for index in bad.nonzero().flatten().tolist():
                while bad[chosen[index]]:
                    chosen[index] = (chosen[index] + 1) % len(self)
        else:
            self.targets[bad] = -1
        return chosen

    def check_headers(self) -> None:
        """Nothing to do: every image was decoded."""

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        images, labels, indices = self.__getitems__([index])
        return images[0], labels[0] if labels.ndim > 1 else int(labels[0]), int(indices[0])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: normalised images (B, C, H, W), labels (B,), indices (B,)."""
        asked = torch.as_tensor(indices)
        chosen = self.stand_in[asked % len(self)]
        images = self.pixels[chosen]
        if self.crops:
            images = self._augment(images, chosen + asked // len(self) * len(self))
        return (images.float() / 255).sub_(self.mean).div_(self.std), self.targets[chosen], chosen

    @staticmethod
    def collate(batch: Any) -> Any:
        """`__getitems__` gives whole batches."""
        return batch

    def _augment(self, images: Tensor, indices: Tensor) -> Tensor:
        count, _, height, width = images.shape
        words = _random_words(self.seed, int(self.epoch), indices.numpy(), 3)  # (B, 3)
        pads = [min(side // PAD, side - 1) for side in (height, width)]
        padded = nn.functional.pad(images.float(), (pads[1], pads[1], pads[0], pads[0]), mode="reflect").to(torch.uint8)
        top, left = (torch.from_numpy((words[:, i] % (2 * pads[i] + 1)).astype(np.int64)) for i in range(2))
        rows = top[:, None] + torch.arange(height)  # (B, H)
        columns = left[:, None] + torch.arange(width)  # (B, W)
        if self.mirrors:
            mirrored = torch.from_numpy(words[:, 2] % 2 == 1)
            columns = torch.where(mirrored[:, None], columns.flip(1), columns)
        batch = torch.arange(count)[:, None, None]
        return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _random_words(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Random 64-bit words (B, count), each a function of (seed, epoch, index): SplitMix64 as a counter."""
    start = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
    word = start + (
        indices.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    ) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> np.uint64(shift))) * np.uint64(factor)
    return word ^ (word >> np.uint64(31))


def _memory() -> int:
    """Bytes of memory of this machine, 0 if it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
