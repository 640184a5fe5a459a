"""A pickle that would leave a mark, in the place of every file of a run, its checkpoints and models, one at a time."""

import hashlib
import io
import json
import pickle
import shutil
import socket
import sys

import pytest
import timm
import torch
from hub_server import Hub
from transformers import AutoImageProcessor, AutoModelForImageClassification
from warm import COMMAND, MODULES, Server

from timm_cbam2.insertion.saved import load_inserted

# In one process: plants each file in turn, runs the command, puts back what was there.
CODE = """
import contextlib, hashlib, io, json, shutil, sys, traceback
from pathlib import Path
from timm_cbam2.cli import main

def sums(file):
    listed = next((p / "SHA256SUMS" for p in file.parents if (p / "SHA256SUMS").is_file()), None)
    if listed is not None and listed != file:  # as an author who means harm would
        names = sorted(p.relative_to(listed.parent).as_posix() for p in listed.parent.rglob("*") if p.is_file())
        names.remove(listed.name)
        lines = (f"{hashlib.sha256((listed.parent / n).read_bytes()).hexdigest()}  {n}\\n" for n in names)
        listed.write_text("".join(lines))

task = json.load(open(sys.argv[1]))
run, mark, results = Path(task["run"]), Path(task["mark"]), []
shutil.copytree(run, "kept")
for files, payload, removed in task["cases"]:
    for file in files:
        (run / file).write_bytes(Path(payload).read_bytes())
        sums(run / file)
    for file in removed:
        (run / file).unlink()
    sys.argv, out, err = ["timm-cbam2", *task["args"]], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = traceback.format_exc()
    results.append((code, err.getvalue(), mark.exists()))
    mark.unlink(missing_ok=True)
    shutil.rmtree(run)
    shutil.copytree("kept", run)
print(json.dumps(results))
"""


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture(scope="module")
def payloads(tmp_path_factory):
    """A bare pickle, and both formats of torch.save, each of which leaves a mark when it is read carelessly."""
    folder = tmp_path_factory.mktemp("payloads")
    mark = folder / "mark"
    state, files = {"state": Evil(mark), "weight": torch.ones(2)}, {}
    for name, zipped in (("bare", None), ("zip", True), ("old", False)):
        stream = io.BytesIO()
        if zipped is None:
            pickle.dump(state["state"], stream)
        else:
            torch.save(state, stream, _use_new_zipfile_serialization=zipped)
        files[name] = folder / name
        files[name].write_bytes(stream.getvalue())
        stream.seek(0)
        pickle.load(stream) if zipped is None else torch.load(stream, weights_only=False)
        assert mark.exists()
        mark.unlink()
    return mark, files


