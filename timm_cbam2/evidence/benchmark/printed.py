"""What `benchmark` prints: tables that are Markdown and also read well in a terminal."""

from __future__ import annotations

from typing import Any, Sequence

from .floor import floor_table

__all__ = ["KINDS", "machine_line", "print_floor", "print_table", "scaling", "table"]

KINDS = {"inference": "inference", "training": "training step"}


def table(case: dict[str, Any], kinds: Sequence[str]) -> list[list[str]]:
    head = ["", "parameters", "MACs/image"]
    for kind in kinds:
        head += [f"{KINDS[kind]}, ms", "over plain", "peak MB"]
    lines = []
    for variant in case["variants"]:
        line = [variant["label"], f"{variant['parameters'] / 1e6:.2f} M", f"{variant['macs_per_image'] / 1e6:,.1f} M"]
        for kind in kinds:
            line += _cells(variant.get(kind))
        lines.append(line)
    return [head, *lines]


def _cells(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["-", "-", "-"]
    low, high = found["seconds_quartiles"]
    peak = f"{found['peak_mb']:.0f}" if "peak_mb" in found else "-"
    first, third = found["ratio_quartiles"]
    times = f"{1e3 * found['seconds']:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})"
    return [times, f"{found['ratio']:.3f} ({first:.3f} to {third:.3f})", peak]


def scaling(cases: Sequence[dict[str, Any]], kind: str) -> list[list[str]]:
    """Milliseconds per image and megapixel at each size: equal ones mean a cost linear in the pixels."""
    lines = [["ms per image and megapixel", *(f"{case['input'][-1]} px" for case in cases)]]
    for number, variant in enumerate(cases[0]["variants"]):
        found = [(case["input"], case["variants"][number].get(kind)) for case in cases]
        if all(row for _, row in found):
            values = [1e3 * row["seconds"] / (size[0] * size[-1] ** 2 / 1e6) for size, row in found]
            lines.append([variant["label"], *(f"{value:.0f}" for value in values)])
    return lines


def print_table(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines)]
    for number, line in enumerate(lines):
        cells = [cell.ljust(w) if not place else cell.rjust(w) for place, (cell, w) in enumerate(zip(line, widths))]
        print(f"| {' | '.join(cells)} |")
        if not number:
            print(f"|{'|'.join('-' * (w + 1) + ('-' if not place else ':') for place, w in enumerate(widths))}|")
    print(flush=True)


def machine_line(found: dict[str, Any]) -> str:
    gpu = f"{found['gpu']} (CUDA {found['cuda']}, cuDNN {found['cudnn']}), " if "gpu" in found else ""
    load = f", load {found['load_before']}" if "load_before" in found else ""
    return (
        f"{gpu}{found['processor']}, {found['cores']} cores, {found['instructions']}, "
        f"{found['threads']} thread{'s' * (found['threads'] > 1)}{load}; "
        f"torch {found['torch']}, timm {found['timm']}, Python {found['python']}"
    )


def print_floor(found: dict[str, Any], kinds: Sequence[str]) -> None:
    speed = found["bandwidth"]
    print(f"Bandwidth {speed['copy'] / 1e9:.1f} GB/s copying, {speed['fresh'] / 1e9:.1f} GB/s into fresh memory.")
    print("least: input and result once each. passes: what each step reads and writes where no cache keeps a sample.\n")
    for kind in kinds:
        print(f"{KINDS[kind]}\n")
        print_table(floor_table(found, kind))
