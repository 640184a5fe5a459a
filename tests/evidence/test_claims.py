"""The bench of claims: what it measures is right where the answer is known, and a run goes on where it was stopped."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

from timm_cbam2 import Cbam2
from timm_cbam2.data.tasks import Samples, make
from timm_cbam2.errors import UserError
from timm_cbam2.evidence.claims import measures
from timm_cbam2.evidence.claims.__main__ import run, table
from timm_cbam2.evidence.claims.networks import build
from timm_cbam2.evidence.claims.results import KEYS, append, paired, read
from timm_cbam2.evidence.claims.training import RECIPES, train
from timm_cbam2.evidence.claims.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]


def _samples(boxes, side=8):
    count = len(boxes)
    images = np.zeros((count, side, side), np.uint8)
    return Samples(images, np.zeros(count, int), np.array(boxes), np.zeros(count, int))


def test_where_a_mask_looks():
    samples = _samples([(0, 0, 4, 4), (4, 4, 8, 8)])
    own = torch.zeros(2, 4, 4)
    own[0, :2, :2] = own[1, 2:, 2:] = 2.0  # each image's mask is its box
    inside, of_mean = measures.inside_minus_outside(own, samples)
    assert inside == pytest.approx(2.0)
    assert of_mean == pytest.approx(1 - 1 / 3)  # the mean mask is 1 in both boxes, which are a third of what is outside
    same = own.mean(0, keepdim=True).expand_as(own)
    assert measures.inside_minus_outside(same, samples) == pytest.approx((of_mean, of_mean))
    assert measures.pointing(own, samples) == 1.0 and measures.pointing(own.flip(0), samples) == 0.0
    assert measures.box_share(samples) == 0.25
    assert measures.pointing(torch.full((2, 4, 4), 2.0), samples) == 0.25  # equally strong everywhere: by chance
    half = torch.zeros(2, 1, 1)
    assert measures.inside_minus_outside(half + 1, samples)[0] == pytest.approx(0)


def test_information_needs_a_connection():
    random = np.random.default_rng(0)
    factors = random.integers(0, 3, 2000)
    told = torch.tensor(np.eye(3)[factors]) * 0.4 + 0.2 + torch.tensor(random.normal(0, 0.01, (2000, 3)))
    found = measures.mutual_information(told, factors)
    first_of_three = -(1 / 3) * np.log2(1 / 3) - (2 / 3) * np.log2(2 / 3)  # one weight tells one class from two
    assert found["bits"] == pytest.approx(first_of_three, abs=0.12) and found["null"] < 0.02
    blind = torch.tensor(random.random((2000, 3)))
    found = measures.mutual_information(blind, factors)
    assert found["bits"] < 0.02 and found["bits"] < 2 * found["null"]


def test_dead_is_saturated_and_the_same():
    block = Cbam2(4, gate="unit_sigmoid")
    mask = torch.ones(100, 4, 1, 1)
    mask[:, 0], mask[:, 1] = 0.001, 1.999
    mask[:50, 2], mask[50:, 2] = 0.001, 1.999  # hard, but it depends on the image
    found = measures.liveness(block, "channel", mask)
    assert found["dead"] == 0.5 and found["saturated"] == 0.75
    bounded = build("t-route-bound", 1, seed=0).layer2[0].se
    high = 2 / (1 + np.exp(-bounded.bound))
    found = measures.liveness(bounded, "channel", torch.full((100, 32, 1, 1), float(high)))
    assert found["dead"] == 1.0  # a nearer end is an end
    assert measures.liveness(block, "channel", torch.full((100, 4, 1, 1), float(high)))["dead"] == 0.0
    one_takes_all = torch.tensor([[0.99, 0.01]]).repeat(100, 1)
    assert measures.liveness(block, "branches", one_takes_all)["dead"] == 1.0
    by_turns = torch.tensor([[0.99, 0.01], [0.01, 0.99]]).repeat(50, 1)
    found = measures.liveness(block, "branches", by_turns)
    assert found["spread"] == pytest.approx(0.49) and found["dead"] == 0.0 and found["within"] == 0.0


class _Told(nn.Module):
    """Says class 1 where its block's masks are above a half: they alone tell dark images from bright ones."""

    def __init__(self):
        super().__init__()
        self.block = Cbam2(3, gate="unit_sigmoid", rd_channels=1)
        with torch.no_grad():
            self.block.channel.fc1.weight.fill_(1 / 3)
            self.block.channel.fc2.weight.fill_(-0.2)  # the brighter, the lower the mask

    def forward(self, x):
        features = x + 5  # above 0
        mask = self.block(features).mean((1, 2, 3)) / features.mean((1, 2, 3))
        return torch.stack([torch.full_like(mask, 0.5), mask], 1)


