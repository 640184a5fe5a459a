"""What attention costs: a network plain, with timm's attention layers and with CBAM2, side by side in one run."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Callable, Iterator, Sequence

import timm
import torch
import typer

from ...errors import UserError, one_line, require
from ...files import write_whole
from ...hub.zoo import suggest
from ...kernels.cpu import disable_cpu_kernel, enable_cpu_kernel
from .floor import floor, floor_table
from .networks import DTYPES, VARIANTS, Setup, build, macs, make_step, variants_of
from .picture import draw
from .timing import WARM_UP, machine, peak_memory, quartiles, time_in_turn

__all__ = ["benchmark"]

KINDS = {"inference": "inference", "training": "training step"}


def _sizes(text: str | None, model: str) -> list[int]:
    if text is None:
        return [timm.get_pretrained_cfg(model).input_size[-1]]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--img-size {text} is not a size: give pixels, or several sizes such as 128,224,384,512")
    return list(dict.fromkeys(map(int, parts)))


def _check_model(name: str) -> None:
    if not (name.endswith("_cbam2") and timm.is_model(name)):
        near = [found for found in suggest(name) if found.endswith("_cbam2")]
        hint = f"did you mean {', '.join(near)}?" if near else "`timm-cbam2 models` lists them"
        raise UserError(f"{name} is no registered architecture with CBAM2; {hint}")


def _check_choice(option: str, given: str, allowed: Sequence[str]) -> None:
    if given not in allowed:
        raise UserError(f"{option} {given} is unknown; give {' or '.join(allowed)}")


def _check_kernel(device: str) -> None:
    if device != "cpu":
        raise UserError(f"--cpu-kernel is for CPUs; leave it out with --device {device}")
    try:
        enable_cpu_kernel()
    except RuntimeError as error:
        raise UserError(f"--cpu-kernel: {error}") from error
    disable_cpu_kernel()


@contextmanager
def _bar(total: int, title: str) -> Iterator[Callable[[], Any]]:
    from tqdm import tqdm

    with tqdm(total=total, desc=title, unit=" rounds", leave=False, disable=None) as bar:
        yield lambda: bar.update()


@contextmanager
def _explained(setup: Setup) -> Iterator[None]:
    """What a network cannot do with this input, or a machine without enough memory, in one line."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        if "more than 1 value per channel" in str(error):
            raise UserError(
                f"--batch-size {setup.batch_size} at --img-size {setup.img_size} leaves BatchNorm a single value to "
                "normalise: give more of either, or --no-train"
            ) from error
        side = f"{setup.batch_size} x {setup.img_size} x {setup.img_size}"
        raise UserError(f"{setup.model} cannot be run on {side} pixels: {one_line(error, 300)}") from error


def _measure(setup: Setup, kinds: Sequence[str], rounds: int, extra: dict[str, bool], memory: bool) -> dict[str, Any]:
    """One case of `benchmark.json`: every variant of one model at one size."""
    if extra["compiled"]:
        torch.compiler.reset()  # each size is compiled as if it were the only one
    variants = variants_of(setup.model, **extra)
    networks = {variant.key: build(setup, variant) for variant in variants}
    found = {
        variant.key: {
            "key": variant.key,
            "label": variant.label,
            "compiled": variant.compiled,
            "parameters": sum(p.numel() for p in networks[variant.key].parameters()),
            "macs_per_image": macs(networks[variant.key], setup.img_size),
        }
        for variant in variants
    }
    for kind in kinds:
        training = kind == "training"
        chosen = [variant for variant in variants if not (training and variant.reparameterized)]
        steps = {variant.key: make_step(setup, variant, networks[variant.key], training) for variant in chosen}
        for variant in chosen:
            if not steps[variant.key]().isfinite().all():
                raise UserError(f"{setup.model}, {variant.label}: gives no finite numbers, so times would mean little")
        with _bar(rounds + WARM_UP, f"{setup.model}, {setup.img_size} px, {KINDS[kind]}") as tick:
            times = time_in_turn(steps, rounds, setup.device, tick)
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        for variant in chosen:
            found[variant.key][kind] = _summary(times[variant.key], times[variant.baseline], variant.baseline)
    del networks
    if memory:
        for kind in kinds:
            measured = [VARIANTS[key] for key in found if kind in found[key] and not _compiles_beside(setup, key)]
            with _bar(len(measured), f"{setup.model}, {setup.img_size} px, memory of {KINDS[kind]}") as tick:
                for variant in measured:
                    found[variant.key][kind]["peak_mb"] = round(peak_memory(setup, variant, kind == "training"), 1)
                    tick()
    side = [setup.batch_size, timm.get_pretrained_cfg(setup.model).input_size[0], setup.img_size, setup.img_size]
    return {"model": setup.model, "twin": setup.twin, "input": side, "variants": list(found.values())}


