"""Masks folded into weights, and networks outside timm saved and put together again."""

import copy
import json
import re

import pytest
import timm
import torch
import torchvision
from networks import MAKERS, Own, answers, equal, images, make
from randomise import randomise
from torch import nn

import timm_cbam2
from timm_cbam2 import Cbam2, insert, load_inserted, remove, save
from timm_cbam2.hub.zoo import load


def constant_masks(model):
    """Attention that is the same for every image and position: folding must then lose nothing."""
    with torch.no_grad():
        for block in (m for m in model.modules() if isinstance(m, Cbam2)):
            randomise(block)
            block.channel.fc1.weight.zero_()
            block.channel.fc2.bias.normal_()
            for branch in block.spatial.branches:
                branch.pw.weight.zero_()


@pytest.mark.parametrize("name", MAKERS)
def test_folding_masks_that_do_not_vary_changes_nothing(name):
    model = insert(make(name), mlp_bias=True).eval()
    constant_masks(model)
    plain, said, x = remove(copy.deepcopy(model)), [], images(name)
    before = answers(model, x)
    remove(model.train(), fold=True, data=[x], say=said.append)
    count = sum(isinstance(module, Cbam2) for module in insert(make(name)).modules())
    assert model.training and said[0].startswith(f"{count} blocks folded into the layers before them")
    assert re.search(r"the outputs change by 0\.00 %", said[0]), said
    for old, new in zip(before, answers(model.eval(), x)):
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(answers(plain, x)[-1], before[-1], rtol=1e-3, atol=1e-4), "without the fold it is another"


def test_folding_says_what_it_costs():
    model = randomise(insert(make("timm resnet18"))).eval()
    x = torch.randn(40, 3, 32, 32)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[:10] = (labels[:10] + 1) % 4
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 16, shuffle=True)
    said, folded = [], copy.deepcopy(model)
    remove(folded, fold=True, data=data, say=said.append)
    with torch.no_grad():
        right = 100 * (folded(x).argmax(1) == labels).float().mean().item()
    assert f"over 40 images: accuracy on 40 images 75.00 % before, {right:.2f} % after ({right - 75:+.2f})" in said[0]
    assert "where a spatial mask is high or low cannot be folded and is lost" in said[0]
    once = (batch for batch in [x[:8], x[8:16]])
    remove(model, fold=True, data=once, say=said.append)
    assert "over 16 images: the outputs change by" in said[1] and "0.00 %" not in said[1]


def test_remove_names_mistakes_and_changes_nothing():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = Cbam2(3)

        def forward(self, x):
            return self.own(x)

    into_custom = insert(nn.Sequential(Own().body[:1], nn.GELU()), "1", channels=8)
    wrapped = timm_cbam2.Cbam2ForImageClassification.from_timm(timm.create_model("test_resnet_cbam2"))
    for model, options, message in (
        (Own(), {}, "has no CBAM2 block to take out"),
        (Holds(), {}, "own is called by the network's own code"),
        (wrapped, {}, "take it out of its .timm_model"),
        (insert(Own(), "stem"), dict(fold=True), "fold=True needs data"),
        (insert(Own(), "stem"), dict(fold=True, data=[]), "data holds no batch"),
        (into_custom, dict(fold=True, data=[images()]), "1.cbam2 does not come right after a norm or convolution"),
    ):
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=re.escape(message)):
            remove(model, **options)
        assert list(model.state_dict()) == keys


OUTSIDE = {
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=4), {}),
    "transformers": (MAKERS["transformers convnext"], {}),
    "own": (Own, dict(where=["stem", "body", "layer.*"])),
    "part of timm": (lambda: timm.create_model("resnet18", num_classes=4), dict(where="layer4.1")),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_network_outside_timm_is_put_together_again(name, tmp_path):
    make_one, options = OUTSIDE[name]
    model = randomise(insert(make_one(), router_pool="moments", kernel_sizes=(3,), **options)).eval()
    save(model, tmp_path / "saved", label_names=list("abcd"))
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["cbam2.json", "model.safetensors"]
    said = json.loads((tmp_path / "saved" / "cbam2.json").read_text())
    assert len(said["blocks"]) == sum(isinstance(module, Cbam2) for module in model.modules())
    assert said["label_names"] == list("abcd") and said["blocks"][0]["options"]["router_pool"] == "moments"
    other = load_inserted(make_one().eval(), tmp_path / "saved")
    assert equal(answers(other, images()), answers(model, images()))
    randomise(other, seed=1)
    assert not equal(answers(other, images()), answers(model, images()))
    load_inserted(other, tmp_path / "saved")  # the blocks are there: only the weights
    assert equal(answers(other, images()), answers(model, images()))
    assert equal(answers(remove(other), images()), answers(remove(model), images()))


