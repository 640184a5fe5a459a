"""The tasks that are made on the spot: seeded, of drawings that the other split lacks, with the object's box."""

import numpy as np
import pytest

from timm_cbam2.data.sources import find_images
from timm_cbam2.data.tasks import TASKS, _digits, _Pen, make


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_function_of_its_seed(task):
    first = make(task, "train", 40)
    make.cache_clear()
    again, other, val = make(task, "train", 40), make(task, "train", 40, seed=1), make(task, "val", 40)
    assert np.array_equal(first.images, again.images) and np.array_equal(first.boxes, again.boxes)
    assert not np.array_equal(first.images, other.images) and not np.array_equal(first.images, val.images)
    assert first.images.shape == (40, 32, 32) and first.images.dtype == np.uint8
    assert make(task, "train", 4, side=48).images.shape == (4, 48, 48)
    top, left, bottom, right = first.boxes.T
    assert (0 <= top).all() and (top < bottom).all() and (bottom <= 32).all() and (right <= 32).all()
    assert (right - left == bottom - top).all() and len(set(first.labels)) > 5
    if task == "position":
        assert (right <= 16).all()
    else:
        assert set(make(task, "train", 200).factors) == set(range(4 if task == "light" else 3))


def test_the_box_holds_what_differs_from_the_background():
    """With nothing else drawn, all that stands out lies in the box."""
    pen = _Pen("val", 32, np.random.default_rng(0))
    for _ in range(20):
        canvas = np.full((32, 32), 120, np.float32)
        label, (top, left, bottom, right) = pen.digit(canvas, 15)
        away = canvas != 120
        assert away[top:bottom, left:right].sum() > 20
        away[top:bottom, left:right] = False
        assert not away.any() and label in range(10)


def test_no_drawing_is_in_both_splits():
    shapes, _ = _digits()
    train, val = (_Pen(split, 32, np.random.default_rng(0)).shapes for split in ("train", "val"))
    assert len(train) + len(val) == len(shapes) and len(val) == 500
    assert not {a.tobytes() for a in train} & {a.tobytes() for a in val}


def test_a_mistaken_name():
    with pytest.raises(ValueError, match="no task 'clutte'.*clutter, crowd, scale, light, position"):
        make("clutte", "train", 4)
    with pytest.raises(ValueError, match="train or val"):
        make("clutter", "test", 4)


def test_clutter_is_data_for_training():
    images = find_images("clutter")
    assert images.classes == [str(n) for n in range(10)] and len(images.splits["train"]) == 8000
    assert len(images.splits["val"]) == 2000 and images.splits["val"].source(0).size == (32, 32)
    assert images.with_val(0.2) is images and images.augment == "light"
