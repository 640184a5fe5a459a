"""Images of any kind, data sets of any layout, seeded augmentation, unreadable files."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_cbam2  # noqa: F401
from timm_cbam2.data import headers
from timm_cbam2.data.folders import Paths
from timm_cbam2.data.formats import open_image
from timm_cbam2.data.loading import ImageDataset, build_transform, data_config, make_loader
from timm_cbam2.data.reading import read_image
from timm_cbam2.data.sources import find_images
from timm_cbam2.errors import UserError

GRADIENT = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))  # (64, 64)


@pytest.fixture(scope="module")
def config():
    return data_config(timm.create_model("resnet20"), 16)


def test_every_kind_of_file_reads_as_the_same_picture(tmp_path):
    grey = Image.fromarray(GRADIENT)
    deep = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
    kinds = {
        "grey.png": grey,
        "rgb.png": grey.convert("RGB"),
        "palette.png": grey.convert("P"),
        "rgba.png": grey.convert("RGBA"),
        "grey_alpha.png": grey.convert("LA"),
        "deep.png": deep,
        "deep.tif": deep,
        "int.tif": Image.fromarray(GRADIENT.astype(np.int32)),
        "float.tif": Image.fromarray(GRADIENT.astype(np.float32) / 255),
        "cmyk.tif": grey.convert("RGB").convert("CMYK"),
        "moving.gif": grey,
    }
    for name, image in kinds.items():
        extra = dict(save_all=True, append_images=[Image.new("L", (64, 64))]) if name.endswith("gif") else {}
        image.save(tmp_path / name, **extra)
        read = read_image(tmp_path / name)
        assert (read.mode, read.size) == ("RGB", (64, 64)), name
        assert np.abs(np.asarray(read)[..., 0].astype(int) - GRADIENT).max() <= 1, name
        assert read_image(tmp_path / name, "L").mode == "L"


def test_transparency_is_white_and_orientation_is_applied(tmp_path):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert read_image(clear).getpixel((0, 0)) == (255, 255, 255)
    wide = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 40)


def test_augmentation_is_a_function_of_seed_epoch_and_index(write_folder, tmp_path, config):
    samples = find_images(str(write_folder(tmp_path / "d"))).splits["all"]

    def epochs(workers, seed=0):
        dataset = ImageDataset(samples, config, "standard", seed)
        loader = make_loader(dataset, 5, workers)
        out = []
        for epoch in (1, 2):
            dataset.set_epoch(epoch)
            out.append(torch.cat([images for images, _, _ in loader]))
        return out

    alone, helped, other = epochs(0), epochs(2), epochs(0, seed=1)
    assert torch.equal(alone[0], helped[0]) and torch.equal(alone[1], helped[1])
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], other[0])


def test_augmentation_leaves_the_generators_alone(write_folder, tmp_path, config):
    dataset = ImageDataset(find_images(str(write_folder(tmp_path / "d"))).splits["all"], config, "standard")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    dataset[0]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_split_is_stratified_and_the_same_every_time(write_folder, tmp_path):
    folder = str(write_folder(tmp_path / "d", count=10))
    one, two = find_images(folder).with_val(0.3), find_images(folder).with_val(0.3)
    assert one.splits["val"].items == two.splits["val"].items
    assert not set(one.splits["val"].items) & set(one.splits["train"].items)
    assert [one.splits["val"].labels.count(c) for c in range(3)] == [3, 3, 3]
    assert len(one.splits["train"]) == 21


def test_folders_with_splits(write_folder, tmp_path):
    write_folder(tmp_path / "a" / "train")
    write_folder(tmp_path / "a" / "validation", count=4, start=20)
    images = find_images(str(tmp_path / "a")).with_val(0.2)
    assert images.classes == ["digit0", "digit1", "digit2"]
    assert {split: len(samples) for split, samples in images.splits.items()} == {"train": 36, "val": 12}
    write_folder(tmp_path / "b" / "train")
    write_folder(tmp_path / "b" / "test", count=4, start=20)
    images = find_images(str(tmp_path / "b")).with_val(0.25)
    assert {split: len(samples) for split, samples in images.splits.items()} == {"train": 27, "val": 9, "test": 12}


def test_tables(digits, tmp_path):
    datasets = pytest.importorskip("datasets")
    pixels, labels = digits
    chosen = [i for i in range(60) if labels[i] < 3]
    columns = {"image": [Image.fromarray(pixels[i]) for i in chosen], "label": [f"n{labels[i]}" for i in chosen]}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "digits.parquet")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    table.to_parquet(tmp_path / "folder" / "validation-00000-of-00001.parquet")
    typed = table.class_encode_column("label")
    typed.save_to_disk(tmp_path / "saved")
    for name, splits in (("digits.parquet", {"all"}), ("folder", {"train", "val"}), ("saved", {"all"})):
        images = find_images(str(tmp_path / name))
        assert images.classes == ["n0", "n1", "n2"] and images.splits.keys() == splits, name
        samples = next(iter(images.splits.values()))
        assert samples.labels == [int(labels[i]) for i in chosen]
        assert np.array_equal(np.asarray(read_image(samples.source(4), "L")), pixels[chosen[4]])
    half = find_images(str(tmp_path / "saved")).with_val(0.5).splits["val"]
    assert read_image(half.source(0)).size == (8, 8) and len(half) == half.labels.__len__()
    two = table.add_column("labels", [0] * len(table))
    two.to_parquet(tmp_path / "two.parquet")
    with pytest.raises(UserError, match="--label-column, one of label, labels"):
        find_images(str(tmp_path / "two.parquet"))
    assert find_images(str(tmp_path / "two.parquet"), label_column="label").classes == ["n0", "n1", "n2"]
    with pytest.raises(UserError, match="--image-column x: .* has the columns image, label"):
        find_images(str(tmp_path / "digits.parquet"), image_column="x")


def test_a_bad_image_is_named_or_left_out(write_folder, truncate, tmp_path, config):
    folder = write_folder(tmp_path / "d", count=4)
    bad = truncate(folder / "digit1" / "000.jpg")
    samples = find_images(str(folder)).splits["all"]
    where = samples.items.index(str(bad))
    strict = ImageDataset(samples, config)
    strict.check_headers()  # the header is whole
    with pytest.raises(UserError, match="digit1/000.jpg as an image .*--skip-bad-images"):
        strict[where]
    with pytest.raises(UserError, match="digit1/000.jpg"):
        list(make_loader(strict, 4, 1))

    lenient = ImageDataset(samples, config, skip_bad=True)
    labels = torch.cat([labels for _, labels, _ in make_loader(lenient, 4, 1)])
    assert labels[where] == -1 and (labels >= 0).sum() == len(samples) - 1
    assert lenient.bad.nonzero().flatten().tolist() == [where]  # seen by the worker, known here

    trained = ImageDataset(samples, config, "light", skip_bad=True)
    image, label, index = trained[where]
    assert index == where + 1 and label == samples.labels[where + 1] and image.abs().sum() > 0

    (folder / "digit2" / "003.png").write_bytes(b"")
    samples = find_images(str(folder)).splits["all"]
    with pytest.raises(UserError, match="digit2/003.png"):
        ImageDataset(samples, config).check_headers()
    lenient = ImageDataset(samples, config, skip_bad=True)
    lenient.check_headers()
    assert lenient.bad.sum() == 1


def test_preprocessing_comes_from_the_model():
    model = timm.create_model("test_resnet_cbam2")
    config = data_config(model)
    assert config["input_size"] == tuple(model.pretrained_cfg["input_size"])
    assert config["mean"] == model.pretrained_cfg["mean"]
    assert data_config(model, 64)["input_size"] == (3, 64, 64)
    grey = data_config(timm.create_model("resnet20", in_chans=1))
    assert grey["input_size"] == (1, 32, 32) and len(grey["mean"]) == len(grey["std"]) == 1
    with pytest.raises(UserError, match="--img-size 4"):
        data_config(model, 4)


@pytest.mark.parametrize("ending", [".jfif", ".avif", ".JPE", ".webp", ".tga", ".jp2", ".ico", ".qoi", ".apng"])
def test_whatever_pillow_reads_is_an_image(tmp_path, ending):
    """Under any name of its format; what it cannot read alone stays out, even under an image's name."""
    Image.init()
    if ending.lower() not in Image.registered_extensions():
        pytest.skip(f"this Pillow was built without {ending}")
    kind = Image.registered_extensions()[ending.lower()]
    for name in ("cat", "dog"):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.fromarray(GRADIENT).convert("RGB").save(tmp_path / "d" / name / f"1{ending}", kind)
        (tmp_path / "d" / name / "talk.mpg").write_bytes(b"\x00\x00\x01\xb3" + bytes(60))
    images = find_images(str(tmp_path / "d"))
    assert images.splits["all"].labels == [0, 1] and images.notes[0].startswith("2 files that are not images")
    assert read_image(images.splits["all"].source(1)).size == (64, 64)
    ImageDataset(images.splits["all"], data_config(timm.create_model("resnet20"), 16)).check_headers()


