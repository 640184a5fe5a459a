"""A model of each family, saved, and images for it."""

import pytest
import timm
import torch
from randomise import randomise

import timm_cbam2.models.cbam2
from timm_cbam2.hub.folder import save

ARCHITECTURES = ["test_resnet_cbam2", "test_convnext_cbam2"]
OPTIONS = dict(gate="sigmoid", kernel_sizes=(3, 4), router_pool="moments", learnable_temperature=False)
NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    """(folder, model) of a network in which nothing is at its special starting value."""
    model = randomise(timm.create_model(request.param, num_classes=5, cbam2=OPTIONS)).eval()
    return save(model, tmp_path_factory.mktemp("models") / "model", label_names=NAMES), model


@pytest.fixture
def calls(monkeypatch):
    """How often the lean path ran."""
    counted = []
    original = timm_cbam2.models.cbam2.fused
    monkeypatch.setattr(timm_cbam2.models.cbam2, "fused", lambda *args: counted.append(1) or original(*args))
    return counted


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 48, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def plain_timm_saves():
    """`plain_timm_saves(model, folder)` lets timm write a folder; before 1.0.31 it has to be told the arguments."""

    def call(model, folder):
        options = {"cbam2": dict(model.cbam2_options)}
        timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=options)

    return call
