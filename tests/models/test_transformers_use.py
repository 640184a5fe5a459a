"""The transformers models in use: checkpointing, devices, pipelines, `Trainer`, and configurations that are wrong."""

import pytest
import timm
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from timm_cbam2 import Cbam2Config, Cbam2ForImageClassification
from timm_cbam2.hub.folder import save

ARCHITECTURES = ["test_resnet_cbam2", "test_convnext_cbam2"]
OPTIONS = dict(gate="sigmoid", kernel_sizes=(3, 4), router_pool="moments", learnable_temperature=False)
NAMES = ["ant", "bee", "cat", "dog", "eel"]


def test_gradient_checkpointing(saved, images):
    gradients = []
    for enable in (False, True):
        model = AutoModelForImageClassification.from_pretrained(saved[0]).train()
        if enable:
            # Its name since transformers 5.23 or so, and before.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            assert model.timm_model.stages[0].grad_checkpointing if "convnext" in model.config.architecture else True
        model(images, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)
    if hasattr(model, "activation_checkpointing_enable"):
        with pytest.raises(ValueError, match="every_n_layers=2 is not allowed"):
            model.activation_checkpointing_enable(every_n_layers=2)


def test_dtype_and_device_map(saved, images, tmp_path):
    folder, model = saved
    half = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(images).logits.dtype == torch.bfloat16
    for device_map in ("auto", "cpu", {"": "cpu"}):
        placed = AutoModel.from_pretrained(folder, device_map=device_map)
        with torch.no_grad():
            assert torch.equal(placed(images).last_hidden_state, model.forward_features(images))
    children = [f"timm_model.{name}" for name, _ in placed.timm_model.named_children()]
    device_map = {name: "disk" if name == children[-2] else "cpu" for name in children}
    with pytest.raises(ValueError, match="cannot be offloaded"):
        AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)


def test_compile(images):
    model = AutoModelForImageClassification.from_config(Cbam2Config(architecture="test_resnet_cbam2")).eval()
    compiled = torch.compile(model, backend="eager")  # what comes after the graph: test_compile.py
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits)
        assert len(compiled(images, output_attentions=True).attentions) > 3


def test_pixels_and_pipeline(saved, caplog):
    from PIL import Image
    from transformers.utils import logging

    logging.enable_propagation()

    folder, model = saved
    picture = Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).convert("RGB")
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    pixels = AutoImageProcessor.from_pretrained(folder)(picture)["pixel_values"]
    assert torch.equal(pixels[0], transform(picture))
    classify = pipeline("image-classification", model=str(folder))
    logging.disable_propagation()
    if Version(transformers.__version__) >= Version("5.23"):  # 5.4 does so for timm's own wrapper too
        assert not caplog.records, "a backend had to be replaced by another"
    best = classify(picture)[0]
    probabilities = model(pixels).softmax(-1)[0]
    assert best["label"] == NAMES[probabilities.argmax()]
    assert best["score"] == pytest.approx(probabilities.max().item(), rel=1e-4)


def test_class_names_stay_with_the_weights(saved, plain_timm_saves, tmp_path):
    """Both when a loaded model is saved anew and when plain timm saves it, which puts them elsewhere."""
    model = timm.create_model(f"local-dir:{saved[0]}", pretrained=True)
    save(model, tmp_path / "ours")
    plain_timm_saves(model, tmp_path / "timm")
    for folder in ("ours", "timm"):
        again = Cbam2ForImageClassification.from_pretrained(tmp_path / folder)
        assert list(again.config.id2label.values()) == NAMES
        assert timm.create_model(f"local-dir:{tmp_path / folder}").pretrained_cfg["label_names"] == NAMES
    model.reset_classifier(3)
    save(model, tmp_path / "other")
    assert Cbam2ForImageClassification.from_pretrained(tmp_path / "other").config.id2label[0] == "LABEL_0"


class Pictures(torch.utils.data.Dataset):
    """Noise whose brightness tells the class."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        noise = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": noise + index % 5, "labels": index % 5}


def test_trainer_two_epochs_and_resume(tmp_path):
    def train(output, **options):
        torch.manual_seed(0)
        model = AutoModelForImageClassification.from_config(Cbam2Config(architecture="test_resnet_cbam2", num_labels=5))
        arguments = TrainingArguments(
            output, num_train_epochs=2, per_device_train_batch_size=8, save_strategy="epoch", learning_rate=1e-2,
            eval_strategy="epoch", report_to=[], disable_tqdm=True, use_cpu=True, load_best_model_at_end=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Pictures(), eval_dataset=Pictures())
        trainer.train(**options)
        return model

    whole = train(tmp_path / "whole")
    first, last = tmp_path / "whole/checkpoint-3", tmp_path / "whole/checkpoint-6"
    resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(first))
    weights = load_file(last / "model.safetensors")
    for key, value in load_file(tmp_path / "resumed/checkpoint-6/model.safetensors").items():
        torch.testing.assert_close(value, weights[key])
    assert not torch.equal(load_file(first / "model.safetensors")["fc.weight"], weights["fc.weight"])
    images = torch.stack([Pictures()[i]["pixel_values"] for i in range(4)])
    through_timm = timm.create_model(f"local-dir:{last}", pretrained=True).eval()
    again = AutoModelForImageClassification.from_pretrained(last)
    assert torch.equal(through_timm(images), again(images).logits)
    assert whole(images).logits.isfinite().all() and resumed(images).logits.isfinite().all()


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(architecture="resnet50_cbam"), "did you mean resnet50_cbam2"),
        (dict(architecture="../../etc/passwd"), "Unknown architecture"),
        (dict(architecture="hf-hub:someone/pickle_cbam2"), "Unknown architecture"),
        (dict(architecture="resnet50"), "Unknown architecture"),
        (dict(num_classes=10**9), "num_classes=1000000000 is not allowed"),
        (dict(num_labels=-1), "num_classes=-1 is not allowed"),
        (dict(model_args=dict(cbam2=dict(gates="sigmoid"))), "Did you mean gate"),
        (dict(model_args=dict(checkpoint_path="/tmp/x.pth")), "model_args 'checkpoint_path' is not allowed"),
        (dict(architecture="resnet20_cbam2", out_features=["stage4"]), "out_features must be a subset"),
    ],
)
def test_a_wrong_configuration_is_a_clear_error(fields, words):
    with pytest.raises(ValueError, match=words):
        Cbam2Config(**fields)
