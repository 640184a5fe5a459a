"""A teacher beside the labels: the loss by hand, classes by name, a run that is resumed, and what is refused."""

import json

import timm
import torch

import timm_cbam2  # noqa: F401
from timm_cbam2.hub.folder import save
from timm_cbam2.training.distill import Distillation


class Teacher(torch.nn.Module):
    """Says what it sees: the mean of each channel."""

    def forward(self, x):
        return x.mean((2, 3))


def test_the_loss():
    images, logits, loss = torch.rand(5, 3, 4, 4), torch.randn(5, 3, requires_grad=True), torch.tensor(1.7)
    mean, std, other_mean, other_std = (torch.rand(3) + 0.5 for _ in range(4))
    statistics = torch.stack([mean, std]), torch.stack([other_mean, other_std])
    order, alpha, t = [2, 0, 1], 0.3, 4.0
    pixels = images * std.view(3, 1, 1) + mean.view(3, 1, 1)
    said = ((pixels - other_mean.view(3, 1, 1)) / other_std.view(3, 1, 1)).mean((2, 3))[:, order]
    for several in (False, True):
        if several:
            p, q = (said / t).sigmoid(), (logits / t).sigmoid()
            divergence = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        else:
            p, q = (said / t).softmax(1), (logits / t).softmax(1)
            divergence = (p * (p / q).log()).sum(1).mean()
        found = Distillation(Teacher(), order, alpha, t, statistics, several)(images, logits, loss)
        assert torch.allclose(found, (1 - alpha) * loss + alpha * t**2 * divergence, atol=1e-5), several
        (gradient,) = torch.autograd.grad(found, logits)
        assert gradient.abs().sum() > 0


def test_a_teacher_in_the_loop(run, refused, small_run, quick, tmp_path):
    """Its answers count, in training mode or not it stays as it is, and a run goes on with it."""
    folder, data = small_run
    args = ("finetune", "--data", data, *quick, "--no-pretrained", "--distill-from", folder)
    whole = run(*args, "--output", tmp_path / "whole")
    assert whole.code == 0 and f"50 % of the loss is how far it is from what {folder}" in whole.out, whole
    settings = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert settings["distill_from"] == str(folder) and settings["distill_temperature"] == 2.0

    # Of the teacher alone, without augmentation and with a rate of nothing, the divergence from itself is 0.
    alone = ("finetune", "--data", data, *quick, "--epochs", "1", "--model", folder, "--distill-from", folder)
    alone += ("--distill-alpha", "1", "--lr", "1e-12", "--weight-decay", "0", "--drop", "0")
    result = run(*alone, "--output", tmp_path / "alone", "--train", "head")
    assert result.code == 0, result
    row = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text())
    plain = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["train_loss"] < 0.3 * plain["train_loss"], row

    save(timm.create_model("resnet20", num_classes=3), tmp_path / "other", label_names=["digit0", "digit1", "cat"])
    begin = ("finetune", "--data", data, *quick, "--output", tmp_path / "no")
    refused(*begin, "--distill-from", tmp_path / "other", words=("--distill-from", "does not know digit2", "twin"))
    save(timm.create_model("resnet20", num_classes=5), tmp_path / "nameless")
    refused(*begin, "--distill-from", tmp_path / "nameless", words=("5 classes", "without naming them", "3"))
    refused(*begin, "--distill-from", "resnet20_cbam3", words=("unknown model resnet20_cbam3",))
    refused(*begin, "--distill-alpha", "0.9", words=("--distill-alpha", "--distill-from"))
    grey = timm.create_model("resnet20", num_classes=3, in_chans=1)
    save(grey, tmp_path / "grey", label_names=["digit0", "digit1", "digit2"])
    refused(*begin, "--distill-from", tmp_path / "grey", words=("1 channels", "3"))
