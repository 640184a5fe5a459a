"""What the passes over full-size tensors are made of."""

import pytest
import torch

from timm_cbam2.models.pieces_cbam2 import Wide, chunks_of, largest


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (2, 24, 5, 6), (4, 7, 3, 3), (2, 64, 7, 7), (1, 1, 4, 1)], ids=str)
def test_the_largest_over_positions(shape, memory_format):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=memory_format)
    assert torch.equal(largest(x), x.amax((2, 3)))
    assert torch.equal(largest(x.bfloat16()), x.bfloat16().amax((2, 3)))
    x[0, 0, -1, -1] = float("nan")
    x[-1, -1] = -float("inf")
    assert torch.equal(largest(x).isnan(), x.amax((2, 3)).isnan())
    assert largest(x)[-1, -1].isinf() or shape[:2] == (1, 1)


def test_half_precision_is_summed_in_copies_and_nothing_else():
    x = torch.randn(5, 4, 6, 6)
    wide, parts = Wide(x.bfloat16()[:2]), [x.bfloat16()[:2], x.bfloat16()[4:]]
    for part in parts:  # the last one smaller
        assert wide(part).dtype == torch.float32 and torch.equal(wide(part), part.float())
    assert wide(parts[0], "x").data_ptr() != wide(parts[0], "g").data_ptr()
    assert Wide(x)(x) is x and Wide(x.double())(x) is x
    # Pieces are measured in what is computed in, so that their copies are no larger than those of other types.
    many = torch.empty(8, 64, 128, 128)
    assert len(chunks_of(many)) == len(chunks_of(many.bfloat16())) == 8
