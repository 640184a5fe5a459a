"""What the loop itself costs, and what training the attention alone saves: `python tests/loop_cost.py`.

images/s of a bare PyTorch loop, of `finetune`, and of `finetune --train attention+head`. All run in this process, in
turns and in changing order, an epoch each, on the same images, model, optimizer, number of steps, threads and workers;
after a first turn that does not count. The bare loop logs, watches and saves nothing.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

import timm_cbam2  # noqa: F401
from timm_cbam2.data.loading import ImageDataset, data_config, make_loader
from timm_cbam2.data.sources import find_images
from timm_cbam2.finetune import finetune

ROUNDS, PART = 4, "attention+head"
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


def run(data, model, side, batch_size, workers, train="all"):
    """The same number, as a run reports it; and its trainable parameters."""
    options = dict(pretrained=False, epochs=1, img_size=side, batch_size=batch_size, workers=workers, lr=1e-3)
    with tempfile.TemporaryDirectory() as base, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(base) / "run"
        speed = finetune(data=data, model=model, output=folder, train=train, **options)["images_per_second"]
        return speed, json.loads((folder / "run.json").read_text())["trainable_parameters"]


def in_turns(*functions):
    """The results of each function, turn by turn, in an order that goes on by one each turn."""
    turns = []
    for turn in range(ROUNDS + 1):
        order = [(turn + k) % len(functions) for k in range(len(functions))]
        found = {k: functions[k]() for k in order}
        turns.append([found[k] for k in range(len(functions))])
    return list(zip(*turns[1:]))


def share(one, other):
    """The median of the turns' shares of one speed in another, and their range, in words."""
    shares = sorted(100 * a / b for a, b in zip(one, other))
    return f"{statistics.median(shares):.1f} % ({shares[0]:.1f} to {shares[-1]:.1f})"


def main():
    with tempfile.TemporaryDirectory() as base:
        files = write_images(Path(base))
        for model, side, batch_size, workers in CASES:
            case = (files if workers else "digits", model, side, batch_size, workers)
            functions = (bare, run, partial(run, train=PART))
            loop, whole, part = in_turns(*(partial(function, *case) for function in functions))
            trained = {number for _, number in whole}.pop(), {number for _, number in part}.pop()
            whole, part = ([speed for speed, _ in column] for column in (whole, part))
            speeds = [statistics.median(column) for column in (loop, whole, part)]
            print(
                f"{model}, {side} pixels, batch {batch_size}, {workers} workers, {torch.get_num_threads()} threads:\n"
                f"  bare loop {speeds[0]:.1f} images/s, finetune {speeds[1]:.1f}: {share(whole, loop)}\n"
                f"  --train {PART} {speeds[2]:.1f}: {share(part, whole)} of --train all; "
                f"trains {trained[1]:,} of {trained[0]:,} parameters",
                flush=True,
            )


if __name__ == "__main__":
    main()