def _compiles_beside(setup: Setup, key: str) -> bool:
    """Whether the memory of the process would be the compiler's."""
    return VARIANTS[key].compiled and setup.device == "cpu"


def _summary(times: Sequence[float], baseline: Sequence[float], name: str) -> dict[str, Any]:
    ratios = quartiles([one / other for one, other in zip(times, baseline)])  # of the same round
    low, middle, high = quartiles(times)
    return {
        "seconds": middle,
        "seconds_quartiles": [low, high],
        "baseline": name,
        "ratio": ratios[1],
        "ratio_quartiles": [ratios[0], ratios[2]],
        "times": list(times),
    }


def _table(case: dict[str, Any], kinds: Sequence[str]) -> list[list[str]]:
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


def _scaling(cases: Sequence[dict[str, Any]], kind: str) -> list[list[str]]:
    """Milliseconds per image and megapixel at each size: equal ones mean a cost linear in the pixels."""
    lines = [["ms per image and megapixel", *(f"{case['input'][-1]} px" for case in cases)]]
    for number, variant in enumerate(cases[0]["variants"]):
        found = [(case["input"], case["variants"][number].get(kind)) for case in cases]
        if all(row for _, row in found):
            values = [1e3 * row["seconds"] / (size[0] * size[-1] ** 2 / 1e6) for size, row in found]
            lines.append([variant["label"], *(f"{value:.0f}" for value in values)])
    return lines


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    """Markdown that also reads well in a terminal."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for number, line in enumerate(lines):
        cells = [cell.ljust(w) if not place else cell.rjust(w) for place, (cell, w) in enumerate(zip(line, widths))]
        print(f"| {' | '.join(cells)} |")
        if not number:
            print(f"|{'|'.join('-' * (w + 1) + ('-' if not place else ':') for place, w in enumerate(widths))}|")
    print(flush=True)


def _machine_line(found: dict[str, Any]) -> str:
    gpu = f"{found['gpu']} (CUDA {found['cuda']}, cuDNN {found['cudnn']}), " if "gpu" in found else ""
    load = f", load {found['load_before']}" if "load_before" in found else ""
    return (
        f"{gpu}{found['processor']}, {found['cores']} cores, {found['instructions']}, "
        f"{found['threads']} thread{'s' * (found['threads'] > 1)}{load}; "
        f"torch {found['torch']}, timm {found['timm']}, Python {found['python']}"
    )


def benchmark(
    models: Annotated[list[str] | None, typer.Argument(help="Registered …_cbam2 names. [resnet50_cbam2]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    img_size: Annotated[str | None, typer.Option(help="Side in pixels, or several: 128,224. [the model's own]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every variant once.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [torch's own choice]")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 by autocast.")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    inference: Annotated[bool, typer.Option(help="Measure inference.")] = True,
    train: Annotated[bool, typer.Option(help="Measure a forward and backward pass.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure peak memory, in a fresh process for each variant.")] = True,
    compile: Annotated[bool, typer.Option("--compile", help="Also plain, SE and CBAM2 compiled (minutes).")] = False,
    cpu_kernel: Annotated[
        bool, typer.Option("--cpu-kernel", help="Also CBAM2 by its compiled CPU kernel, built the first time.")
    ] = False,
    floor_too: Annotated[
        bool, typer.Option("--floor", help="Also the blocks alone, beside what memory bandwidth allows.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights and images.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the numbers and the chart.")] = Path(
        "benchmark"
    ),
) -> dict[str, Any]:
    """Measure what attention costs: plain, SE, ECA, CBAM and CBAM2, side by side in one run.

    Times are medians and quartiles over rounds in which every variant runs once, in changing order, after a warm-up;
    "over plain" is the median of the ratios within rounds, for compiled ones over plain compiled. Memory is the peak
    of a fresh process each: all it holds on a CPU, what torch allocated on a GPU. MACs count convolutions and matrix
    products only. ConvNeXts have no slot for timm's attention: plain and CBAM2.

    Returns:
        What `benchmark.json` holds.

    Raises:
        UserError: an unknown model or choice, an input that the model or the machine cannot take, no CUDA, no compiler.
    """
    require("matplotlib")
    models = list(dict.fromkeys(models or ["resnet50_cbam2"]))
    for model in models:
        _check_model(model)
    _check_choice("--dtype", dtype, list(DTYPES))
    _check_choice("--device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; give --device cpu")
    if cpu_kernel:
        _check_kernel(device)
    kinds = [kind for kind, wanted in (("inference", inference), ("training", train)) if wanted]
    if not kinds:
        raise UserError("--no-inference and --no-train leave nothing to measure: give one of them at most")
    sizes = {model: _sizes(img_size, model) for model in models}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):  # rather now than after minutes of measuring
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error

    torch.set_num_threads(threads or torch.get_num_threads())
    settings = {"batch_size": batch_size, "dtype": dtype, "device": device, "rounds": rounds, "seed": seed}
    result: dict[str, Any] = {"machine": machine(device), "settings": settings, "cases": []}
    line = _machine_line(result["machine"])
    how = f"{dtype}, channels_last, {rounds} rounds after {WARM_UP} to warm up, seed {seed}"
    print(f"{line}\n{how}; MACs of convolutions and matrix products only\n", flush=True)
    for model in models:
        cases = []
        for size in sizes[model]:
            setup = Setup(model, batch_size, size, dtype, device, torch.get_num_threads(), seed)
            with _explained(setup):
                case = _measure(setup, kinds, rounds, {"compiled": compile, "kernel": cpu_kernel}, memory)
                print(f"{model} over {setup.twin}, {' x '.join(map(str, case['input']))}\n")
                _print_table(_table(case, kinds))
                if floor_too:
                    with _bar(0, f"{model}, {size} px, blocks alone") as tick:
                        case["floor"] = floor(setup, kinds, rounds, cpu_kernel, tick)
                    _print_floor(case["floor"], kinds)
            cases.append(case)
        if len(cases) > 1:
            for kind in kinds:
                print(f"{model}, {KINDS[kind]}\n")
                _print_table(_scaling(cases, kind))
        result["cases"] += cases
    write_whole(output / "benchmark.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(result["cases"], output / "benchmark.png", "What attention costs", f"{dtype}, {line}")
    print(f"numbers {output / 'benchmark.json'}, chart {output / 'benchmark.png'}")
    return result


def _print_floor(found: dict[str, Any], kinds: Sequence[str]) -> None:
    speed = found["bandwidth"]
    print(f"Bandwidth {speed['copy'] / 1e9:.1f} GB/s copying, {speed['fresh'] / 1e9:.1f} GB/s into fresh memory.")
    print("least: input and result once each. passes: what each step reads and writes where no cache keeps a sample.\n")
    for kind in kinds:
        print(f"{KINDS[kind]}\n")
        _print_table(floor_table(found, kind))
