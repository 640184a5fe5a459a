"""The command line: help, the table of models, and every mistake as one line with exit code 2."""

import json

import timm

import timm_cbam2  # noqa: F401
from timm_cbam2.hub.zoo import names, suggest


def test_help(run):
    result = run()
    assert result.code == 0 and all(verb in result.out for verb in ("finetune", "evaluate", "predict", "models"))
    result = run("finetune", "--help")
    assert result.code == 0 and "--skip-bad-images" in result.out and result.err == ""


def test_modules_run_by_themselves(script, environment):
    """As `python -m timm_cbam2.X`, in one process because importing torch takes seconds."""
    code = """
import runpy, sys, warnings
warnings.simplefilter("ignore")
for name in ("finetune", "ablation", "cli"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"timm_cbam2.{name}", run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""
    done = script(code, env=environment)
    assert done.code == 0 and done.out.count("Usage: ") == 3 and done.err == "", done


OUTPUT_OPTIONS = """
import json, sys, typer, typer.main

def options(app, **_):
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        found[name] = [o for p in command.get_params(context) if "--output" in p.opts for o in p.opts]
    print(json.dumps(found))

typer.Typer.__call__ = options
from timm_cbam2.cli import main
main()
"""


def test_output_is_o_for_short_in_every_command(script, run, environment):
    """In all that there are, as the parser has them; and in what two say of themselves."""
    found = json.loads(script(OUTPUT_OPTIONS, env=environment).out)
    assert found.keys() > {"finetune", "export", "explain", "models"}
    taking = {verb: options for verb, options in found.items() if options}
    assert len(taking) > 5 and found["models"] == [] and all("-o" in options for options in taking.values()), found
    for verb in ("export", "evaluate"):
        assert "-o, --output" in run(verb, "--help").out or "--output, -o" in run(verb, "--help").out, verb


def test_models(run, refused):
    result = run("models", "resnet5*")
    assert result.code == 0, result
    (line,) = [line for line in result.out.splitlines() if line.startswith("resnet50_cbam2 ")]
    count = sum(p.numel() for p in timm.create_model("resnet50_cbam2").parameters())
    assert f"{count / 1e6:.2f} M" in line and "warm start" in line and "from_a1_in1k" in line
    assert any(line.startswith("resnet56 ") for line in result.out.splitlines())
    assert "test_resnet_cbam2" in run("models", "test_").out
    refused("models", "resnet5O_cbam2", words=("resnet5O_cbam2", "resnet50_cbam2"))


def test_suggest():
    assert len(names()) >= 82 and "resnet20" in names()
    assert suggest("resnet50_cbam")[0] == "resnet50_cbam2"
    assert suggest("ResNet50-CBAM2")[0] == "resnet50_cbam2"
    assert suggest("resnet50")[0] == "resnet50_cbam2"
    assert suggest("convnext_tinny_cbam2")[0] == "convnext_tiny_cbam2"
    assert suggest("resnet50_cbam2.a1_in1k")[0] == "resnet50_cbam2.from_a1_in1k"
    assert suggest("resnet50_cbam2.from_a1")[0] == "resnet50_cbam2.from_a1_in1k"
    assert suggest("resnet44_cbam2.from_a1") == ["resnet44_cbam2"]  # has no weights
    assert suggest("zzzz") == []


def test_mistakes_in_options(refused):
    refused("finetunne", words=("finetunne", "--help"))
    refused("finetune", "--epoch", "3", words=("--epoch", "--epochs"))
    refused("finetune", "--epochs", "0", words=("--epochs", "greater than or equal to 1"))
    refused("finetune", "--epochs", "many", words=("--epochs", "many"))
    refused("finetune", "--opt", "adamm", words=("--opt adamm", "adam"))
    refused("finetune", "--opt", "sgd", words=("--opt sgd", "--lr"))
    refused("finetune", "--sched", "cos", words=("--sched cos", "cosine"))
    refused("finetune", "--augment", "much", words=("--augment much", "light"))
    refused("finetune", "--lr", "0", words=("--lr 0",))
    refused("finetune", "--img-size", "2", words=("--img-size 2",))
    refused("finetune", "--model", "resnet2_cbam2", words=("resnet2_cbam2", "did you mean", "resnet20_cbam2"))
    refused("finetune", "--model", "resnet50_cbam2.a1_in1k", words=("a1_in1k", "resnet50_cbam2.from_a1_in1k"))
    refused("finetune", "--model", "resnet32_cbam2", "--pretrained", words=("resnet32_cbam2", "no pretrained weights"))
    refused("predict", words=("MODEL",))


def test_mistakes_in_data(refused, write_folder, tmp_path):
    def refuse(folder, *words):
        refused("finetune", "--data", folder, "--output", tmp_path / "run", words=words)
        assert not (tmp_path / "run").exists()

    refuse(tmp_path / "nowhere", "--data", tmp_path / "nowhere", "no such folder")
    refuse("owner/name", "owner/name", "Hub")
    one = write_folder(tmp_path / "one", classes=(3,))
    refuse(one, "only one class", "digit3")
    empty = write_folder(tmp_path / "empty", classes=(1, 2))
    (empty / "nothing").mkdir()
    refuse(empty, empty / "nothing", "no images")
    refuse(one / "digit3", "no class folders")
    write_folder(tmp_path / "differ" / "train", classes=(1, 2))
    write_folder(tmp_path / "differ" / "val", classes=(1, 4))
    refuse(tmp_path / "differ", "class folders", "lacks: digit4", "to train on")
    bad = write_folder(tmp_path / "bad", classes=(1, 2))
    (bad / "digit1" / "000.png").write_text("not an image")
    refuse(bad, bad / "digit1" / "000.png", "--skip-bad-images")
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path / "notes.txt", "notes.txt", ".parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    refuse(tmp_path / "broken.parquet", "broken.parquet", "cannot be read")


def test_a_file_as_output_is_refused(refused, write_folder, tmp_path):
    data = write_folder(tmp_path / "images")
    (tmp_path / "file").write_text("")
    refused("finetune", "--data", data, "--output", tmp_path / "file", words=("--output", "file"))
    refused("finetune", "--data", data, "--output", tmp_path / "file" / "run", words=("--output", "file"))


def test_a_missing_extra_is_said(script, environment, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from timm_cbam2.cli import main; main()"
    done = script(code, "finetune", cwd=tmp_path, env=environment)
    assert done.code == 2 and done.err.count("\n") == 1, done
    assert "matplotlib" in done.err and 'pip install "timm_cbam2[train]"' in done.err
    assert not list(tmp_path.iterdir())


def test_importing_the_package_imports_no_training_code(script, environment):
    # The Auto classes of transformers 5.4 import scikit-learn themselves.
    code = "import sys, json, transformers; transformers.AutoModel; there = {*sys.modules}; "
    loaded = set(
        json.loads(
            script(code + "import timm_cbam2; print(json.dumps([*({*sys.modules} - there)]))", env=environment).out
        )
    )
    assert "timm_cbam2.models" in loaded
    for module in ("datasets", "sklearn", "matplotlib", "typer", "timm_cbam2.training", "timm_cbam2.data"):
        assert module not in loaded, module
