"""The real huggingface_hub client against a loopback server: up, down through both doors, and every way to fail.

The client reads its settings when it is imported, so each scenario is a process of its own; one process runs many
steps, because importing torch takes seconds.
"""

import json
import os
import struct

import pytest
import timm
import torch
from hub_scenario import scenario
from randomise import randomise
from safetensors.torch import load_file, save_file

from timm_cbam2 import Cbam2ForImageClassification
from timm_cbam2.errors import UserError
from timm_cbam2.hub.folder import check_folder, save
from timm_cbam2.hub.push import pull, push


def test_up_and_down(script, tmp_path):
    done = scenario(
        script,
        tmp_path,
        """
push(folder, "user/model", dry_run=True)
assert not hub.log, "a dry run sent something"
fails("no Hub token: run `hf auth login`", push, folder, "user/model")
assert not hub.log
os.environ["HF_TOKEN"] = "hf_test"
(folder / "optimizer.bin").write_bytes(b"state")
(folder / "data.parquet").write_bytes(b"rows")
push(folder, "user/model")
up = hub.repos["user/model"]["main"]
code = {path.name for path in (Path(ROOT) / "timm_cbam2" / "models").glob("*cbam2.py")}
assert up.keys() == {"config.json", "model.safetensors", "README.md"} | code
assert len(hub.commits) == 1 and up["model.safetensors"] == (folder / "model.safetensors").read_bytes()
assert b'hf-hub:user/model"' in up["README.md"]
doors("user/model")
with torch.no_grad():
    features = AutoModel.from_pretrained("user/model")(images)
    assert torch.equal(features.last_hidden_state, model.forward_features(images))
    maps = AutoBackbone.from_pretrained("user/model", out_features=["stage2"])(images).feature_maps
    assert torch.equal(maps[0], model.forward_intermediates(images, [2], intermediates_only=True)[0])
assert list(AutoImageProcessor.from_pretrained("user/model").data_config["input_size"]) == [3, 160, 160]

push(folder, "user/plain", with_code=False, private=True)
assert hub.repos["user/plain"]["main"].keys() == {"config.json", "model.safetensors", "README.md"}
assert b"auto_map" not in hub.repos["user/plain"]["main"]["config.json"]
push(folder, "user/plain", revision="v2")
doors("user/plain")
assert timm.create_model("hf-hub:user/plain@v2", pretrained=True).num_classes == 5
push(folder, "user/plain", create_pr=True)
assert "refs/pr/1" in hub.repos["user/plain"]

pull("user/model", home / "pulled")
assert {p.name for p in (home / "pulled").iterdir()} == up.keys()
assert (home / "pulled/model.safetensors").read_bytes() == up["model.safetensors"]
fails("is there already", pull, "user/model", home / "pulled")
AutoModelForImageClassification.from_pretrained(folder).push_to_hub("user/by-transformers")
doors("user/by-transformers")
""",
    )
    assert "dry run: nothing was sent" in done.out and "model.safetensors" in done.out


def test_failures_and_the_next_try(script, tmp_path):
    scenario(
        script,
        tmp_path,
        """
os.environ["HF_TOKEN"] = "hf_test"
commits = 0
for kind, words in [(401, "does not accept this token"), (403, "may not write to user/m"), (409, "try again"),
                    ((404, "RepoNotFound"), "no such repository"), (404, "404"), (500, "problem of its own"),
                    ("cut", "all of it arrived or nothing")]:
    hub.fault("POST .*/commit/", kind)
    fails(words, push, folder, "user/m")
    assert len(hub.commits) == commits
hub.fault("PUT /lfs/", "corrupt")
hub.blobs.clear()
fails("transfer failed.*(checksum|422)", push, folder, "user/m")
assert not hub.repos["user/m"]["main"], "half a model is there"
for kind in (500, "cut"):  # the client tries these again by itself, but for a cut where it is older than 2
    hub.blobs.clear()
    hub.fault("PUT /lfs/", kind)
    commits = len(hub.commits)
    try:
        push(folder, "user/m")
    except UserError as error:
        assert kind == "cut" and huggingface_hub.__version__ < "2" and "try again" in str(error), error
        assert len(hub.commits) == commits
        push(folder, "user/m")
doors("user/m")
up = hub.repos["user/m"]["main"]
for number, (kind, words) in enumerate([(500, "500"), (401, "401"), ((404, "RepoNotFound"), "no such repository"),
                                        (404, "404"), ((404, "EntryNotFound"), "no such file"),
                                        ("cut", "transfer failed"), ("corrupt", "arrived damaged")]):
    name, place = f"user/p{number}", home / f"p{number}"
    hub.add(name, up)
    hub.fault(f"GET .*p{number}/resolve/.*/model.safetensors", kind)
    fails(words, pull, name, place)
    assert not place.exists(), "half a model is there"
    pull(name, place)
    assert (place / "model.safetensors").read_bytes() == up["model.safetensors"]
for door in (lambda name: timm.create_model(f"hf-hub:{name}", pretrained=True), AutoModel.from_pretrained):
    for kind in (500, "cut", (404, "RepoNotFound")):
        name = f"user/d{len(hub.repos)}"
        hub.add(name, up)
        hub.fault(f"GET .*{name}/resolve/.*/model.safetensors", kind)
        with pytest.raises((OSError, RuntimeError)):
            door(name)
        doors(name)
fails("no such repository", pull, "user/nowhere", home / "nowhere")
fails("no such revision", pull, "user/m", home / "nowhere", revision="v9")
fails("write user/name", pull, "../../etc", home / "nowhere")
fails("write user/name", push, folder, "name")
""",
    )


