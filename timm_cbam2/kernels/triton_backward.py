"""The three readings of full-size tensors in the backward pass of a CBAM2 block, in Triton."""

import triton
import triton.language as tl

from .triton_tiles import normalised, of_channels, of_places, place, product, tile_of

__all__ = ["input_gradient", "products", "spread"]


@triton.jit
def products(
    g,
    out,
    x,
    scale,
    shift,
    ca,
    maps,
    gamma,
    masked,
    g_sa,
    ties,
    C,
    P,
    sb,
    sc,
    sp,
    AFFINE: tl.constexpr,
    GAMMA: tl.constexpr,
    RELU: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """g where the activation is not flat (`masked`, with RELU only), the gradient of sa (B, H, W), and how many
    channels hold the maximum, likewise."""
    ACC: tl.constexpr = ca.dtype.element_ty
    b, p = place(P, BP)
    largest = of_places(maps + P, b, p, P, 2)
    total = tl.zeros((BC, BP), ACC)
    count = tl.zeros((BC, BP), tl.int32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        inside = (c < C)[:, None] & (p < P)[None, :]
        places = b.to(tl.int64) * sb + c[:, None] * sc + p[None, :] * sp
        t = normalised(tl.load(x + places, mask=inside, other=0), scale, shift, c, C, ACC, AFFINE)
        y = product(t, of_channels(ca, b, c, C), ACC)
        d = tl.load(g + places, mask=inside, other=0)
        if RELU:
            d = tl.where(tl.load(out + places, mask=inside, other=0) <= 0, 0, d).to(d.dtype)
            tl.store(masked + places, d, mask=inside)
        d = d.to(ACC)
        if GAMMA:
            d = d * tl.load(gamma + c, mask=c < C, other=0)[:, None].to(ACC)
        total += tl.where(inside, d * y, 0)
        count += (inside & (y == largest)).to(tl.int32)
    where = b.to(tl.int64) * P + p
    tl.store(g_sa + where, tl.sum(total, 0), mask=p < P)
    tl.store(ties + where, tl.sum(count, 0).to(ACC), mask=p < P)


@triton.jit
def _gradient_of_y(d, y, spots, gamma, b, c, p, C, P, dtype: tl.constexpr, GAMMA: tl.constexpr):
    """gamma·d·sa, what comes by way of the two maps, and d·sa alone; spots (B, 5, H, W) are sa, the largest over
    channels, how many hold it, and the gradients of the two maps."""
    ACC: tl.constexpr = spots.dtype.element_ty
    plain = d.to(ACC) * of_places(spots, b, p, P, 5).to(dtype).to(ACC)
    g_y = plain
    if GAMMA:
        g_y = g_y * tl.load(gamma + c, mask=c < C, other=0)[:, None].to(ACC)
    share = of_places(spots + 4 * P, b, p, P, 5) / tl.maximum(of_places(spots + 2 * P, b, p, P, 5), 1)
    g_y += of_places(spots + 3 * P, b, p, P, 5) / C + tl.where(y == of_places(spots + P, b, p, P, 5), share, 0)
    return g_y, plain


@triton.jit
def spread(
    g,
    x,
    scale,
    shift,
    mean,
    ca,
    squeezes,
    spots,
    gamma,
    sums,
    C,
    P,
    sb,
    sc,
    sp,
    AFFINE: tl.constexpr,
    GAMMA: tl.constexpr,
    COUNT: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """Sums over positions (B, COUNT, C): of g_y·x, the gradient of ca; of g·x·sa, that of gamma; how many positions
    hold the maximum. With AFFINE also of g_y, g_y·z̃, z̃ and z̃ at the maximum, z̃ being x before BatchNorm less its mean.
    """
    ACC: tl.constexpr = ca.dtype.element_ty
    b, c = place(C, BC)
    mask = of_channels(ca, b, c, C)
    by_mask = tl.zeros((BC, BP), ACC)
    by_gamma = tl.zeros((BC, BP), ACC)
    ties = tl.zeros((BC, BP), ACC)
    alone = tl.zeros((BC, BP), ACC)
    along = tl.zeros((BC, BP), ACC)
    away = tl.zeros((BC, BP), ACC)
    away_at = tl.zeros((BC, BP), ACC)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        inside = (c < C)[:, None] & (p < P)[None, :]
        places = b.to(tl.int64) * sb + c[:, None] * sc + p[None, :] * sp
        z = tl.load(x + places, mask=inside, other=0)
        t = normalised(z, scale, shift, c, C, ACC, AFFINE)
        d, y = tl.load(g + places, mask=inside, other=0), product(t, mask, ACC)
        g_y, plain = _gradient_of_y(d, y, spots, gamma, b, c, p, C, P, t.dtype, GAMMA)
        t = t.to(ACC)
        at = inside & (t == of_channels(squeezes + C, 2 * b, c, C))
        by_mask += tl.where(inside, g_y * t, 0)
        by_gamma += tl.where(inside, plain * t, 0)
        ties += at.to(ACC)
        if AFFINE:
            centred = z.to(ACC) - tl.load(mean + c, mask=c < C, other=0)[:, None]
            alone += tl.where(inside, g_y, 0)
            along += tl.where(inside, g_y * centred, 0)
            away += tl.where(inside, centred, 0)
            away_at += tl.where(at, centred, 0)
    where = sums + b.to(tl.int64) * COUNT * C + c
    tl.store(where, tl.sum(by_mask, 1), mask=c < C)
    tl.store(where + C, tl.sum(by_gamma, 1), mask=c < C)
    tl.store(where + 2 * C, tl.sum(ties, 1), mask=c < C)
    if AFFINE:
        tl.store(where + 3 * C, tl.sum(alone, 1), mask=c < C)
        tl.store(where + 4 * C, tl.sum(along, 1), mask=c < C)
        tl.store(where + 5 * C, tl.sum(away, 1), mask=c < C)
        tl.store(where + 6 * C, tl.sum(away_at, 1), mask=c < C)


@triton.jit
def input_gradient(
    g,
    x,
    scale,
    shift,
    mean,
    channels,
    spots,
    gamma,
    of_norm,
    g_x,
    C,
    P,
    sb,
    sc,
    sp,
    AFFINE: tl.constexpr,
    GAMMA: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """g_x, for channels (B, 5, C): ca, the largest over positions, how many hold it, and the gradients of the two
    squeezes. With AFFINE that of BatchNorm's input, `of_norm` (2, C) being what its statistics take off."""
    ACC: tl.constexpr = channels.dtype.element_ty
    b, c, p = tile_of(C, P, BC, BP)
    inside = (c < C)[:, None] & (p < P)[None, :]
    places = b.to(tl.int64) * sb + c[:, None] * sc + p[None, :] * sp
    z = tl.load(x + places, mask=inside, other=0)
    t = normalised(z, scale, shift, c, C, ACC, AFFINE)
    mask = of_channels(channels, 5 * b, c, C)
    d, y = tl.load(g + places, mask=inside, other=0), product(t, mask, ACC)
    g_y, _ = _gradient_of_y(d, y, spots, gamma, b, c, p, C, P, t.dtype, GAMMA)
    share = of_channels(channels + 4 * C, 5 * b, c, C) / tl.maximum(of_channels(channels + 2 * C, 5 * b, c, C), 1)
    at = t.to(ACC) == of_channels(channels + C, 5 * b, c, C)
    found = g_y * mask.to(t.dtype).to(ACC) + of_channels(channels + 3 * C, 5 * b, c, C) / P + tl.where(at, share, 0)
    if AFFINE:
        centred = z.to(ACC) - tl.load(mean + c, mask=c < C, other=0)[:, None]
        found -= tl.load(of_norm + c, mask=c < C, other=0)[:, None]
        found -= centred * tl.load(of_norm + C + c, mask=c < C, other=0)[:, None]
        found *= tl.load(scale + c, mask=c < C, other=0)[:, None]
    tl.store(g_x + places, found.to(t.dtype), mask=inside)
