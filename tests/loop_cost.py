"""What the loop itself costs: images/s of `finetune` beside a bare PyTorch loop: `python tests/loop_cost.py`."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch import nn

import timm_cbam2  # noqa: F401
from timm_cbam2.data import ImageDataset, data_config, find_images, make_loader

ROUNDS, EPOCHS, BATCH = 3, 2, 32


def bare():
    """Images per second of the second epoch: same model, data, order of work, optimizer and workers."""
    torch.manual_seed(0)
    images = find_images("digits")
    network = timm.create_model("resnet20_cbam2", num_classes=10).train()
    dataset = ImageDataset(images.splits["train"], data_config(network, 32, **images.data_config), images.augment)
    loader = make_loader(dataset, BATCH, 0, shuffle=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        count, began = 0, time.monotonic()
        for pixels, labels, _ in loader:
            loss = nn.functional.cross_entropy(network(pixels), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            count += len(labels)
    return count / (time.monotonic() - began)


def ours():
    """The same number from metrics.jsonl of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "timm_cbam2.finetune", "--no-pretrained", "--epochs", str(EPOCHS)]
        command += ["--batch-size", str(BATCH), "--output", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])["images_per_second"]


def main():
    pairs = [(bare(), ours()) for _ in range(ROUNDS)]
    for one, other in pairs:
        print(f"bare {one:.0f} images/s, finetune {other:.0f} images/s: {100 * other / one:.1f} %", flush=True)
    print(f"median {100 * statistics.median(other / one for one, other in pairs):.1f} %")


if __name__ == "__main__":
    main()
