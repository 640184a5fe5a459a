"""Inputs of every shape that a pass has a case for."""

import torch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [
    (1, 1, 1, 1),
    (2, 6, 1, 1),
    (3, 1, 4, 5),
    (2, 5, 1, 9),
    (4, 6, 7, 5),
    (1, 17, 3, 2),
    (2, 40, 9, 8),
    (5, 3, 2, 33),
]


def images(shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
