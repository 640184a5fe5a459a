"""The shipped Accelerate configurations through `accelerate launch`: on CPUs for real, the others up to its checks.

GPUs and DeepSpeed are not run here; two machines and FSDP 2, on CPUs, in `test_several_machines`.
"""

import json

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from timm_cbam2.training.recipe import RECIPES

FOLDER = RECIPES / "accelerate"


def test_two_processes_on_cpus(start_python, write_folder, quick, tmp_path):
    """They measure every image once and write one run folder."""
    data = write_folder(tmp_path / "images", count=11)  # 27 to train on, 6 held out: nothing divides evenly
    launch = ("-m", "accelerate.commands.launch", "--config_file", FOLDER / "cpu_2.yaml", "-m", "timm_cbam2.finetune")
    result = start_python(*launch, "--cpu", "--data", data, *quick, "--output", "run", cwd=tmp_path).wait()
    assert result.code == 0, result
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_images"] for row in rows] == [6, 6]
    assert result.out.count("done in") == 1


@pytest.mark.parametrize(
    "name, kind, processes, machines",
    [
        ("gpus_8", "multi_gpu", 8, 1),
        ("gpus_4x8", "multi_gpu", 32, 4),
        ("fsdp_8", "use_fsdp", 8, 1),
        ("deepspeed_8", "use_deepspeed", 8, 1),
    ],
)
def test_the_launcher_takes_it(name, kind, processes, machines):
    """What `accelerate launch` makes of it before it starts anything."""
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "timm_cbam2.finetune", "--recipe", "imagenet_a3"]
    args, config, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    kinds = {k for k in ("multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "tpu") if getattr(args, k)}
    assert kinds == {kind}
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, "bf16")
    assert args.training_script == "timm_cbam2.finetune" and args.training_script_args == ["--recipe", "imagenet_a3"]
    if kind == "use_deepspeed":  # the environment it is started with takes the package itself
        assert args.zero_stage == 2 and config.deepspeed_config["gradient_clipping"] == 1.0
    else:
        assert (prepare_multi_gpu_env(args).get("FSDP_VERSION") == "2") == (kind == "use_fsdp")
