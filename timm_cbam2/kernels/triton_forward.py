"""The three readings of full-size tensors in the forward pass of a CBAM2 block, in Triton."""

import triton
import triton.language as tl

from .triton_tiles import normalised, of_channels, of_places, place, product, store_largest, tile_of

__all__ = ["finish", "maps", "squeeze"]


@triton.jit
def squeeze(x, scale, shift, out, C, P, sb, sc, sp, AFFINE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """The average and the maximum over positions: out (B, 2, C)."""
    ACC: tl.constexpr = out.dtype.element_ty
    b, c = place(C, BC)
    total = tl.zeros((BC, BP), ACC)
    largest = tl.full((BC, BP), float("-inf"), ACC)
    bad = tl.zeros((BC, BP), tl.int32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        inside = (c < C)[:, None] & (p < P)[None, :]
        t = tl.load(x + b.to(tl.int64) * sb + c[:, None] * sc + p[None, :] * sp, mask=inside, other=0)
        t = normalised(t, scale, shift, c, C, ACC, AFFINE).to(ACC)
        total += tl.where(inside, t, 0)
        largest = tl.maximum(largest, tl.where(inside, t, float("-inf")))
        bad = bad | (inside & (t != t)).to(tl.int32)
    where = out + b.to(tl.int64) * 2 * C + c
    tl.store(where, tl.sum(total, 1) / P, mask=c < C)
    store_largest(where + C, largest, bad, c < C, 1)


@triton.jit
def maps(x, scale, shift, ca, out, C, P, sb, sc, sp, AFFINE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr):
    """The average and the maximum over channels of x·ca: out (B, 2, H, W)."""
    ACC: tl.constexpr = out.dtype.element_ty
    b, p = place(P, BP)
    total = tl.zeros((BC, BP), ACC)
    largest = tl.full((BC, BP), float("-inf"), ACC)
    bad = tl.zeros((BC, BP), tl.int32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (p < P)[None, :]
        t = tl.load(x + b.to(tl.int64) * sb + c[:, None] * sc + p[None, :] * sp, mask=inside, other=0)
        t = normalised(t, scale, shift, c, C, ACC, AFFINE)
        y = product(t, of_channels(ca, b, c, C), ACC)
        total += tl.where(inside, y, 0)
        largest = tl.maximum(largest, tl.where(inside, y, float("-inf")))
        bad = bad | (inside & (y != y)).to(tl.int32)
    where = out + b.to(tl.int64) * 2 * P + p
    tl.store(where, tl.sum(total, 0) / C, mask=p < P)
    store_largest(where + P, largest, bad, p < P, 0)


@triton.jit
def finish(
    x,
    scale,
    shift,
    ca,
    sa,
    shortcut,
    gamma,
    out,
    C,
    P,
    sb,
    sc,
    sp,
    AFFINE: tl.constexpr,
    SHORTCUT: tl.constexpr,
    GAMMA: tl.constexpr,
    RELU: tl.constexpr,
    DROPPED: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """out = act(shortcut + gamma·x·ca·sa)."""
    ACC: tl.constexpr = ca.dtype.element_ty
    b, c, p = tile_of(C, P, BC, BP)
    inside = (c < C)[:, None] & (p < P)[None, :]
    places = b.to(tl.int64) * sb + c[:, None] * sc + p[None, :] * sp
    t = normalised(tl.load(x + places, mask=inside, other=0), scale, shift, c, C, ACC, AFFINE)
    y = product(t, of_channels(ca, b, c, C), ACC)
    if GAMMA:
        y = (y * tl.load(gamma + c, mask=c < C, other=0)[:, None].to(ACC)).to(t.dtype).to(ACC)
    y = y * of_places(sa, b, p, P, 1).to(t.dtype).to(ACC)
    if DROPPED:
        y = y.to(t.dtype).to(ACC)
    if SHORTCUT:
        y += tl.load(shortcut + places, mask=inside, other=0).to(ACC)
    if RELU:
        y = tl.where(y < 0, 0, y)  # what is no number stays so
    tl.store(out + places, y.to(t.dtype), mask=inside)
