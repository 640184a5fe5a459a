"""What attention costs: a network plain, with timm's attention layers and with CBAM2, side by side in one run."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Callable, Iterator, NamedTuple, Sequence

import timm
import torch
import typer

from ...errors import UserError, one_line, require
from ...files import write_whole
from ...hub.zoo import suggest
from ...kernels.cpu import disable_cpu_kernel, enable_cpu_kernel
from .floor import floor
from .networks import DTYPES, VARIANTS, Setup, build, macs, make_step, variants_of
from .picture import draw
from .printed import KINDS, machine_line, print_floor, print_table, scaling, table
from .profile import profile_table, spent_in_turn
from .timing import WARM_UP, machine, peak_memory, quartiles, time_in_turn

__all__ = ["benchmark"]


class Also(NamedTuple):
    """What is measured beside the variants that always are."""

    compiled: bool
    kernel: bool
    memory: bool
    floor: bool
    profile: bool


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


def _measure(setup: Setup, kinds: Sequence[str], rounds: int, also: Also) -> dict[str, Any]:
    """One case of `benchmark.json`: every variant of one model at one size."""
    if also.compiled:
        torch.compiler.reset()  # each size is compiled as if it were the only one
    variants = variants_of(setup, also.compiled, also.kernel)
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
        spent = spent_in_turn(steps, setup.device) if also.profile else {}
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        for variant in chosen:
            found[variant.key][kind] = _summary(times[variant.key], times[variant.baseline], variant.baseline)
            if spent:
                found[variant.key][kind]["spent"] = spent[variant.key]
    del networks
    if also.memory:
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


def benchmark(
    models: Annotated[list[str] | None, typer.Argument(help="Registered …_cbam2 names. [resnet50_cbam2]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    img_size: Annotated[str | None, typer.Option(help="Side in pixels, or several: 128,224. [the model's own]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every variant once.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. [torch's own choice]")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, or bf16 or fp16 by autocast.")] = "fp32",
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
    profile: Annotated[
        bool, typer.Option("--profile", help="Also what each spends more than plain, by kind of operation.")
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
    kinds = [kind for kind, wanted in (("inference", inference), ("training", train)) if wanted]
    _check_asked(models, dtype, device, cpu_kernel, kinds)
    sizes = {model: _sizes(img_size, model) for model in models}
    _check_writable(output)
    torch.set_num_threads(threads or torch.get_num_threads())
    settings = {"batch_size": batch_size, "dtype": dtype, "device": device, "rounds": rounds, "seed": seed}
    result: dict[str, Any] = {"machine": machine(device), "settings": settings, "cases": []}
    line = machine_line(result["machine"])
    how = f"{dtype}, channels_last, {rounds} rounds after {WARM_UP} to warm up, seed {seed}"
    print(f"{line}\n{how}; MACs of convolutions and matrix products only\n", flush=True)
    also = Also(compiled=compile, kernel=cpu_kernel, memory=memory, floor=floor_too, profile=profile)
    for model in models:
        setups = [Setup(model, batch_size, s, dtype, device, torch.get_num_threads(), seed) for s in sizes[model]]
        result["cases"] += _measure_sizes(setups, kinds, rounds, also)
    write_whole(output / "benchmark.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(result["cases"], output / "benchmark.png", "What attention costs", f"{dtype}, {line}")
    print(f"numbers {output / 'benchmark.json'}, chart {output / 'benchmark.png'}")
    return result


def _check_asked(models: Sequence[str], dtype: str, device: str, cpu_kernel: bool, kinds: Sequence[str]) -> None:
    for model in models:
        _check_model(model)
    _check_choice("--dtype", dtype, list(DTYPES))
    _check_choice("--device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; give --device cpu")
    if cpu_kernel:
        _check_kernel(device)
    if not kinds:
        raise UserError("--no-inference and --no-train leave nothing to measure: give one of them at most")


def _check_writable(output: Path) -> None:
    """Rather now than after minutes of measuring."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror or error}") from error


def _measure_sizes(setups: Sequence[Setup], kinds: Sequence[str], rounds: int, also: Also) -> list[dict[str, Any]]:
    """One model at each size, printed as it goes."""
    cases = []
    for setup in setups:
        with _explained(setup):
            case = _measure(setup, kinds, rounds, also)
            print(f"{setup.model} over {setup.twin}, {' x '.join(map(str, case['input']))}\n")
            print_table(table(case, kinds))
            for kind in kinds if also.profile else ():
                print(f"{KINDS[kind]}: where the time goes by torch's profiler, itself dear to small operations\n")
                print_table(profile_table(case, kind))
            if also.floor:
                with _bar(0, f"{setup.model}, {setup.img_size} px, blocks alone") as tick:
                    case["floor"] = floor(setup, kinds, rounds, also.kernel, tick)
                print_floor(case["floor"], kinds)
        cases.append(case)
    if len(cases) > 1:
        for kind in kinds:
            print(f"{setups[0].model}, {KINDS[kind]}\n")
            print_table(scaling(cases, kind))
    return cases
