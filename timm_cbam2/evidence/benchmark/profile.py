"""Where a step's time goes, by kind of operation: what a variant spends more than the plain network, and on what.

torch's profiler tells the time of each operation without what it calls. It takes time itself, a little for each
operation, so that many small ones look dearer than they are: times to compare are those of `time_in_turn`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import contextmanager
from statistics import median
from typing import Any, Callable, Iterator, Mapping, Sequence

from torch.profiler import ProfilerActivity, profile

__all__ = ["KERNEL", "OTHER", "SPENT_ON", "profile_table", "spent_in_turn"]

PROFILED = 5  # steps of each variant
# Kinds of operations, by torch's names without the underscores at their ends.
SPENT_ON = {
    "the kernel's passes": (),  # whatever is not torch's own; what they call in turn is counted where it belongs
    "convolutions": ("mkldnn_convolution", "cudnn_convolution", "convolution", "convolution_backward", "_convolution"),
    "norms": (
        *("native_batch_norm", "native_batch_norm_backward", "native_layer_norm", "native_layer_norm_backward"),
        *("cudnn_batch_norm", "cudnn_batch_norm_backward", "batch_norm", "_batch_norm_impl_index"),
    ),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "dot", "mv"),
    "reductions": (
        *("sum", "mean", "amax", "std", "var", "softmax", "_softmax", "_softmax_backward_data"),
        *("max_pool2d_with_indices", "max_pool2d_with_indices_backward", "log_softmax", "_log_softmax"),
    ),
    "element by element": (
        *("mul", "add", "sub", "div", "eq", "neg", "exp", "pow", "where", "addcmul", "threshold", "threshold_backward"),
        *("clamp_min", "clamp", "relu", "gelu", "gelu_backward", "silu", "sigmoid", "sigmoid_backward", "hardsigmoid"),
        *("hardsigmoid_backward", "softplus", "softplus_backward", "rsqrt"),
    ),
    "copies": ("copy", "fill", "zero", "cat", "clone", "index_select"),
}
KERNEL, *_ = SPENT_ON
OTHER = "Python, autograd, allocations, views, all else"


def _kind_of(name: str) -> str:
    space, _, own = name.partition("::")
    if space == "timm_cbam2_cpu":
        return KERNEL
    own = own.rstrip("_") if space == "aten" else ""
    return next((kind for kind, names in SPENT_ON.items() if own in names), OTHER)


@contextmanager
def _unheard() -> Iterator[None]:
    """Meanwhile nothing reaches standard error: torch's profiler tells there of each start and end, past Python."""
    with open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def spent_in_turn(steps: Mapping[str, Callable[[], Any]], device: str) -> dict[str, dict[str, float]]:
    """Seconds of a step by kind of operation, by name of the step: medians of a few steps, taken in turn.

    Args:
        steps: what to profile, by name; each has run before.
        device: "cuda" tells the device's time of each operation.
    """
    on_device = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in steps}
    for _ in range(PROFILED):
        for name, step in steps.items():
            with _unheard(), profile(activities=activities) as run:
                step()
            spent = dict.fromkeys((*SPENT_ON, OTHER), 0.0)
            for event in run.key_averages():
                own = event.self_device_time_total if on_device else event.self_cpu_time_total
                spent[_kind_of(event.key)] += own / 1e6
            for kind, seconds in spent.items():
                found[name][kind].append(seconds)
    return {name: {kind: median(times) for kind, times in kinds.items()} for name, kinds in found.items()}


def profile_table(case: Mapping[str, Any], kind: str) -> list[list[str]]:
    """Milliseconds by kind of operation: of the plain network, and what each other variant spends more."""
    variants = [variant for variant in case["variants"] if "spent" in variant.get(kind, {}) and not variant["compiled"]]
    plain, *others = variants
    lines = [["ms", plain["label"], *(f"{variant['label']}: more" for variant in others)]]
    for name, seconds in plain[kind]["spent"].items():
        more: Sequence[float] = [variant[kind]["spent"][name] - seconds for variant in others]
        lines.append([name, f"{1e3 * seconds:.1f}", *(f"{1e3 * value:+.1f}" for value in more)])
    totals = [sum(variant[kind]["spent"].values()) for variant in variants]
    more = [total - totals[0] for total in totals[1:]]
    lines.append(["in all", f"{1e3 * totals[0]:.1f}", *(f"{1e3 * value:+.1f}" for value in more)])
    return lines