def test_worth_is_what_a_decision_of_its_own_brings():
    network = _Told().eval()
    images = torch.zeros(40, 8, 8, dtype=torch.uint8)
    images[::2] = 255
    labels = torch.arange(40) % 2  # dark ones are 1
    seen = measures._record(network, images)
    assert seen["block"]["channel"].shape == (40, 3, 1, 1) and seen["block"]["branches"].shape == (40, 4)
    lost = measures.worth(network, images, labels, seen)
    assert lost == {"channel": 50.0, "spatial": 0.0, "fusion": 0.0, "branches": 0.0}


def test_variants_share_what_they_have_in_common():
    """The same first weights in every common layer, and the same logits where attention starts at the identity."""
    at_zero, whole = build("plain", 1, seed=3), build("plain-whole", 1, seed=3)
    assert not at_zero.layer1[0].bn2.weight.any() and torch.equal(whole.conv1.weight, at_zero.conv1.weight)
    x = torch.randn(2, 3, 16, 16)
    for name, variant in VARIANTS.items():
        plain = at_zero if variant.get("zero_init_last", True) else whole
        network = build(name, 1, seed=3, stages="23")
        gains = variant.get("gains", (0.1, 0.1))
        for block in (m for m in network.modules() if type(m) is Cbam2):
            starts = [(block.channel.norm, gains[0])] + [
                (p.router.norm, gains[1]) for p in (block.channel, block.spatial)
            ]
            assert all(norm is None or torch.equal(norm.weight, norm.weight * 0 + gain) for norm, gain in starts), name
        own = network.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in plain.state_dict().items()), name
        assert not any(key.startswith("layer1.0.se.") for key in own)
        if VARIANTS[name]["attention"] in ("cbam2", "trial"):
            torch.testing.assert_close(network.eval()(x), plain.eval()(x))
    other = build("plain", 1, seed=4)
    assert not torch.equal(other.conv1.weight, at_zero.conv1.weight)


def test_training_is_a_function_of_the_seed():
    made = make("scale", "train", 64, side=16)
    images, labels = torch.from_numpy(made.images), torch.from_numpy(made.labels)
    after = []
    for seed in (0, 0, 1):
        network = build("cbam2", 1, seed=0)
        train(network, images, labels, seed, RECIPES["sgd"], epochs=1, batch_size=32, bf16=False)
        after.append(network.state_dict()["conv1.weight"])
    assert torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])


def test_pairs_are_of_one_setting(tmp_path):
    row = dict.fromkeys(KEYS, 0)
    path = tmp_path / "results.jsonl"
    for seed, plain, better in ((0, 0.5, 0.52), (1, 0.6, 0.64)):
        append(path, {**row, "variant": "plain", "seed": seed, "accuracy": plain})
        append(path, {**row, "variant": "cbam2", "seed": seed, "accuracy": better})
    append(path, {**row, "variant": "cbam2", "seed": 2, "accuracy": 0.9})  # without its pair
    append(path, {**row, "variant": "plain", "seed": 2, "accuracy": 0.1, "mixed_precision": "no"})  # nor is this
    with path.open("a") as file:
        file.write('{"cut off')
    rows = read(path)
    found = paired(rows, "cbam2", "plain")
    assert len(rows) == 6 and found.count == 2 and found.mean == pytest.approx(3.0)
    assert found.half == pytest.approx(12.706 * 1.0, rel=1e-3)  # Student's t for two values, standard error 1
    append(path, {**row, "variant": "se", "accuracy": 0.1})
    assert [r["variant"] for r in read(path)][-1] == "se" and len(read(path)) == 7


