"""`timm-cbam2 benchmark`: what it measures is what it says, side by side; how fast things are is not asserted."""

import json
from statistics import median

import numpy as np
import pytest
import timm
import torch
from matplotlib.colors import to_rgb
from PIL import Image

import timm_cbam2
from timm_cbam2.evidence.benchmark import timing as benchmark_timing
from timm_cbam2.evidence.benchmark.floor import floor, floor_table, layer_shapes
from timm_cbam2.evidence.benchmark.networks import VARIANTS, Setup, build, macs, make_step, variants_of
from timm_cbam2.evidence.benchmark.picture import COLOURS
from timm_cbam2.evidence.benchmark.profile import KERNEL, OTHER, SPENT_ON, profile_table
from timm_cbam2.evidence.benchmark.timing import WARM_UP, peak_memory, quartiles, time_in_turn

QUICK = ("--img-size", "32", "--batch-size", "2", "--rounds", "2", "--threads", "1")
EAGER = ["plain", "se", "eca", "cbam", "cbam2", "cbam2_reparameterized"]
COMPILED = ["plain_compiled", "se_compiled", "cbam2_compiled"]


def setup(model="test_resnet_cbam2", size=32, batch_size=2):
    return Setup(model, batch_size, size)


def colours(path):
    """Share of a picture's pixels that have each of the chart's colours."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    return {k: (abs(pixels - np.array(to_rgb(c)) * 255).max(1) < 2).mean() for k, c in COLOURS.items()}


@pytest.fixture(scope="module")
def result(run, tmp_path_factory):
    """Of the command on one ResNet in two sizes: what it printed and where it wrote."""
    folder = tmp_path_factory.mktemp("benchmark") / "deep" / "folder"
    words = ("test_resnet_cbam2", *QUICK[2:], "--img-size", "32,64", "--no-memory", "--floor", "--profile")
    done = run("benchmark", *words, "-o", folder)
    assert done.code == 0 and done.err == "", done
    return done.out, folder


def test_the_numbers(result):
    found = json.loads((result[1] / "benchmark.json").read_text())
    assert found["settings"] == {"batch_size": 2, "dtype": "fp32", "device": "cpu", "rounds": 2, "seed": 0}
    assert found["machine"]["threads"] == 1 and found["machine"]["torch"] == torch.__version__
    assert [case["input"] for case in found["cases"]] == [[2, 3, 32, 32], [2, 3, 64, 64]]
    for case in found["cases"]:
        variants = {variant["key"]: variant for variant in case["variants"]}
        assert list(variants) == EAGER and case["twin"] == "test_resnet"
        for key, variant in variants.items():
            assert ("training" in variant) == (key != "cbam2_reparameterized")
            for kind in {"inference", "training"} & variant.keys():
                times, plain = variant[kind]["times"], variants["plain"][kind]["times"]
                assert len(times) == 2 and min(times) > 0
                assert variant[kind]["seconds"] == pytest.approx(median(times))
                assert variant[kind]["ratio"] == pytest.approx(median(a / b for a, b in zip(times, plain)))
        for name, key in (("test_resnet", "plain"), ("test_resnet_cbam2", "cbam2")):
            expected = sum(p.numel() for p in timm.create_model(name).parameters())
            assert variants[key]["parameters"] == expected
        assert variants["se"]["parameters"] > variants["eca"]["parameters"] > variants["plain"]["parameters"]
        assert variants["plain"]["macs_per_image"] < variants["cbam2"]["macs_per_image"]


def test_the_tables_and_the_chart(result):
    out, folder = result
    assert f"torch {torch.__version__}" in out and "1 thread" in out and "2 rounds after" in out
    assert out.count("test_resnet_cbam2 over test_resnet, 2 x 3 x") == 2
    for variant in variants_of(setup("test_resnet_cbam2", 32)):
        assert out.count(f"| {variant.label} ") >= 3  # in two sizes, and over the sizes
    assert "ms per image and megapixel" in out and "| 32 px | 64 px |" in out
    assert "GB/s copying" in out and out.count("| all blocks ") == 4
    assert all(share > 0.005 for share in colours(folder / "benchmark.png").values())
    assert sorted(path.name for path in folder.iterdir()) == ["benchmark.json", "benchmark.png"]


def test_where_the_time_goes(result):
    out, folder = result
    for case in json.loads((folder / "benchmark.json").read_text())["cases"]:
        variants = {variant["key"]: variant for variant in case["variants"]}
        for kind in ("inference", "training"):
            plain, cbam2 = (variants[key][kind]["spent"] for key in ("plain", "cbam2"))
            assert list(plain) == list(cbam2) == [*SPENT_ON, OTHER] and min(plain.values()) == 0 == plain[KERNEL]
            assert plain["convolutions"] > 0 < plain["norms"] and cbam2[OTHER] > plain[OTHER]
            for key in ("reductions", "matrix products", "copies"):  # a plain network has next to none
                assert cbam2[key] > plain[key]
            more = 1e3 * (sum(cbam2.values()) - sum(plain.values()))
            *_, total = profile_table(case, kind)
            at = profile_table(case, kind)[0].index(f"{variants['cbam2']['label']}: more")
            assert float(total[at]) == pytest.approx(more, abs=0.06)
    assert out.count("where the time goes") == 4 and out.count("| in all ") == 4


def test_a_convnext_in_bf16_with_memory_and_compiled_rows(run, tmp_path):
    # The compiler itself is left out, it takes a minute: test_compile.py has it.
    words = ("test_convnext_cbam2", *QUICK, "--dtype", "bf16", "--no-train", "--compile", "-o", tmp_path)
    done = run("benchmark", *words, env={"TORCHDYNAMO_DISABLE": "1"})
    assert done.code == 0 and "training" not in done.out, done
    (case,) = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    variants = {variant["key"]: variant["inference"] for variant in case["variants"]}
    assert list(variants) == ["plain", "cbam2", "cbam2_reparameterized", "plain_compiled", "cbam2_compiled"]
    assert variants["cbam2_compiled"]["baseline"] == "plain_compiled" and variants["cbam2"]["baseline"] == "plain"
    peaks = {key: found["peak_mb"] for key, found in variants.items() if found.get("peak_mb", 0) > 100}
    assert peaks.keys() == {*variants} - {*COMPILED}
    unused = colours(tmp_path / "benchmark.png")
    assert unused["plain"] > 0.005 and unused["cbam2"] > 0.005 and unused["eca"] == 0

    # Memory is of a fresh process: larger for larger images, and without what this one holds.
    ballast = torch.ones(2**29)  # 2 GB, which a child's ru_maxrss would report as its own
    images = setup("test_convnext_cbam2", 224, batch_size=8)
    large = peak_memory(images, VARIANTS["plain"], False)
    assert ballast.numel() * 4 / 2**20 > large
    assert large - peaks["plain"] > images.batch_size * 3 * images.img_size**2 * 4 / 2**20  # its input alone


def test_every_step_runs_once_a_round_and_none_is_always_first():
    calls = []
    rounds = 8
    steps = {name: lambda name=name: calls.append(name) for name in "abcd"}
    times = time_in_turn(steps, rounds, "cpu")
    assert {name: len(seconds) for name, seconds in times.items()} == dict.fromkeys("abcd", rounds)
    order = [calls[i : i + 4] for i in range(0, len(calls), 4)][WARM_UP:]
    assert len(order) == rounds and all(sorted(one) == list("abcd") for one in order)
    assert {one[0] for one in order} == {one[-1] for one in order} == set("abcd")
    after = {(one, other) for names in order for one, other in zip(names, names[1:])}
    assert ("a", "b") in after and ("b", "a") in after
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2, 3, 4) and quartiles([7.0]) == (7, 7, 7)


@pytest.mark.parametrize("name", ["test_resnet_cbam2", "test_convnext_cbam2"])
def test_what_runs_is_what_it_is_called(name):
    """Each network has its attention, none is at a value that would hide it, and gradients reach every parameter."""
    kinds = {None: None, "se": "SEModule", "eca": "EcaModule", "cbam": "CbamModule", "cbam2": "Cbam2"}
    logits = {}
    sized = setup(name, 64)  # smaller ones end in a single position, where average and maximum are equal
    for variant in variants_of(sized):
        network = build(sized, variant)
        found = {type(m).__name__ for m in network.modules()} & {*kinds.values()}
        assert found == ({kinds[variant.attention]} - {None}), variant
        logits[variant.key] = make_step(sized, variant, network, training=False)()
        assert logits[variant.key].isfinite().all() and logits[variant.key].std() > 0
        if variant.reparameterized:
            assert not any(".branches." in key for key in network.state_dict())
            torch.testing.assert_close(logits[variant.key], logits["cbam2"], rtol=1e-3, atol=1e-3)
            continue
        make_step(sized, variant, network, training=True)()
        assert all(p.grad is not None and p.grad.any() for p in network.parameters()), variant
        for block in (m for m in network.modules() if isinstance(m, timm_cbam2.Cbam2)):
            assert block.channel.fc2.weight.any() and all(b.pw.weight.any() for b in block.spatial.branches)


def test_macs_are_those_of_the_convolutions_and_products():
    network = timm.create_model("test_resnet").eval()
    expected = []

    def count(module, args, out):
        inputs = module.weight[0].numel()  # per output value
        expected.append(inputs * out.numel())

    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.randn(1, 3, 64, 64))
    assert macs(timm.create_model("test_resnet"), 64) == sum(expected)


def test_the_floor(monkeypatch):
    monkeypatch.setattr(benchmark_timing, "COPY_BYTES", 2**24)
    shapes = layer_shapes("test_resnet_cbam2", 32)
    network = timm.create_model("test_resnet_cbam2")
    assert sum(shapes.values()) == sum(isinstance(m, timm_cbam2.Cbam2) for m in network.modules())
    found = floor(setup(), ["inference", "training"], 1)
    copy = found["bandwidth"]["copy"]
    for row, (shape, blocks) in zip(found["rows"], shapes.items(), strict=True):
        assert row["shape"] == [2, *shape] and row["blocks"] == blocks and row["bytes"] == 4 * np.prod(row["shape"])
        for kind, reads in (("inference", (2, 3, 4)), ("training", (5, 7, 10))):
            se, cbam2 = row[kind]["se"], row[kind]["cbam2"]
            floors = [se["least"], se["passes"], cbam2["passes"]]
            assert floors == pytest.approx([n * row["bytes"] / copy for n in reads]) and se["least"] == cbam2["least"]
            assert se["seconds"] > 0 and cbam2["seconds"] > 0
    *_, total = floor_table(found, "inference")
    expected = sum(1e3 * row["blocks"] * row["inference"]["cbam2"]["seconds"] for row in found["rows"])
    assert float(total[6]) == pytest.approx(expected, abs=0.006)


def test_mistakes(refused, tmp_path):
    def refuse(*words, says):
        refused("benchmark", *words, "-o", tmp_path / "out", words=says)
        assert not (tmp_path / "out" / "benchmark.json").exists()

    refuse("resnet50", says=("resnet50", "did you mean resnet50_cbam2"))
    refuse("resnet5O_cbam2", says=("resnet5O_cbam2", "resnet50_cbam2"))
    refuse("--dtype", "fp8", says=("--dtype fp8", "fp32 or bf16 or fp16"))
    refuse("--device", "tpu", says=("--device tpu", "cpu or cuda"))
    refuse("--img-size", "2x", says=("--img-size 2x", "128,224"))
    refuse("--no-train", "--no-inference", says=("--no-train", "nothing to measure"))
    if not torch.cuda.is_available():
        refuse("--device", "cuda", says=("--device cuda", "--device cpu"))
    one_pixel = ("--img-size", "1", "--batch-size", "1", "--rounds", "1", "--no-inference")
    refused(
        "benchmark",
        "test_resnet_cbam2",
        *one_pixel,
        "-o",
        tmp_path / "out",
        words=("--batch-size 1", "--img-size 1", "--no-train"),
    )
    (tmp_path / "file").write_text("")
    refused("benchmark", "-o", tmp_path / "file", words=("--output", "file"))
    assert (tmp_path / "file").read_text() == ""
