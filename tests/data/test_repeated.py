"""Repeated augmentation: how often an image occurs, in which process, and that a run with it can be killed."""

import time

import pytest
import timm
import torch
from accelerate.data_loader import BatchSamplerShard
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

import timm_cbam2  # noqa: F401
from timm_cbam2.data.cached import CachedImages
from timm_cbam2.data.loading import ImageDataset, data_config, make_loader
from timm_cbam2.data.repeated import RepeatedSampler
from timm_cbam2.data.sources import find_images


def test_each_copy_goes_to_another_process():
    count, repeats, batch, processes = 26, 3, 4, 3
    sampler = RepeatedSampler(count, repeats, batch, processes, seed=1)
    sampler.set_epoch(1)
    first = list(sampler)
    assert len(first) == len(set(first)) == len(sampler) == count
    images = [index % count for index in first]
    assert len(set(images)) == 9 and sorted(images.count(i) for i in set(images)) == [2] + [3] * 8
    seen = {}
    for process in range(processes):
        batches = BatchSampler(sampler, batch, drop_last=True)
        for indices in BatchSamplerShard(batches, processes, process):
            for index in indices:
                seen.setdefault(index % count, []).append((index // count, process))
    assert len(seen) == 8
    for copies in seen.values():
        assert len({copy for copy, _ in copies}) == len({process for _, process in copies}) == 3
    assert list(sampler) == first
    sampler.set_epoch(2)
    assert list(sampler) != first
    assert list(RepeatedSampler(count, repeats, batch, processes, seed=2)) != first


@pytest.mark.parametrize("kind", [ImageDataset, CachedImages])
def test_copies_are_augmented_each_in_its_own_way(write_folder, tmp_path, kind):
    samples = find_images(str(write_folder(tmp_path / "d"))).splits["all"]
    dataset = kind(samples, data_config(timm.create_model("resnet20"), 16), "mild")
    dataset.set_epoch(1)
    usual = {int(i): image for images, _, indices in make_loader(dataset, 4, 0) for i, image in zip(indices, images)}
    copies = {}
    for images, labels, indices in make_loader(dataset, 4, 0, shuffle=True, repeats=2):
        for image, label, index in zip(images, labels.tolist(), indices.tolist()):
            assert label == samples.labels[index]
            copies.setdefault(index, []).append(image)
    assert len(copies) == len(samples) // 2
    for index, (one, _) in copies.items():
        assert torch.equal(one, usual[index])  # as without copies
    assert sum(not torch.equal(one, other) for one, other in copies.values()) > len(copies) * 0.8


def test_killed_and_resumed(start, run, refused, small_run, quick, tmp_path):
    args = ("finetune", "--data", small_run[1], *quick, "--batch-size", "4", "--aug-repeats", "3", "--no-pretrained")
    args += ("--save-every", "1 step", "--augment", "standard", "--resume", "auto", "--output")
    assert run(*args, tmp_path / "whole", "--save-every", "never").code == 0
    running = start(*args, tmp_path / "run")
    while not list((tmp_path / "run" / "checkpoints").glob("step-*3")):
        assert running.alive, running.wait()
        time.sleep(0.002)
    running.kill()
    running.wait()
    result = run(*args, tmp_path / "run")
    assert result.code == 0 and "going on from" in result.out and "random weights" not in result.out, result
    one, other = (load_file(tmp_path / f / "last" / "model.safetensors") for f in ("run", "whole"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    refused("finetune", "--data", small_run[1], "--streaming", "--aug-repeats", "3", words=("--aug-repeats",))
