"""What the README shows is what happens: its Python runs, its commands run, its numbers are the registry's."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
from hf_cache import add_to_cache
from packaging.version import Version
from PIL import Image
from timm.models._hub import save_for_hf

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def cached(environment, tmp_path_factory):
    """In the cache: the weights that the README starts from; random ones, since only their shape matters here."""
    added = []
    for name in ("resnet50", "resnet18"):
        folder = tmp_path_factory.mktemp(name)
        save_for_hf(timm.create_model(name), folder, safe_serialization=True)
        added.append(add_to_cache(folder, Path(environment["HF_HOME"]), f"timm/{name}.a1_in1k"))
    yield
    for repo in added:
        shutil.rmtree(repo)


@pytest.fixture(scope="module")
def workplace(run, cached, tmp_path_factory):
    """A folder in which the README's commands have been typed, one after the other."""
    folder = tmp_path_factory.mktemp("workplace")
    for name, colour in (("cat", "orange"), ("dog", "brown")):
        (folder / "my_images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (60, 50 + number), colour).save(folder / "my_images" / name / f"{number}.jpg")
    for command in commands():
        if command.startswith("timm-cbam2 "):
            result = run(*shlex.split(command)[1:], cwd=folder)
            assert result.code == 0, (command, result.err)
    return folder


def test_the_commands_run(workplace):
    assert (workplace / "my_run" / "best" / "model.safetensors").is_file()
    assert (workplace / "pictures" / "1.png").is_file()


def test_the_python_runs(script, workplace, environment):
    result = script("\n".join(blocks("python")), cwd=workplace, env=environment)
    assert result.code == 0, result.err


def test_every_command_is_run_by_a_test():
    """The two that create an environment are run by .ci/run and by test_package.py; the others above."""
    kinds = {"python3 -m venv .venv": 0, "timm-cbam2 ": 0}
    for command in commands():
        kind = next((kind for kind in kinds if command.startswith(kind)), None)
        assert kind is not None, f"no test runs: {command}"
        kinds[kind] += 1
    assert kinds["python3 -m venv .venv"] == 2


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="older timm has fewer weights")
def test_the_numbers_are_the_registrys():
    import timm_cbam2  # noqa: F401

    hub = (ROOT / "timm_cbam2" / "hub" / "README.md").read_text(encoding="utf-8")
    assert f"# {len(timm.list_models('*_cbam2'))} architectures" in README
    tags = timm.list_pretrained("*_cbam2.from_*")
    started = {tag.partition(".")[0] for tag in tags}
    assert f"{len(started)} architectures start\nfrom timm's own ({len(tags)} tags" in README
    licences = [timm.get_pretrained_cfg(tag).license for tag in tags]
    meta = sum(licences.count(name) for name in ("dinov3-license", "fair-noncommercial-research-license"))
    assert f"{licences.count('cc-by-nc-4.0')} tags are non-commercial" in hub and f"{meta} carry Meta's" in hub


def test_a_newcomer_reads_it_to_the_end():
    """And what it leaves to the rooms is there."""
    assert len(README.splitlines()) <= 150
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
