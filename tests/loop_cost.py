"""What the loop itself costs: images/s of `finetune` beside a bare PyTorch loop: `python tests/loop_cost.py`.

Both run in this process, in turns and in changing order, an epoch each, on the same images, model, optimizer, number of
steps, threads and workers; after a first turn that does not count. The bare loop logs, watches and saves nothing.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import timm_cbam2  # noqa: F401
from timm_cbam2.data import ImageDataset, data_config, find_images, make_loader
from timm_cbam2.finetune import finetune

ROUNDS = 8
CASES = (  # model, side in pixels, batch size, workers; without workers the digits, else files
    ("resnet20_cbam2", 32, 64, 0),
    ("resnet18_cbam2", 64, 32, 1),
)


def write_images(folder, count=512, side=80):
    """A folder of JPEG files of two classes."""
    draw = np.random.default_rng(0)
    for number in range(count):
        where = folder / "ab"[number % 2]
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(where / f"{number}.jpg")
    return str(folder)


def bare(data, model, side, batch_size, workers):
    """Images per second of an epoch of the loop that anybody would write."""
    images = find_images(data).with_val("0.2")
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=len(images.classes)).train()
    dataset = ImageDataset(images.splits["train"], data_config(network, side, **images.data_config), images.augment)
    loader = make_loader(dataset, batch_size, workers, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    count, began = 0, time.monotonic()
    for pixels, labels, _ in loader:
        loss = nn.functional.cross_entropy(network(pixels), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        count += len(labels)
    return count / (time.monotonic() - began)


def ours(data, model, side, batch_size, workers):
    """The same number, as a run reports it."""
    options = dict(pretrained=False, epochs=1, img_size=side, batch_size=batch_size, workers=workers, lr=1e-3)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return finetune(data=data, model=model, output=Path(folder) / "run", **options)["images_per_second"]


def main():
    with tempfile.TemporaryDirectory() as base:
        files = write_images(Path(base))
        for case in CASES[int(sys.argv[1]) :][:1] if len(sys.argv) > 1 else CASES:
            data = files if case[3] else "digits"
            bare(data, *case), ours(data, *case)
            pairs = []
            for turn in range(ROUNDS):
                found = {loop: loop(data, *case) for loop in ((bare, ours), (ours, bare))[turn % 2]}
                pairs.append((found[bare], found[ours]))
            shares = sorted(100 * other / one for one, other in pairs)
            one, other = (statistics.median(column) for column in zip(*pairs))
            name = f"{case[0]}, {case[1]} pixels, batch {case[2]}, {case[3]} workers, {torch.get_num_threads()} threads"
            print(f"{name}: bare {one:.1f} images/s, finetune {other:.1f}", end="; ")
            print(f"median share {statistics.median(shares):.1f} % ({shares[0]:.1f} to {shares[-1]:.1f})", flush=True)


if __name__ == "__main__":
    main()
