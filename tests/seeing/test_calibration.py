"""How far an accuracy can be trusted: by other libraries' numbers, or counted one by one."""

import pytest
import torch

from timm_cbam2.seeing.calibration import accuracy_interval, calibration, macro_f1, said
from timm_cbam2.training.predictions import Predictions


@pytest.fixture(scope="module")
def found():
    logits, labels = 3 * torch.randn(500, 6, generator=torch.Generator().manual_seed(1)), torch.arange(500) % 6
    logits[torch.arange(500), labels] += 2
    probabilities = logits.softmax(1)
    top = probabilities.topk(5).indices
    return Predictions(top, torch.zeros(500), labels, probabilities.amax(1)), probabilities


def test_calibration(found):
    found, probabilities = found
    measured = calibration(found.confidence, found.correct)
    error = 0.0
    for low in torch.arange(15) / 15:
        inside = (found.confidence > low) & (found.confidence <= low + 1 / 15)
        if inside.any():
            gap = found.correct[inside].double().mean() - found.confidence[inside].double().mean()
            error += (gap.abs() * inside.sum() / len(found.labels)).item()
    assert measured["ece"] == pytest.approx(error, abs=1e-6) and measured["ece"] > 0.05
    assert sum(b["images"] for b in measured["bins"]) == 500
    assert measured["accuracy"] == pytest.approx(found.accuracy()) and "too sure of itself" in said(measured)
    functional = pytest.importorskip("torchmetrics.functional.classification")
    theirs = functional.multiclass_calibration_error(probabilities, found.labels, num_classes=6, n_bins=15)
    assert measured["ece"] == pytest.approx(theirs.item(), abs=1e-6)


def test_a_model_that_is_always_sure_and_right():
    measured = calibration(torch.ones(4), torch.ones(4, dtype=torch.bool))
    assert measured["ece"] == 0 and measured["bins"] == [{"confidence": 1.0, "accuracy": 1.0, "images": 4}]
    low, high = accuracy_interval(torch.ones(4, dtype=torch.bool))
    assert low == pytest.approx(4 / (4 + 1.959964**2), rel=1e-6) and high == 1.0  # not 1 to 1
    low, high = accuracy_interval(torch.tensor([True] * 81 + [False] * 182))  # the example of Newcombe (1998)
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_macro_f1_counts_every_class_equally():
    labels, said = torch.tensor([0] * 8 + [1] * 2), torch.tensor([0] * 10)
    found = Predictions(said[:, None], torch.zeros(10), labels, torch.ones(10))
    assert macro_f1(found) == pytest.approx((2 * 0.8 / 1.8 + 0) / 2)
