"""What the loop itself costs, and what training the attention alone saves: `python tests/loop_cost.py`.

images/s of `finetune` beside a bare PyTorch loop, then of `--train attention+head` beside `--train all`. The two run in
this process, in turns and in changing order, an epoch each, on the same images, model, optimizer, number of steps,
threads and workers; after a first turn that does not count. The bare loop logs, watches and saves nothing.
"""

import contextlib
import io
import json
import statistics
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

ROUNDS, PART = 6, "attention+head"
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


def in_turns(one, other):
    """Medians of the two functions' images/s, and the shares of the second in the first, turn by turn, sorted."""
    pairs = []
    for turn in range(ROUNDS + 1):
        found = {function: function() for function in ((one, other), (other, one))[turn % 2]}
        pairs.append((found[one], found[other]))
    pairs = pairs[1:]
    return *(statistics.median(column) for column in zip(*pairs)), sorted(100 * b / a for a, b in pairs)


def main():
    with tempfile.TemporaryDirectory() as base:
        files = write_images(Path(base))
        for model, side, batch_size, workers in CASES:
            case = (files if workers else "digits", model, side, batch_size, workers)
            print(f"{model}, {side} pixels, batch {batch_size}, {workers} workers, {torch.get_num_threads()} threads:")
            one, other, shares = in_turns(lambda case=case: bare(*case), lambda case=case: run(*case)[0])
            print(
                f"  bare loop {one:.1f} images/s, finetune {other:.1f}: {statistics.median(shares):.1f} % "
                f"({shares[0]:.1f} to {shares[-1]:.1f})",
                flush=True,
            )
            one, other, shares = in_turns(lambda case=case: run(*case)[0], lambda case=case: run(*case, PART)[0])
            trained, everything = run(*case, PART)[1], run(*case)[1]
            print(
                f"  --train all {one:.1f} images/s, --train {PART} {other:.1f}: {statistics.median(shares):.1f} % "
                f"({shares[0]:.1f} to {shares[-1]:.1f}); trains {trained:,} of {everything:,} parameters",
                flush=True,
            )


if __name__ == "__main__":
    main()
