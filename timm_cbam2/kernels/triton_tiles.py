"""What the readings of a CBAM2 block on a GPU share, in Triton: which tile a program has, and what it finds there.

A tensor (B, C, H, W) is one of C·P numbers for each sample, P = H·W, with strides of its own for channels and
positions, so that both memory formats are served by the same code. Each program takes a tile of BC channels and BP
positions of one sample, or all tiles in a row of them. Nothing is added by atomics: the same numbers come every time.
Values are rounded to the tensor's dtype where torch would round them, sums are taken in that of the small tensors.
"""

import triton
import triton.language as tl

__all__ = ["normalised", "of_channels", "of_places", "place", "product", "store_largest", "tile_of"]


@triton.jit
def place(width, BLOCK: tl.constexpr):
    """The sample, and the numbers of the tile's channels or positions, one of them to a program."""
    tiles = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    return program // tiles, (program % tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def tile_of(C, P, BC: tl.constexpr, BP: tl.constexpr):
    """The sample, channels and positions of a program that has one tile."""
    positions = tl.cdiv(P, BP)
    program = tl.program_id(0)
    rest = program // positions
    channels = tl.cdiv(C, BC)
    return rest // channels, (rest % channels) * BC + tl.arange(0, BC), (program % positions) * BP + tl.arange(0, BP)


@triton.jit
def of_channels(values, b, c, C):
    """Those of a sample's channels, to multiply a tile by."""
    return tl.load(values + b.to(tl.int64) * C + c, mask=c < C, other=0)[:, None]


@triton.jit
def of_places(values, b, p, P, COUNT: tl.constexpr):
    """Those of a sample's positions, of the first of COUNT maps that follow each other."""
    return tl.load(values + b.to(tl.int64) * COUNT * P + p, mask=p < P, other=0)[None, :]


@triton.jit
def normalised(x, scale, shift, c, C, ACC: tl.constexpr, AFFINE: tl.constexpr):
    """x after BatchNorm, in its own dtype."""
    if AFFINE:
        factor = tl.load(scale + c, mask=c < C, other=0)[:, None]
        x = tl.fma(x.to(ACC), factor, tl.load(shift + c, mask=c < C, other=0)[:, None]).to(x.dtype)
    return x


@triton.jit
def product(x, mask, ACC: tl.constexpr):
    """x·mask, rounded to x's dtype as torch does."""
    return (x.to(ACC) * mask.to(x.dtype).to(ACC)).to(x.dtype).to(ACC)


@triton.jit
def store_largest(where, largest, bad, inside, AXIS: tl.constexpr):
    """The maximum along an axis; it is no number where one of them is none."""
    found = tl.max(largest, AXIS)
    tl.store(where, tl.where(tl.max(bad, AXIS) > 0, float("nan"), found), mask=inside)
