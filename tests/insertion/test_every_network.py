"""Looking into, freezing, and the tutorial: on networks of every library that hold blocks."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import MAKERS, Own, images, make
from PIL import Image
from randomise import randomise

import timm_cbam2
from timm_cbam2 import explain, freeze, insert, record_attention
from timm_cbam2.errors import UserError
from timm_cbam2.models.cbam2 import is_cbam2
from timm_cbam2.seeing.health import measure
from timm_cbam2.training.optimise import keep_frozen

TUTORIAL = Path(timm_cbam2.__file__).parent / "insertion" / "README.md"
SEGMENTATION = lambda: torchvision.models.segmentation.fcn_resnet50(  # noqa: E731
    weights=None, weights_backbone=None, num_classes=3
)
NETWORKS = {
    "torchvision": MAKERS["torchvision resnet18"],
    "transformers": MAKERS["transformers convnext"],
    "segmentation": SEGMENTATION,
    "own": Own,
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def attended(name, **options):
    where = dict(where=["stem", "layer.*"]) if name == "own" else {}
    return randomise(insert(NETWORKS[name](), **where, **options)).eval()


@every_network
def test_explain_and_health(name, tmp_path):
    model = attended(name)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    (picture,) = explain(model, tmp_path / "noise.png", tmp_path / "out", img_size=64)
    assert min(Image.open(picture).size) > 300
    arrays = np.load(picture.with_suffix(".npz"))
    with record_attention(model) as records:
        model(images())
    assert {f"{block}/spatial_mask" for block in records} <= set(arrays.files)
    assert len(arrays["probabilities"]) == {"segmentation": 0, "transformers": 2}.get(name, 4)

    model.train()
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    found = measure(model, images())
    assert list(found["blocks"]) == list(records)
    assert modes == [module.training for module in model.modules()]
    with pytest.raises(UserError, match="has no CBAM2 block to look at: put some in with timm_cbam2.insert"):
        explain(NETWORKS[name](), tmp_path / "noise.png", tmp_path / "out")


@every_network
def test_only_attention_or_only_it_and_the_head_is_trained(name):
    model = attended(name)
    inside = {f"{block}.{key}" for block, m in model.named_modules() if is_cbam2(m) for key, _ in m.named_parameters()}
    count = freeze(model, "attention")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == inside
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    keep_frozen(model.train())
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    freeze(model, "attention+head")
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    head = {"segmentation": "classifier.", "transformers": "classifier."}.get(name, "fc.")
    assert trained - inside == {key for key, _ in model.named_parameters() if key.startswith(head)} != set()


@pytest.mark.parametrize(
    "options",
    [dict(squeeze_norm=True, router_norm=True), dict(learned_maps=2, center=True), dict(router_pool="moments")],
)
def test_every_option_of_a_block_starts_at_the_identity(options):
    for name in ("timm resnet18", "torchvision resnet18"):
        model = make(name).train()
        expected = model(images())
        assert torch.equal(insert(make(name).train(), **options)(images()), expected)
    assert type(insert(make("timm resnet18"), **options)) is timm_cbam2.ResNetCbam2


def test_the_tutorial_is_what_happens(tmp_path, run, write_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, scope = TUTORIAL.read_text(encoding="utf-8"), {}
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "the tutorial", "exec"), scope)
    model = insert(torchvision.models.resnet18(num_classes=3))
    every, trained = sum(p.numel() for p in model.parameters()), freeze(model, "attention")
    assert f"of {every / 1e6:.1f} M parameters, the {trained / 1e6:.2f} M of the attention" in text

    write_folder(tmp_path / "my_images", count=20)
    torch.save(randomise(timm.create_model("resnet18", num_classes=3)).state_dict(), tmp_path / "mine.pth")
    (commands,) = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in commands.splitlines():
        program, *arguments = line.split()
        result = run(*arguments, *(["--img-size", "16"] if arguments[0] == "finetune" else []), cwd=tmp_path)
        assert program == "timm-cbam2" and result.code == 0, result
    assert "the classifier" not in result.out, "three classes before and after"
