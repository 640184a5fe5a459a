"""A block beside its plain path: the same output and the same gradients."""

import torch


def gradients(forward, block, x):
    """What `forward` gives of x, and the gradients of x and of the block's parameters."""
    x = x.detach().requires_grad_()
    out = forward(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out, *torch.autograd.grad((out * weight).sum(), [x, *block.parameters()])]


def same_as_plain(block, x, **tolerance):
    got = gradients(block, block, x)
    expected = gradients(lambda x: block(x, return_attention=True)[0], block, x)
    return all(
        torch.allclose(a, b, **(tolerance or dict(rtol=1e-9, atol=1e-11))) for a, b in zip(got, expected, strict=True)
    )