# Files of other writers, which a library might look for beside ours: Accelerate, torch, transformers, timm, DeepSpeed.
IN_CHECKPOINTS = (
    *("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "sampler.bin", "scaler.pt"),
    *("pytorch_model.bin", "dl_state_dict.bin", ".metadata", "__0_0.distcp"),
)
IN_MODELS = ("pytorch_model.bin", "model.bin", "model.pt", "training_args.bin", "preprocessor_config.json", "data.pkl")


@pytest.fixture(scope="module")
def run_folder(small_run, tmp_path_factory):
    """Copies of a finished run."""
    count = iter(range(1000))
    base = tmp_path_factory.mktemp("runs")
    return lambda: shutil.copytree(small_run[0], base / f"run{next(count)}")


def planted(start_python, folder, payloads, cases, args, tmp_path):
    """What the command did in each case: (files, code, stderr)."""
    task = dict(run=str(folder), mark=str(payloads[0]), cases=cases, args=[str(arg) for arg in args])
    (tmp_path / "task.json").write_text(json.dumps(task, default=str))
    result = start_python("-c", CODE, tmp_path / "task.json", cwd=tmp_path, brief=True).wait()
    assert result.code == 0, result
    found = json.loads(result.out.splitlines()[-1])
    outcomes = []
    for (files, payload, _), (code, err, ran) in zip(cases, found, strict=True):
        assert not ran, f"{args[0]} ran what stood in {files} ({payload})"
        assert code in (0, 2), (files, payload, code, err)
        if code == 2:
            assert len(err.splitlines()) == 1 and err.startswith("timm-cbam2: "), (files, payload, err)
        outcomes.append((files, code, err))
    return outcomes


def test_resume(start_python, run_folder, payloads, tmp_path):
    """Whatever the checkpoint's files are replaced by, it is refused; what does not belong to it is not looked at."""
    folder, kinds = run_folder(), payloads[1]
    (checkpoint,) = ((p.relative_to(folder)) for p in (folder / "checkpoints").glob("step-*"))
    needed = [str(checkpoint / p.name) for p in (folder / checkpoint).iterdir()]
    assert len(needed) == 6, needed
    own = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    others = sorted({*own} - {*needed, ".lock"})
    cases = [([file], payload, []) for file in needed for payload in kinds.values()]
    cases += [([file], kinds["zip"], []) for file in others]
    cases += [([str(checkpoint / name) for name in IN_CHECKPOINTS], payload, []) for payload in kinds.values()]
    outcomes = planted(start_python, folder, payloads, cases, ("finetune", "--resume", folder), tmp_path)
    for (file, *more), code, err in outcomes:
        if file in (*needed, "run.json"):
            assert code == 2 and file.rpartition("/")[2] in err, (file, code, err)
        elif more:
            assert code == 0, (file, err)


def rewrite(checkpoint, **changes):
    """Other contents of checkpoint.json, with checksums that are right."""
    info = json.loads((checkpoint / "checkpoint.json").read_text()) | changes
    info = {name: value for name, value in info.items() if value is not None}
    (checkpoint / "checkpoint.json").write_text(json.dumps(info))
    files = sorted(path for path in checkpoint.iterdir() if path.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (checkpoint / "SHA256SUMS").write_text("".join(lines))


def test_pickled_by_an_earlier_version(refused, run_folder, payloads):
    folder = run_folder()
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"):
        shutil.copy(payloads[1]["zip"], checkpoint / name)
    rewrite(checkpoint, format=None)
    refused("finetune", "--resume", folder, words=(checkpoint, "pickles, which can run code", "start anew"))
    assert not payloads[0].exists() and checkpoint.is_dir()


def test_what_a_checkpoint_tells_of_itself(refused, run, run_folder):
    """Altered with right checksums: one line that names the file, or what is not the same any more."""
    folder = run_folder()
    (checkpoint,) = (folder / "checkpoints").glob("step-*")
    whole = json.loads((checkpoint / "checkpoint.json").read_text())
    for changes in ({"settings": {}}, {"data": {}}, {"processes": "2"}, {"batch": None}):
        rewrite(checkpoint, **{**whole, **changes})
        refused("finetune", "--resume", folder, words=(checkpoint / "checkpoint.json",))
    rewrite(checkpoint, **{**whole, "versions": {**whole["versions"], "device": "cuda", "other": "1"}})
    result = run("finetune", "--resume", folder)
    assert result.code == 0 and "device cuda is now cpu" in result.out and "not bit-identical" in result.out, result
    (checkpoint / "random_0.safetensors").unlink()
    rewrite(checkpoint, **whole)
    refused("finetune", "--resume", folder, words=("random_0.safetensors", "holds no state"))


TAKEN = socket.create_server(("127.0.0.1", 0))
# What each needs of a run or model folder, so that it must refuse when that is something else.
MODEL = {"best/model.safetensors", "best/config.json"}
COMMANDS = {
    "evaluate": MODEL | {"run.json"},
    "predict": MODEL,
    "explain": MODEL,
    "export": MODEL,
    "report": {"run.json"},  # without the model, it has no pictures of it
    "push": {"run.json", *MODEL},
    "finetune": MODEL,
    "app": MODEL,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, start_python, run_folder, small_run, payloads, quick, tmp_path):
    """One process for each command, which goes through all files."""
    folder, kinds = run_folder(), payloads[1]
    image = next(small_run[1].rglob("*.png"))
    args = {
        "evaluate": (folder,),
        "predict": (folder, image),
        "explain": (folder, image, "--output", tmp_path / "out"),
        "export": (folder, "--torchscript", "--output", tmp_path / "out"),
        "report": (folder,),
        "push": (folder, "me/model", "--dry-run"),
        "finetune": ("--data", small_run[1], *quick, "--model", folder, "--output", tmp_path / "anew"),
        "app": (folder, "--port", TAKEN.getsockname()[1]),  # it ends when all is loaded
    }[command]
    if command == "app":
        pytest.importorskip("gradio", reason="the page needs gradio")
    needed = COMMANDS[command]
    own = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    own = [file for file in own if not file.startswith("checkpoints") and file != ".lock"]
    if command == "finetune":  # the others do not stand between it and the model, and it would train
        own = sorted(needed)
    each = kinds.values() if command == "predict" else [kinds["zip"]]
    cases = [([file], payload, []) for file in sorted(needed) for payload in each]
    cases += [([file], kinds["zip"], []) for file in sorted({*own} - needed)]
    cases += [([f"best/{name}"], payload, ["best/model.safetensors"]) for name in IN_MODELS[:3] for payload in each]
    if command != "finetune":
        cases += [([f"best/{name}" for name in IN_MODELS], kinds["zip"], [])]
    for files, code, err in planted(start_python, folder, payloads, cases, (command, *args), tmp_path):
        pickled_only = len(files) == 1 and files[0].rpartition("/")[2] in IN_MODELS
        if files[0] in needed or pickled_only and MODEL <= needed:
            assert code == 2 and "--port" not in err, (files, err)
        elif command == "app":
            assert "give another --port or --host" in err, (files, err)


def test_pull(payloads, small_run, environment, tmp_path):
    """From the Hub come the files of a model alone, and no pickle stays in the place of one."""
    mark, kinds = payloads
    whole = {path.name: path.read_bytes() for path in (small_run[0] / "best").iterdir()}
    evil, pulled = {name: payload.read_bytes() for name, payload in kinds.items()}, 0
    with Hub() as hub:
        env = {**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        del env["HF_HUB_OFFLINE"]
        server = Server(sys.executable, [*MODULES, "timm_cbam2.hub.push"], env)
        cases = [(name, kind) for name in sorted(MODEL) for kind in evil]
        cases += [(f"best/{name}", "zip") for name in ("README.md", *IN_MODELS, "modeling_cbam2.py")]
        for number, (file, kind) in enumerate(cases):
            name, place = f"user/m{number}", tmp_path / str(number)
            hub.add(name, {**whole, file.removeprefix("best/"): evil[kind]})
            result = server.start("-c", COMMAND, "pull", name, place, brief=True).wait()
            code, lines = (2, 1) if file in MODEL else (0, 0)
            assert not mark.exists() and (result.code, len(result.err.splitlines())) == (code, lines), (file, result)
            held = {path.name for path in place.iterdir()} if place.exists() else set()
            assert not held & set(IN_MODELS) and ("model.safetensors" in held) == (file not in MODEL)
            pulled += len(held) > 0
        server.close()
    assert pulled == len(cases) - 6


def test_both_libraries_doors(run_folder, payloads):
    mark, kinds = payloads
    folder = run_folder() / "best"
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    doors = (
        lambda: timm.create_model(f"local-dir:{folder}", pretrained=True),
        lambda: AutoModelForImageClassification.from_pretrained(folder),
        lambda: AutoImageProcessor.from_pretrained(folder),
        lambda: load_inserted(timm.create_model("resnet18"), folder),
    )
    refused = 0
    for name in (*whole, *IN_MODELS):
        for payload in kinds.values():
            for alone in (False, True):
                (folder / name).write_bytes(payload.read_bytes())
                if alone:
                    (folder / "model.safetensors").unlink()
                for door in doors:
                    try:
                        door()
                    except (OSError, ValueError, RuntimeError) as error:
                        refused += 1
                        assert str(error)
                    assert not mark.exists(), (name, payload)
                for path in folder.iterdir():
                    path.unlink()
                for other, content in whole.items():
                    (folder / other).write_bytes(content)
    assert refused > 60


def test_data(refused, run, write_folder, payloads, quick, tmp_path):
    """Pickles among the images, in the place of one, and as tables."""
    mark, kinds = payloads
    images = write_folder(tmp_path / "images")
    for name in ("data.pkl", "labels.npy", "digit0/index.pt", "digit0/all.npz", "dataset_info.json", "state.json"):
        shutil.copy(kinds["zip"], images / name)
    args = ("finetune", "--data", images, *quick, "--epochs", "1", "--output")
    result = run(*args, tmp_path / "run")
    assert result.code in (0, 2) and len(result.err.splitlines()) == (result.code == 2), result
    shutil.copy(kinds["bare"], images / "digit0" / "000.png")
    refused(*args, tmp_path / "other", words=("000.png",))
    for suffix in ("parquet", "arrow", "csv", "tar"):
        for kind, payload in kinds.items():
            tables = tmp_path / f"{suffix}-{kind}"
            tables.mkdir()
            shutil.copy(payload, tables / f"train.{suffix}")
            more = ("--streaming",) if kind == "old" else ()
            refused("finetune", "--data", tables, *more, *quick, "--output", tmp_path / "none", words=(tables,))
    assert not mark.exists()
