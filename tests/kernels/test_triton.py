"""The Triton kernel gives torch's numbers in Triton's interpreter, and compiles for GPUs. None is here to run it: what
needs one is in tests/gpu_parts."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from timm_cbam2.kernels import triton_backward, triton_forward

FULL = {"x", "shortcut", "gamma", "g", "masked", "g_x"}
SIZES = {"C", "P", "sb", "sc", "sp"}
for module in (triton_forward, triton_backward):
    for name in module.__all__:
        reading = getattr(module, name)
        # Of sizes and strides, those that are 1 are constants, as when it is called.
        for dtype, on, capability, ones in (("bf16", True, 80, ("sp",)), ("fp16", False, 90, ("sc", "C", "P"))):
            types, constants = {}, {"BC": 16, "BP": 64, "COUNT": 7 if on else 3}
            for word in reading.arg_names:
                full = word in FULL or (word == "out" and name in ("finish", "products"))
                types[word] = "i32" if word in SIZES else "*" + (dtype if full else "fp32")
                if word in ones:
                    types[word], constants[word] = "constexpr", 1
                elif word.isupper() and word not in SIZES:
                    types[word], constants[word] = "constexpr", constants.get(word, on)
            constants = {word: value for word, value in constants.items() if word in types}
            made = triton.compile(ASTSource(reading, types, constants), target=GPUTarget("cuda", capability, 32))
            print(name, dtype, len(made.asm["cubin"]) > 0)
"""


@pytest.fixture(scope="module", autouse=True)
def triton():
    pytest.importorskip("triton", reason="Triton is not installed here")


def test_in_the_interpreter(environment, request):
    """A process of its own, since Triton decides when it is imported."""
    warned = [f"-W{given}" for given in request.config.getoption("pythonwarnings") or ()]
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        *warned,
        HERE / "interpreted_triton.py",
    ]
    done = subprocess.run(words, capture_output=True, text=True, env={**environment, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-5000:]


def test_it_compiles_for_gpus(script, environment, tmp_path):
    pytest.importorskip("triton.backends.nvidia", reason="this Triton has no compiler for NVIDIA's GPUs")
    done = script(COMPILE, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.code == 0 and done.out.count(" True\n") == 12, done


def test_what_is_asked_of_a_machine_without_a_gpu(script, environment):
    """One line, and nothing else changes."""
    program = "import timm_cbam2.kernels as k; s = k.status(); print(s['triton_in_use'], s['triton'] is not None)"
    bare = {**environment, "CUDA_VISIBLE_DEVICES": "", "TIMM_CBAM2_TRITON_KERNEL": "1"}
    done = script(program, env=bare)
    assert (done.code, done.out) == (0, "False True\n"), done
    assert done.err.count("the Triton kernel cannot be used: torch sees no CUDA device here") == 1
    assert "Traceback" not in done.err
    failed = script("import timm_cbam2; timm_cbam2.enable_triton_kernel()", env=bare)
    assert failed.code == 1 and failed.err.splitlines()[-1].startswith("RuntimeError: the Triton kernel cannot be used")
