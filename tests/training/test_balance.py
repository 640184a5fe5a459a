"""Classes of unequal size, and what is dropped out: drawn, weighted, told of, and resumed to the bit."""

import json
import time

import pytest
import timm
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

import timm_cbam2  # noqa: F401
from timm_cbam2.data.balance import BalancedSampler, class_weights
from timm_cbam2.data.images import ArraySamples, Images
from timm_cbam2.data.sources import find_images
from timm_cbam2.training.optimise import make_loss

LABELS = [0] * 60 + [1] * 30 + [2] * 6


@pytest.fixture(scope="module")
def uneven(write_folder, tmp_path_factory):
    """40, 20, 2 and 1 images to train on; validation lacks the last class, whose folder is empty, and the third."""
    base = tmp_path_factory.mktemp("uneven")
    for digit, count in ((0, 40), (1, 20), (2, 2), (3, 1)):
        write_folder(base / "train", classes=(digit,), count=count)
    write_folder(base / "val", classes=(0, 1), start=60, count=8)
    (base / "val" / "digit3").mkdir()
    return base


def test_each_class_is_drawn_equally_often():
    sampler = BalancedSampler(LABELS, seed=1)
    counts = torch.zeros(3)
    for epoch in range(1, 51):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        assert (
            len(drawn) == len(set(drawn)) == len(LABELS)
        )  # a repetition has an index, and an augmentation, of its own
        assert drawn == list(sampler)
        counts += torch.bincount(torch.tensor([LABELS[i % len(LABELS)] for i in drawn]), minlength=3)
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.03, counts
    sampler.set_epoch(1)
    assert list(sampler) != drawn and list(BalancedSampler(LABELS, seed=2)) != list(sampler)
    batches = BatchSampler(sampler, 4, drop_last=True)
    shares = [[i for batch in BatchSamplerShard(batches, 2, process) for i in batch] for process in range(2)]
    assert not set(shares[0]) & set(shares[1]) and len(shares[0]) == len(shares[1]) == len(LABELS) // 2


def test_each_class_counts_equally_in_the_loss():
    images = Images("uneven", list("abcd"), {"train": ArraySamples([], LABELS)})
    weights = class_weights(images)
    counts = torch.tensor([60.0, 30.0, 6.0])
    assert torch.allclose(weights[:3] * counts, torch.full((3,), 32.0)) and weights[3] == 1
    settings = dict(label_smoothing=0.0, mixup=0.0, cutmix=0.0, bce=False, bce_target_threshold=None, multi_label=False)
    logits, labels = torch.randn(len(LABELS), 4), torch.tensor(LABELS)
    each = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    expected = torch.stack([each[labels == c].mean() for c in range(3)]).mean()
    assert torch.allclose(make_loss(settings, 4, weights)[0](logits, labels), expected)
    loss, _ = make_loss(settings | {"bce": True}, 4, weights)
    targets = torch.nn.functional.one_hot(labels, 4).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)
    assert torch.allclose(loss(logits, labels), expected)


def test_unequal_classes_and_dropout(start, run, refused, uneven, quick, tmp_path):
    """What is said of them; and a run that was killed goes on with the same images, dropped parts and weights."""
    args = ("finetune", "--data", uneven, *quick, "--batch-size", "4", "--no-pretrained", "--balance", "sampler")
    args += ("--drop", "0.2", "--drop-path", "0.1", "--save-every", "1 step")
    whole = run(*args, "--output", tmp_path / "whole")
    assert whole.code == 0 and whole.err == "", whole
    for words in (
        "note: a single image to train on of class digit3",
        "note: few images of class digit2 (2 to train on; 40 of the largest)",
        "note: no validation image of the classes digit2, digit3",
    ):
        assert words in whole.out, whole.out
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["drop_path"] == 0.1

    killed = start(*args, "--output", tmp_path / "killed")
    while len(list((tmp_path / "killed" / "checkpoints").glob("step-*3"))) == 0:
        assert killed.alive, killed.wait()
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert run("finetune", "--resume", tmp_path / "killed").code == 0
    one, other = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    weighted = run(*args, "--balance", "weights", "--epochs", "1", "--output", tmp_path / "weighted")
    assert weighted.code == 0 and "makes up for it" not in weighted.out, weighted
    measured = run("evaluate", tmp_path / "weighted")
    assert measured.code == 0 and "digit3" not in measured.out.split("per class")[1], measured
    again = ("--drop-path", "0.1", "--model-kwargs", "drop_path_rate=0.2")
    refused(*args, *again, words=("--drop-path", "drop_path_rate", "one of them"))
    refused("finetune", "--balance", "some", words=("--balance some", "none", "sampler", "weights"))
    refused("finetune", "--balance", "sampler", "--aug-repeats", "2", words=("--aug-repeats", "one of them"))
    refused("finetune", "--balance", "weights", "--streaming", words=("--balance", "--streaming"))


def test_drop_reaches_the_model(uneven):
    from timm_cbam2.training.options import Options
    from timm_cbam2.training.prepare import build
    from timm_cbam2.training.settings import check_options

    settings = vars(Options(model="test_resnet_cbam2", drop=0.3, drop_path=0.2))
    check_options(settings)
    network, _, _ = build(settings, find_images(str(uneven)))
    plain = timm.create_model("test_resnet_cbam2", drop_rate=0.3, drop_path_rate=0.2)
    assert network.drop_rate == plain.drop_rate == 0.3
    rates = [[m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")] for net in (network, plain)]
    assert rates[0] == rates[1] and max(rates[0]) == pytest.approx(0.2)
