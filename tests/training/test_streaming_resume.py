"""A stream interrupted in the middle of an epoch goes on at the very image; a signal is heard while it is measured."""

import hashlib
import io
import json
import pickle
import re
import shutil
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timm_cbam2.data import shards, stream, stream_loader
from timm_cbam2.data.reading import read_image
from timm_cbam2.data.sources import images_of_run
from timm_cbam2.errors import UserError, one_line
from timm_cbam2.training.snapshot import fitting, going_on
from timm_cbam2.training.states import pack, read_state

datasets = pytest.importorskip("datasets")
pytest.importorskip("torchdata")


@pytest.fixture(scope="module")
def write_shards(tmp_path_factory):
    """`write_shards(train=[n, …], validation=[n, …], tar=False)`: shards of grey images, by their number."""

    def write_tar(path, values):
        with tarfile.open(path, "w") as shard:
            for value in values:
                file = io.BytesIO()
                Image.fromarray(np.full((8, 8, 3), value % 256, np.uint8)).save(file, "PNG")
                for end, content in (("png", file.getvalue()), ("cls", str(value % 3).encode())):
                    member = tarfile.TarInfo(f"{value:06}.{end}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))

    def write(tar=False, **splits):
        folder = tmp_path_factory.mktemp("stream")
        kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
        for split, sizes in splits.items():
            start = 0
            for number, size in enumerate(sizes):
                values = range(start, start + size)
                start += size
                if tar:
                    write_tar(folder / f"{split}-{number:05}.tar", values)
                    continue
                images = [Image.fromarray(np.full((8, 8, 3), value % 256, np.uint8)) for value in values]
                part = {"image": images, "label": [value % 3 for value in values]}
                datasets.Dataset.from_dict(part, features=kind).to_parquet(folder / f"{split}-{number}.parquet")
        return folder

    return write


CONFIG = dict(input_size=(3, 8, 8), interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)
CONFIG["crop_mode"] = "center"


def numbers(batches):
    return [round(image.mean().item() * 255) for images, *_ in batches for image in images]


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_no_image_is_lost_or_given_twice(write_shards, monkeypatch, processes, workers):
    """Interrupted after any batch, the rest of the epoch and the next one are what they would have been."""
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 12)  # several blocks in each share
    folders = [write_shards(train=[40] * 4, validation=[3], tar=processes > 1), write_shards(train=[40] * 4)]
    for folder in folders[:1] if workers else folders:  # starting the workers takes its time
        splits = stream.find_stream(str(folder), None, None, "0.25").splits  # without a val split, filtered
        samples, total, size = splits["train"], 160, 5
        if folder is folders[1]:
            size = 1  # whatever their number, none is dropped as half a batch
            total -= len(list(stream.StreamedImages(splits["val"], CONFIG, None, 0, False, (0, 1))))

        def loader_of(process, samples=samples, size=size):
            dataset = stream.StreamedImages(samples, CONFIG, "none", 3, False, (process, processes))
            return stream_loader.make_stream_loader(dataset, size, workers), dataset

        seen = [[], []]
        for process in range(processes):
            whole, dataset = loader_of(process)
            epochs = []
            for epoch in (1, 2):
                dataset.set_epoch(epoch)
                epochs.append(numbers(whole))
                seen[epoch - 1] += epochs[-1]
            assert epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1]
            for done in (7,) if workers else (1, 7, total // processes // size - 15 // size):
                broken, dataset = loader_of(process)
                dataset.set_epoch(1)
                batches = iter(broken)
                first = numbers([next(batches) for _ in range(done)])
                place = pickle.dumps(stream_loader.place(broken))
                resumed, dataset = loader_of(process)
                dataset.set_epoch(1)
                stream_loader.load_place(resumed, pickle.loads(place))
                assert first + numbers(resumed) == epochs[0], (folder, done)
                dataset.set_epoch(2)
                assert numbers(resumed) == epochs[1]
        for values in seen:
            assert len(values) == len(set(values)) == total


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_what_is_held_out_is_never_trained_on(write_shards, processes):
    """In any order of the files and any division of them; and it is what `evaluate RUN` measures on."""
    folder = write_shards(train=[7, 12, 9, 40])
    splits = stream.find_stream(str(folder), None, None, "0.25").splits
    run = dict(data=str(folder), streaming=True, val_split="0.25")
    again = images_of_run(run).splits
    held_out = sorted(np.asarray(read_image(source)).mean() for source in again["val"].sources())
    assert 5 < len(held_out) < 30 and len(held_out) + len(again["train"]) == 68
    for epoch in (1, 2, 3):
        seen = {"train": [], "val": []}
        for split, values in seen.items():
            for process in range(processes):
                augment = "none" if split == "train" else None
                dataset = stream.StreamedImages(splits[split], CONFIG, augment, 0, False, (process, processes))
                dataset.set_epoch(epoch)
                values += numbers((image[None],) for image, *_ in dataset)
        assert sorted(seen["val"]) == held_out
        assert sorted(seen["train"] + seen["val"]) == list(range(68))


def altered(tree, values):
    """Each version of nested dicts, lists and tuples in which one thing, at any depth, is one of `values` instead."""
    yield from values
    if isinstance(tree, dict):
        for key, part in tree.items():
            yield from ({**tree, key: other} for other in altered(part, values))
            yield {name: value for name, value in tree.items() if name != key}
    elif isinstance(tree, (list, tuple)):
        for i, part in enumerate(tree):
            yield from (type(tree)([*tree[:i], other, *tree[i + 1 :]]) for other in altered(part, values))


@pytest.mark.filterwarnings("ignore")  # lengths that are none, and loaders that were never whole
@pytest.mark.parametrize("workers", [0, 1])
def test_a_place_that_is_none(write_shards, tmp_path, workers):
    """Whatever stands in its place in a checkpoint ends in one line, if it is not a place after all."""
    samples = stream.find_stream(str(write_shards(train=[9, 9])), None, None, "0.25").splits["train"]

    def make():
        dataset = stream.StreamedImages(samples, CONFIG, "none", 3, False, (0, 1))
        dataset.set_epoch(1)
        return stream_loader.make_stream_loader(dataset, 2, workers)

    loader = make()
    batches = iter(loader)
    seen = [next(batches) for _ in range(2)]
    whole, said = stream_loader.place(loader), []
    rest = numbers(batches)
    # Processes take their time to start: a few of them will do.
    values = ("x",) if workers else ("x", None, -1, 10**9, 0.5, [], {}, {"a": 1})
    for number, place in enumerate((whole, *altered(whole, values))):
        if workers and number % 7:
            continue
        try:
            with fitting(tmp_path / "position"):
                stream_loader.load_place(loader := make(), place)
            got = numbers(going_on(stream_loader.in_turns(loader, len(rest) // 2), tmp_path / "position"))
            assert number or got == rest, "the place as it was"
        except UserError as error:
            assert "\n" not in one_line(error), place
            said.append(str(error))
    assert (
        seen and sum(f"{tmp_path / 'position'} does not fit this run" in text for text in said) > (2, 50)[not workers]
    )


ARGS = ("--streaming", "--model", "resnet20_cbam2", "--no-pretrained", "--img-size", "8", "--save-every", "1 step")


def send_elsewhere(checkpoint):
    """A place in the stream that is none, with checksums that are right."""
    file = checkpoint / "position.safetensors"
    text = json.dumps(pack(read_state(file))[0])
    with safe_open(file, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    assert '["given", ' in text
    text = re.sub(r'\["given", \d+\]', '["given", "far"]', text)
    save_file(tensors, file, metadata={"format": "pt", "timm_cbam2": text})
    sums = checkpoint / "SHA256SUMS"
    line = f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}"
    sums.write_text(re.sub(rf".*  {file.name}", line, sums.read_text()))


def launched(start, start_group, processes, *args):
    return start_group(processes, *args) if processes > 1 else [start(*args)]


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in lines]


@pytest.mark.parametrize("processes, workers", [(1, 1), (2, 0)])  # parquet files for one, tar files for two
def test_killed_in_the_middle_of_an_epoch(start, start_group, refused, write_shards, tmp_path, processes, workers):
    """The metrics and the weights at the end are those of a run that nothing interrupted."""
    data = write_shards(train=[14 * processes] * 2, validation=[5], tar=processes > 1)
    args = ("finetune", "--data", data, *ARGS, "--batch-size", "4", "--workers", workers, "--epochs", "2")
    args += ("--model-kwargs", "drop_path_rate=0.2", "--augment", "standard", "--resume", "auto")
    whole = (*args, "--save-every", "never", "--output", tmp_path / "whole")
    for result in [p.wait() for p in launched(start, start_group, processes, *whole)]:
        assert result.code == 0, result
    folder = tmp_path / "run"
    running = launched(start, start_group, processes, *args, "--output", folder)
    while not (saved := sorted((folder / "checkpoints").glob("step-*"))) or int(saved[-1].name[5:]) < 3:
        assert all(p.alive for p in running), [p.wait() for p in running]
        time.sleep(0.002)
    running[-1].kill()
    assert {p.wait().code for p in running} <= {-signal.SIGKILL, 2}
    assert not (folder / "metrics.jsonl").exists()  # it was in the first epoch
    if processes == 1:
        refused(*args, "--output", folder, "--workers", "0", words=("--workers was 1 and is now 0",))
        hostile = shutil.copytree(folder, tmp_path / "hostile")
        for checkpoint in (hostile / "checkpoints").glob("step-*"):
            send_elsewhere(checkpoint)
        refused(
            *args, "--output", hostile, words=("position.safetensors does not fit this run", "no place in a stream")
        )
    running = launched(start, start_group, processes, *args, "--output", folder)
    for result in [p.wait() for p in running]:
        assert result.code == 0, result
    assert "going on from" in running[0].out()
    assert rows(folder) == rows(tmp_path / "whole")
    one, other = (load_file(f / "last" / "model.safetensors") for f in (folder, tmp_path / "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("processes", [1, 2])
def test_told_to_stop_while_it_measures(start, start_group, write_shards, tmp_path, processes):
    """It does not wait for the end of a long validation: exit code 75, everything saved, nothing measured yet."""
    data, folder = write_shards(train=[8], validation=[60, 61]), tmp_path / "run"
    args = ("finetune", "--data", data, *ARGS, "--batch-size", "2", "--workers", "0", "--epochs", "1")
    running = launched(start, start_group, processes, *args, "--output", folder, "--resume", "auto")
    steps = 4 // processes
    while not (folder / "checkpoints" / f"step-{steps:08}").exists():  # of the epoch's last step
        assert all(p.alive for p in running), [p.wait() for p in running]
        time.sleep(0.002)
    for process in running:
        process.kill(signal.SIGTERM)
    assert {p.wait().code for p in running} == {75}
    assert not (folder / "metrics.jsonl").exists()
    running = launched(start, start_group, processes, *args, "--output", folder, "--resume", "auto")
    assert {p.wait().code for p in running} == {0}
    assert [(row["step"], row["val_images"]) for row in rows(folder)] == [(steps, 121)]


def test_a_row_without_a_label(refused, tmp_path):
    kind = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in range(12)]
    part = datasets.Dataset.from_dict({"image": images, "label": [0, 1, None] * 4}, features=kind)
    part.to_parquet(tmp_path / "data" / "train-0.parquet")
    part.select([0, 1]).to_parquet(tmp_path / "data" / "validation-0.parquet")
    refused(
        *("finetune", "--data", tmp_path / "data", *ARGS, "--batch-size", "2", "--output", tmp_path / "run"),
        words=("column 'label' holds None", "remove"),
    )


def test_a_share_too_small_for_a_batch(refused, write_shards, tmp_path):
    data = write_shards(train=[8], validation=[4])
    refused("finetune", "--data", data, *ARGS, "--output", tmp_path / "run", words=("no batch of 32", "--batch-size"))


def test_tar_files(run, refused, write_shards, tmp_path):
    """Classes and counts come from headers and labels alone, once; a run on them is evaluated as any other."""
    folder = write_shards(train=[9, 6], validation=[4], tar=True)
    shard = folder / "train-00000.tar"
    images = stream.find_stream(str(folder), None, None, "0.2")
    assert images.classes == ["0", "1", "2"]
    assert {split: len(samples) for split, samples in images.splits.items()} == {"train": 15, "val": 4}
    assert shards.labels_in([str(shard)], "cls") == {"0": 3, "1": 3, "2": 3}
    assert shards.labels_in([str(tmp_path / "elsewhere.tar")], "cls") is None
    whole = images_of_run(dict(data=str(folder)))
    assert [len(whole.splits[split]) for split in ("train", "val")] == [15, 4] and whole.classes == images.classes
    assert np.asarray(read_image(whole.splits["train"].source(3)))[0, 0, 0] == 3
    result = run(
        "finetune", "--data", folder, *ARGS, "--batch-size", "4", "--epochs", "1", "--output", tmp_path / "run"
    )
    assert result.code == 0 and "15 images to train on, 4 to validate, 3 classes" in result.out, result
    broken = bytearray(shard.read_bytes())
    at = broken.index(b"\x89PNG", broken.index(b"000004.png"))
    broken[at : at + 8] = bytes(8)
    shard.write_bytes(broken)
    args = ("finetune", "--data", folder, *ARGS, "--batch-size", "4", "--epochs", "1", "--skip-bad-images")
    result = run(*args, "--output", tmp_path / "less", "--workers", "1")
    assert result.code == 0 and 'cannot be read: "000004.png";' in result.out, result
    shard.write_bytes(shard.read_bytes()[:700])
    refused("finetune", "--data", folder, *ARGS, "--output", tmp_path / "other", words=("train-00000.tar",))
