"""Blocks put into other libraries' networks end the residual branch there too, where the host has one place for it."""

import copy

import pytest
import torch
from networks import answers, images, make
from randomise import randomise

from timm_cbam2 import Cbam2, insert
from timm_cbam2.models import residual_cbam2


def blocks(model):
    return [module for module in model.modules() if isinstance(module, Cbam2)]


@pytest.mark.parametrize("name", ["torchvision resnet18", "transformers convnext", "transformers convnextv2"])
@pytest.mark.parametrize("training", [False, True])
def test_the_block_ends_the_branch_in_one_pass(name, training, monkeypatch):
    """In these hosts as in timm's: with the shortcut, and the values of separate steps, which a hook asks for."""
    model = randomise(insert(make(name))).double().train(training)
    ended = []
    fused = residual_cbam2.fused
    monkeypatch.setattr(residual_cbam2, "fused", lambda *args: ended.append(args) or fused(*args))
    found = []
    for watched in (False, True):
        steps = copy.deepcopy(model)
        for block in steps.modules():
            if watched and isinstance(block, Cbam2):
                block.register_forward_hook(lambda *args: None)
        x = torch.cat([images(), images().flip(0, 2), images().flip(3)]).double().requires_grad_()
        (logits,) = answers(steps, x)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), [x, *steps.parameters()]), *steps.buffers()])
        # transformers' own stochastic depth, which is not timm's, is called
        dropping = sum(type(module).__name__ == "ConvNextDropPath" for module in model.modules()) if training else 0
        one_pass = 0 if watched else len(blocks(model)) - dropping
        assert len([args for args in ended if args[3].shortcut is not None]) == one_pass
        ended.clear()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # norms over few values magnify