def test_hostile_repositories(script, tmp_path):
    scenario(
        script,
        tmp_path,
        """
import json, pickle
whole = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "README.md")}
config = json.loads(whole["config.json"])
class Evil:
    def __reduce__(self):
        return (Path.touch, (home / "ran",))
evil = pickle.dumps(Evil())
hub.add("user/pickle", {"config.json": whole["config.json"], "pytorch_model.bin": evil, "evil.py": b"raise SystemExit"})
fails("pickle, which can run code", pull, "user/pickle", home / "x")
fails("pickles, which can", timm.create_model, "hf-hub:user/pickle", pretrained=True, kind=ValueError)
fails("pickles, which can", AutoModel.from_pretrained, "user/pickle", kind=ValueError)

def repo(name, **changes):
    files = dict(whole)
    if "weights" in changes:
        files["model.safetensors"] = changes.pop("weights")
    hub.add(name, {**files, "config.json": json.dumps({**config, **changes}).encode()})
    return name

cut = repo("user/cut", weights=whole["model.safetensors"][:-1000])
junk = repo("user/junk", weights=b"\\xff" * 5000)
for name in (cut, junk):
    fails("damaged or cut off", pull, name, home / "x")
    fails("damaged or cut off", timm.create_model, f"hf-hub:{name}", pretrained=True, kind=ValueError)
    fails("damaged or cut off", AutoModel.from_pretrained, name, kind=ValueError)
for architecture in ("resnet18", "../../evil", "hf-hub:user/pickle", "os.system"):
    name = repo(f"user/a{len(hub.repos)}", architecture=architecture)
    fails("Unknown architecture", pull, name, home / "x")
    fails("Unknown architecture", AutoModel.from_pretrained, name, kind=ValueError)
big = repo("user/big", num_classes=10**9)
fails("num_classes=1000000000 is not allowed", timm.create_model, f"hf-hub:{big}", pretrained=True, kind=ValueError)
fails("num_classes=1000000000 is not allowed", pull, big, home / "x")
wide = repo("user/wide", model_args={"cbam2": {"kernel_sizes": [10**9 + 1]}})
fails("kernel_sizes", AutoModel.from_pretrained, wide, kind=ValueError)
fails("kernel_sizes", timm.create_model, f"hf-hub:{wide}", pretrained=True, kind=ValueError)
fails("kernel_sizes", pull, wide, home / "x")
heavy = repo("user/heavy", weights=bytes(30_000_000))
hub.log.clear()
fails("was not downloaded", pull, heavy, home / "x")
assert not any("GET" in line and "safetensors" in line for line in hub.log)
hub.add("user/paths", {**whole, "../../escaped": b"x", "sub/../../../escaped": b"x"})
pull("user/paths", home / "paths")
assert {p.name for p in (home / "paths").iterdir()} == whole.keys()
assert not list(home.rglob("escaped")) and not (home / "ran").exists() and not (home / "x").exists()
""",
    )


def test_a_hundred_megabytes(script, tmp_path):
    """resnet50_cbam2 through the same wires."""
    scenario(
        script,
        tmp_path,
        """
os.environ["HF_TOKEN"] = "hf_test"
push(folder, "user/large")
assert len(hub.repos["user/large"]["main"]["model.safetensors"]) > 95_000_000
doors("user/large")
""",
        "resnet50_cbam2",
    )


@pytest.fixture
def folder(tmp_path):
    model = randomise(timm.create_model("test_resnet_cbam2", num_classes=5))
    return save(model, tmp_path / "model", label_names=["../up", "a/b", "c", "d\\e", "<script>"])


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "names no architecture"),
        (lambda f: edit_config(f, architecture="resnet50_cbam3"), "did you mean resnet50_cbam2"),
        (lambda f: edit_config(f, architecture="resnet18_cbam2"), "does not match config.json"),
        (lambda f: edit_config(f, num_classes=6, id2label=None), r"fc.bias has shape \(5,\), not \(6,\)"),
        (lambda f: os.truncate(f / "model.safetensors", 10_000), "damaged or cut off"),
        (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60)), "damaged or cut off"),
        (lambda f: (f / "README.md").unlink() or (f / "README.md").symlink_to("/etc/passwd"), "is a link"),
    ],
)
def test_push_refuses_what_is_not_whole(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words):
        push(folder, "user/model", dry_run=True)


def test_the_commands(run, refused, folder, tmp_path):
    """As a user types them, with the Hub out of reach."""
    done = run("push", "model", "user/model", "--no-code", "--private", "--dry-run", cwd=tmp_path)
    assert done.code == 0 and "README.md" in done.out and "cbam2.py" not in done.out
    refused("pull", "user/model", "here", cwd=tmp_path, words=["HF_HUB_OFFLINE is set"])
    assert not (tmp_path / "here").exists()


def test_push_refuses_weights_of_other_options(folder):
    weights = load_file(folder / "model.safetensors")
    weights["layer1.0.se.extra"] = torch.zeros(1)
    del weights["conv1.0.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="conv1.0.weight is missing; layer1.0.se.extra is unexpected"):
        check_folder(folder)
    with pytest.raises(ValueError, match="do not fit"):
        Cbam2ForImageClassification.from_pretrained(folder)


def test_hostile_names_are_only_names(folder, tmp_path, capsys):
    push(folder, "user/model", dry_run=True)
    assert "../up" not in capsys.readouterr().out
    model = Cbam2ForImageClassification.from_pretrained(folder)
    assert model.config.id2label[0] == "../up"
    model.save_pretrained(tmp_path / "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "model"]
    for name in ("user/../x", "a/b/c", "user/na me", ""):
        for verb in (lambda name: push(folder, name, dry_run=True), lambda name: pull(name, tmp_path / "x")):
            with pytest.raises(UserError, match="write user/name"):
                verb(name)
