"""What tables say of images: a file beside a folder, metadata inside it, one label or several, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from timm_cbam2.data.sources import find_images, images_of_run
from timm_cbam2.errors import UserError

ROWS = (("a", "cat|dog"), ("b", "dog"), ("sub/c", ""), ("d", "cat"))
HOT = [[1, 1], [0, 1], [0, 0], [1, 0]]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number, (name, _) in enumerate(ROWS):
        Image.fromarray(np.full((4, 4, 3), 50 * number, dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def hot(images, split="all"):
    return [row.tolist() for row in images.splits[split].labels]


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_a_file_says_what_is_in_a_flat_folder(pictures, tmp_path):
    rows = ("id,breed,note,split", "a,007,x,train", "b,010,x,train", "sub/c,007,y,val", "d,010,z,val")
    file = write(tmp_path / "l.csv", rows)
    images = find_images(str(pictures), label_column="breed", labels=file)
    assert images.classes == ["007", "010"] and not images.multi_label  # zeros in front are kept
    assert images.splits["train"].labels == [0, 1] and images.splits["val"].labels == [0, 1]
    assert images.splits["val"].items[0] == str(pictures / "sub" / "c.png")
    with pytest.raises(UserError, match="--label-column, one of breed, note"):
        find_images(str(pictures), labels=file)
    assert images_of_run(dict(data=str(pictures), labels=file, label_column="breed")).classes == ["007", "010"]

    jsonl = tmp_path / "l.jsonl"
    jsonl.write_text(
        "".join(json.dumps({"file": f"{n}.png", "tags": t.split("|") if t else []}) + "\n" for n, t in ROWS)
    )
    images = find_images(str(pictures), labels=str(jsonl))
    assert images.multi_label and images.classes == ["cat", "dog"] and hot(images) == HOT


@pytest.mark.parametrize("separator", ["|", ";", ", ", " "])
def test_several_labels_in_a_text(pictures, tmp_path, separator):
    rows = [f"{name}.png\t{tags.replace('|', separator)}" for name, tags in ROWS]
    images = find_images(str(pictures), labels=write(tmp_path / "l.tsv", ["image\ttags", *rows]), several=True)
    assert images.classes == ["cat", "dog"] and hot(images) == HOT
    held = images.with_val(0.5)
    assert held.multi_label and len(held.splits["train"]) == len(held.splits["val"]) == 2


def test_a_column_for_each_class(pictures, tmp_path):
    rows = [f"{name}.png,{dog},{cat}" for (name, _), (cat, dog) in zip(ROWS, HOT)]
    file = write(tmp_path / "l.csv", ["image,dog,cat", *rows])
    images = find_images(str(pictures), labels=file, several=True)
    assert images.classes == ["cat", "dog"] and hot(images) == HOT
    file = write(tmp_path / "l.csv", ["image,dog,cat", *rows[:-1], "d.png,0,maybe"])
    with pytest.raises(UserError, match="column 'cat' holds 'maybe'"):
        find_images(str(pictures), labels=file, several=True)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_in_an_image_folder(pictures, tmp_path, kind):
    pytest.importorskip("datasets")
    if kind == "csv":
        write(pictures / "metadata.csv", ["file_name,labels", *(f"{n}.png,{t}" for n, t in ROWS)])
    else:
        lines = [json.dumps({"file_name": f"{n}.png", "labels": t.split("|") if t else []}) for n, t in ROWS]
        write(pictures / "metadata.jsonl", lines)
    images = find_images(str(pictures), several=kind == "csv")
    assert images.multi_label and images.classes == ["cat", "dog"]
    found = {images.splits["all"].source(i)[-5:]: row for i, row in enumerate(hot(images))}
    assert found == {f"{name[-1]}.png": row for (name, _), row in zip(ROWS, HOT)}


def test_what_is_refused(pictures, tmp_path):
    def refuse(lines, words, **more):
        with pytest.raises(UserError, match=words):
            find_images(str(pictures), labels=write(tmp_path / "l.csv", lines), **more)

    refuse(["image,label", "a.png,x", "gone.png,y"], "1 of 2 images are not in .*pictures, such as gone.png")
    refuse(["image,label", "a.png,x", "a,y"], "names .*a.png more than once")
    refuse(["image,label", "a.png,x", "b.png,"], "holds '', which names no class")
    refuse(["picture,label", "a.png,x"], "--image-column, one of picture, label")
    refuse(["image,label,split", "a.png,x,later"], "'split' holds 'later'")
    refuse(["image,label,split", "a.png,x,train", "b.png,y,val"], "train split lacks the classes y")
    refuse(["image,label"], "has no rows")
    refuse(["image,label", "a.png,x,y"], "row 1 has more values than columns")
    for file, words in (("l.xls", "give a .csv"), ("none.csv", "cannot be read")):
        with pytest.raises(UserError, match=words):
            find_images(str(pictures), labels=str(tmp_path / file))
    with pytest.raises(UserError, match="--labels says what is in the images of a folder"):
        find_images("digits", labels="l.csv")
    with pytest.raises(UserError, match="--multi-label: digits tells classes by folders"):
        find_images("digits", several=True)
