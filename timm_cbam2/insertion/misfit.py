"""What does not fit when weights are put into a network, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["misfits"]

SHOWN = 10
Shapes = Mapping[str, Sequence[int]]


def misfits(found: Shapes, wanted: Shapes) -> str:
    """The keys and shapes of a file that are not those wanted: the first ten of each kind, and how many; or ""."""
    parts = []
    for what, keys in (
        ("missing", sorted(wanted.keys() - found.keys())),
        ("unexpected", sorted(found.keys() - wanted.keys())),
        (
            "of another shape",
            [
                f"{key} {tuple(found[key])}, not {tuple(wanted[key])}"
                for key in sorted(found.keys() & wanted.keys())
                if tuple(found[key]) != tuple(wanted[key])
            ],
        ),
    ):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            parts.append(f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{more}")
    return "; ".join(parts)