def test_nothing_is_run_to_read_an_image(tmp_path):
    """A PostScript file is a program for Ghostscript, whatever it is called."""
    Image.new("RGB", (8, 8)).save(tmp_path / "program.eps")
    (tmp_path / "program.eps").rename(tmp_path / "picture.jpg")
    with Image.open(tmp_path / "picture.jpg") as found:
        assert found.format == "EPS"  # by its content
    with pytest.raises(OSError, match="cannot identify"):
        read_image(tmp_path / "picture.jpg")


def test_of_many_files_a_sample_is_opened_once(write_folder, tmp_path, config, monkeypatch):
    monkeypatch.setattr(headers, "SAMPLE", 6)
    monkeypatch.setattr(headers, "_place", lambda samples, place=headers._place: tmp_path / place(samples).name)
    opened = []
    monkeypatch.setattr(headers, "open_image", lambda path: opened.append(path) or open_image(path))
    folder = write_folder(tmp_path / "d", count=10)
    samples = find_images(str(folder)).splits["all"]
    ImageDataset(samples, config).check_headers()
    assert len(opened) == 6 and {Path(path).parent.name for path in opened} == {"digit0", "digit1", "digit2"}
    ImageDataset(samples, config).check_headers()
    assert len(opened) == 6  # remembered
    (folder / "digit0" / "010.png").write_bytes(b"")  # another listing
    samples = find_images(str(folder)).splits["all"]
    lenient = ImageDataset(samples, config, "light", skip_bad=True)
    lenient.check_headers()
    assert len(opened) == 12 and not lenient.bad.any()  # not in the sample
    where = list(samples.items).index(str(folder / "digit0" / "010.png"))
    assert lenient[where][2] == where + 1 and lenient.bad.nonzero().tolist() == [[where]]  # met, and another stands in
    with pytest.raises(UserError, match="digit0/010.png"):
        ImageDataset(samples, config)[where]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    (folder / "digit0" / "010.png").unlink()
    (folder / "digit1" / "010.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of 6 images can be read"):
        ImageDataset(find_images(str(folder)).splits["all"], config, skip_bad=True).check_headers()


