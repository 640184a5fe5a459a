"""CBAM2 written literally, formula by formula, from a state dict and the options alone."""

import torch
import torch.nn.functional as F


def _mlp(state, prefix, s):
    s = F.conv2d(s[:, :, None, None], state[f"{prefix}fc1.weight"], state.get(f"{prefix}fc1.bias"))
    return F.conv2d(s.relu(), state[f"{prefix}fc2.weight"], state.get(f"{prefix}fc2.bias")).flatten(1)


def _temperature(state, prefix):
    if f"{prefix}temperature.raw" in state:
        return F.softplus(state[f"{prefix}temperature.raw"]) + 1e-6
    return state[f"{prefix}temperature.value"]


def _gate(z, gate):
    return {"sigmoid": z.sigmoid(), "hard_sigmoid": F.hardsigmoid(z), "unit_sigmoid": 2 * z.sigmoid()}[gate]


def reference(state, options, x):
    """(out, (channel mask, fusion weights, spatial mask, router weights)) of x (B, C, H, W)."""
    s_avg, s_max = x.mean((2, 3)), x.amax((2, 3))
    a, m = _mlp(state, "channel.", s_avg), _mlp(state, "channel.", s_max)
    fusion_weights = None
    if options["fusion"] == "router":
        w = fusion_weights = _mlp(state, "channel.router.", torch.cat([s_avg, s_max], 1)).softmax(1)
        z = w[:, :1] * a + w[:, 1:] * m
    elif options["fusion"] == "static":
        w = state["channel.fusion_logits"].softmax(0)
        z = w[0] * a + w[1] * m
    else:
        z = a + m
    if options.get("center"):
        z = z - z.mean(1, keepdim=True)
    channel_mask = _gate(z / _temperature(state, "channel."), options["gate"])[:, :, None, None]
    y = x * channel_mask

    batch, _, height, width = y.shape
    maps = [y.mean(1), y.amax(1)]
    if options["coords"]:
        across = (2 * torch.arange(width) - (width - 1)).to(x) / max(width - 1, 1)
        down = (2 * torch.arange(height) - (height - 1)).to(x) / max(height - 1, 1)
        maps += [across.expand(batch, height, width), down[:, None].expand(batch, height, width)]
    s = torch.stack(maps, 1)
    pooled = s.mean((2, 3))
    if options["router_pool"] == "moments":
        pooled = torch.stack([s[:, 0], s[:, 1], s[:, 0] * s[:, 2], s[:, 0] * s[:, 3]], 1).mean((2, 3))
    router_weights = _mlp(state, "spatial.router.", pooled).softmax(1)
    shapes = [(k if k % 2 else k + 1, 1) for k in options["kernel_sizes"]]
    shapes += [tuple(options["dilated"])] if options["dilated"] else []
    z = 0
    for i, (k, dilation) in enumerate(shapes):
        dw = state[f"spatial.branches.{i}.dw.weight"]
        branch = F.conv2d(s, dw, padding=dilation * (k // 2), dilation=dilation, groups=len(maps))
        branch = F.conv2d(branch, state[f"spatial.branches.{i}.pw.weight"])
        z = z + router_weights[:, i, None, None, None] * branch
    if options.get("center"):
        z = z - z.mean((2, 3), keepdim=True)
    spatial_mask = _gate(z / _temperature(state, "spatial."), options["gate"])
    return y * spatial_mask, (channel_mask, fusion_weights, spatial_mask, router_weights)