def test_a_run_and_its_table(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    small = dict(count=64, val_count=32, epochs=1, side=16, seeds="0", results=path, start=1, task="light")
    assert run(variants="plain,maps-none", **small) == 2
    plain, routed = [json.loads(line) for line in path.read_text().splitlines()]
    assert plain["start"] == 1 and plain["grad_cam"]["pointing"] >= 0 and "blocks" not in plain
    assert set(routed["worth"]) == {"channel", "spatial", "fusion", "branches"}
    last = routed["blocks"]["layer3.0.se"]
    assert len(last["branches"]["mean"]) == 4 and last["branches"]["within"] > 0
    assert set(last["fusion"]["information"]) == {"bits", "null"} and "inside" in last["spatial"]
    assert run(variants="plain,maps-none", **small) == 0 and len(path.read_text().splitlines()) == 2
    assert run(variants="plain", start_on="scale", **small) == 1  # another beginning is another training
    moved = json.loads(path.read_text().splitlines()[-1])
    assert (plain["start_on"], moved["start_on"]) == ("light", "scale")
    assert moved["grad_cam"]["inside"] != plain["grad_cam"]["inside"]
    assert run(variants="plain", mixed_precision="no", **small) == 1 and plain["mixed_precision"] == "bf16"
    single = json.loads(path.read_text().splitlines()[-1])
    assert single["mixed_precision"] == "no" and single["grad_cam"]["inside"] != plain["grad_cam"]["inside"]
    capsys.readouterr()
    table(results=path)
    shown = capsys.readouterr().out
    assert "| maps-none | 1 |" in shown and "Grad-CAM on plain" in shown
    assert "| plain | 1 |" in shown and "| plain | 2 |" not in shown, "a seed counts once, whatever its precision"
    for wrong, text in (
        (dict(task="clutte"), "clutter, crowd, scale, light, position"),
        (dict(variants="plain,sse"), "no sse"),
        (dict(seeds="a"), "--seeds a"),
        (dict(stages="4"), "--stages 4"),
        (dict(start_on="clutte"), "--start-on clutte: no such task"),
        (dict(start_on="scale", start=0), "--start-on scale: for how many epochs"),
        (dict(mixed_precision="fp16"), "--mixed-precision fp16: no fp16; give some of no, bf16"),
        (dict(recipe="adam"), "adamw, adamw-slow, adamw-fast, sgd, sgd-fast"),
    ):
        with pytest.raises(UserError, match=text):
            run(**{**small, **wrong})
    command = [sys.executable, "-m", "timm_cbam2.evidence.claims", "table", "--results", tmp_path / "none.jsonl"]
    empty = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert empty.returncode == 2 and "holds no result" in empty.stderr and "Traceback" not in empty.stderr, empty


def test_looking_at_a_shipped_model():
    """It is measured as `evaluate` measures it, on the same pictures; what it was not made for is refused."""
    folder = ROOT / "checkpoints" / "resnet20_cbam2.clutter"
    command = [sys.executable, "-m", "timm_cbam2.evidence.claims", "look"]
    done = subprocess.run([*command, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figure = re.search(r"Top-1 accuracy ([0-9.]+ %)", (folder / "README.md").read_text())[1]
    assert done.stdout.startswith(f"Accuracy {figure}.")
    last = done.stdout.splitlines()[-1].split("|")
    inside, of_mean = map(float, re.findall(r"-?[0-9.]+", last[2]))
    assert last[1].strip() == "layer3.2.se" and inside > 1 > of_mean and float(last[3]) > 0.9, "what README says of it"
    for model, task, words in (
        ("resnet32_cbam2", "clutter", "no pretrained weights"),
        ("resnet20_cbam2.cifar10", "clutter", "tells airplane, automobile, bird … apart, not the ten digits"),
        (folder, "digits", "no digits; give some of clutter"),
    ):
        done = subprocess.run([*command, model, "--task", task], capture_output=True, text=True)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done