def test_names_are_kept_as_bytes(tmp_path):
    names = ["a/cat/1.jpg", "a/cat/ü.png", "a/dog/3.jpg", os.fsdecode(b"a/dog/\xff.jpg")]
    paths = Paths.of(iter(names))
    assert paths == names and paths[-1] == names[-1] and paths[1:3] == names[1:3] and paths.index(names[2]) == 2
    assert list(paths.select([3, 0])) == [names[3], names[0]] and paths.select([]) == []
    assert list(paths.relative()) == [os.path.relpath(name, "a") for name in names]
    assert list(paths.select([0, 1]).relative()) == ["1.jpg", "ü.png"] and list(paths[:1].relative()) == ["."]


def test_padded_moves_and_mirrors_and_resamples_nothing(config):
    """By up to an eighth, 2 of 16 pixels; a picture of another shape is made to cover the size, and keeps its shape."""
    pixels = np.random.default_rng(0).integers(1, 256, (16, 16, 3), dtype=np.uint8)
    wide = np.pad(pixels, ((2, 2), (2, 2), (0, 0)))
    crops = [wide[y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    allowed = {np.ascontiguousarray(c).tobytes() for crop in crops for c in (crop, crop[:, ::-1])}
    transform = build_transform(config, "padded")
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    seen = set()
    for _ in range(60):
        image = (transform(Image.fromarray(pixels)) * std + mean) * 255
        seen.add(image.round().byte().permute(1, 2, 0).numpy().tobytes())
    assert seen <= allowed and len(seen) > 20
    # 96 wide: squeezed into 16 they would be grey.
    stripes = np.tile(np.repeat(np.array([0, 255], np.uint8), 6), (32, 8))
    image = transform(Image.fromarray(stripes).convert("RGB")) * std + mean
    assert image.shape == (3, 16, 16)
    for row in image[0, 4:12]:
        assert ((row < 0.2).sum() >= 4) and ((row > 0.8).sum() >= 4)