def test_tied_weights_are_saved_once_and_loaded(tmp_path):
    class Tied(Own):
        def __init__(self):
            super().__init__()
            self.layer[1].weight = self.layer[0].weight

    model = randomise(insert(Tied(), "stem")).eval()
    save(model, tmp_path / "tied")
    assert torch.equal(load_inserted(Tied().eval(), tmp_path / "tied")(images()), model(images()))


def test_what_does_not_fit_is_named_and_the_network_left_alone(tmp_path):
    folder = tmp_path / "saved"
    save(insert(torchvision.models.resnet18(num_classes=4)), folder)
    held = insert(torchvision.models.resnet18(num_classes=4), "layer1.0")
    for model, message in (
        (torchvision.models.resnet18(num_classes=5), "2 of another shape: fc.bias (4,), not (5,), fc.weight"),
        (torchvision.models.resnet34(num_classes=4), "96 missing: layer1.2.bn1.bias, "),
        (torchvision.models.resnet34(num_classes=4), "layer1.2.bn2.weight and 86 more"),
        (Own(), "has a block in layer1.0, and Own has no such module"),
        (timm.create_model("resnet18", num_classes=4), "as torchvision.resnet, which here is a BasicBlock"),
        (held, "layer1.0.cbam2 is there already, and other blocks than"),
        (torchvision.models.resnet50(num_classes=4), "for 64 channels in layer1.0, which has 256"),
    ):
        keys = list(model.state_dict())
        with pytest.raises(ValueError, match=re.escape(message)):
            load_inserted(model, folder)
        assert list(model.state_dict()) == keys
    fresh = torchvision.models.resnet18(num_classes=4)
    text = (folder / "cbam2.json").read_text()
    for content, message in (
        (text.replace('"format": 1', '"format": 2'), "has format 2"),
        (text.replace('"channels": 64', '"channels": "64"'), "does not say what was inserted where"),
        (text.replace('"unit_sigmoid"', '"open"'), "gate='open' is not allowed"),
        (text[:100], "is not JSON"),
    ):
        (folder / "cbam2.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_inserted(fresh, folder)
    (folder / "cbam2.json").write_text(text)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_inserted(fresh, folder)
    with pytest.raises(ValueError, match="has no cbam2.json"):
        load_inserted(fresh, tmp_path)
    with pytest.raises(ValueError, match="only those can be saved"):
        save(torchvision.models.resnet18(), tmp_path / "plain")


def test_the_command(run, refused, small_run, tmp_path):
    trained, x = (
        timm.create_model(f"local-dir:{small_run[0] / 'best'}", pretrained=True).eval(),
        torch.randn(4, 3, 8, 8),
    )
    plain, folded = tmp_path / "plain", tmp_path / "folded"
    result = run("remove", small_run[0], "-o", plain)
    assert result.code == 0 and result.err == "" and "resnet20: " in result.out, result
    result = run("remove", small_run[0], "--fold", "-o", folded)
    assert result.code == 0 and "9 blocks folded" in result.out and "accuracy on " in result.out, result
    other = run("remove", small_run[0] / "best", "--fold", "--data", small_run[1], "-o", tmp_path / "other")
    assert other.code == 0 and "36 images: accuracy on 36 images" in other.out, other  # no split of its own
    models = [load(str(place)).eval() for place in (plain, folded)]
    with torch.no_grad():
        assert not torch.equal(*(model(x) for model in models))
        assert torch.equal(models[0](x), remove(trained)(x))
    assert models[0].pretrained_cfg["label_names"] == ["digit0", "digit1", "digit2"]

    new = tmp_path / "new"
    save(insert(make("torchvision resnet18")), tmp_path / "outside")
    for args, words in (
        ((plain, "-o", new), ("has no CBAM2 block",)),
        ((small_run[0], "-o", plain), (f"--output {plain} already holds a model",)),
        ((small_run[0], "--data", "digits", "-o", new), ("--data digits", "add --fold")),
        (("resnet20_cbam2", "--fold", "-o", new), ("is not a run", "--data FOLDER")),
        ((tmp_path / "outside", "-o", new), ("network outside timm", "load_inserted", "remove(network)")),
        ((tmp_path / "nowhere", "-o", new), ("no such run or model folder",)),
    ):
        refused("remove", *args, words=words)
    assert not new.exists()
