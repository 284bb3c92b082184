"""Labelled examples as four described pools, and every refusal by its message."""

import numpy as np
import pytest

from experiments.data import digits, pools
from experiments.data.examples import four_pools, make_examples
from experiments.data.pools import PURPOSES


def small(num_classes=3, classes=("a", "b", "c"), num_sub_classes=0, **changes):
    """Twelve valid float images in four pools of three; `changes` are {pool: {key: array}}."""
    image = np.linspace(0.0, 1.0, 12 * 4, dtype=np.float32).reshape(12, 2, 2, 1)
    label = np.arange(12, dtype=np.int32) % 3
    parts = {
        name: make_examples(image[3 * k : 3 * k + 3].copy(), label[3 * k : 3 * k + 3], np.arange(3 * k, 3 * k + 3))
        for k, name in enumerate(PURPOSES)
    }
    for name, arrays in changes.items():
        parts[name] |= arrays
    about = {"num_classes": num_classes, "classes": classes, "num_sub_classes": num_sub_classes}
    return four_pools(parts, source="made by a test", **about)


def test_digits_with_noise_say_what_a_model_needs():
    data = digits.load(0, noise=0.3)
    found = pools.shapes(data)
    assert (found.inputs, found.num_classes, found.num_train) == ((8, 8, 1), 10, 897)
    assert set(pools.visible(data, "train")) == {"image", "label"}


def test_make_examples_marks_what_differs():
    examples = make_examples(np.zeros((3, 1, 1, 1), np.uint8), [0, 1, 2], [5, 6, 7], label=[0, 2, 2])
    np.testing.assert_array_equal(examples["corrupted"], [False, True, False])
    assert {key: str(value.dtype) for key, value in examples.items()} == {
        "image": "uint8",
        "label": "int32",
        "true_label": "int32",
        "corrupted": "bool",
        "example_id": "int32",
    }


def test_corrupted_training_labels_pass():
    label = np.array([1, 1, 2], np.int32)
    data = small(train={"label": label, "corrupted": np.array([True, False, False])})
    assert data.pools["train"].arrays["label"] is label


def poisoned(*values):
    image = np.zeros((3, 2, 2, 1), np.float32)
    for position, value in enumerate(values):
        image[position + 1, 0, 1, 0] = value
    return {"image": image}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dev": {"example_id": np.array([2, 4, 5], np.int32)}}, "train and dev share 1 examples.* example_id 2"),
        ({"test": {"example_id": np.array([7, 9, 6], np.int32)}}, "validation and test share 2 .* example_id 6"),
        ({"dev": {"example_id": np.array([3, 3, 5], np.int32)}}, "dev holds 1 repeated example_id"),
        ({"dev": poisoned(np.nan)}, r"dev\['image'\] has NaN or infinite values in 1 of 3 examples.* example_id 4"),
        ({"test": poisoned(np.inf, -np.inf)}, r"test\['image'\] has NaN .* in 2 of 3 .* example_id 10"),
        ({"test": {"label": np.array([0, 3, 2], np.int32)}}, r"test\['label'\] is outside \[0, 3\) in 1 of 3 .* 10"),
        ({"train": {"true_label": np.array([0, 1, -1], np.int32)}}, r"train\['true_label'\] is outside \[0, 3\)"),
        (
            {"dev": {"image": np.zeros((3, 2, 3, 1), np.float32)}},
            r"\(2, 2, 1\) in train and float32 \(2, 3, 1\) in dev",
        ),
        ({"dev": {"image": np.zeros((3, 2, 2, 1), np.uint8)}}, "float32 .* in train and uint8 .* in dev"),
        ({"dev": {"image": np.zeros((3, 2, 2, 1))}}, "to be uint8 or float32 .* got float64"),
        ({"dev": {"label": np.array([0, 1], np.int32)}}, "arrays of one length in pool 'dev'"),
        ({"dev": {"label": np.array([0, 1, 2])}}, r"dev\['label'\] to be int32 .* got int64"),
        ({"train": {"corrupted": np.array([True, False, False])}}, "is not label != true_label in 1 of 3"),
        ({"dev": {"label": np.array([1, 1, 2], np.int32), "corrupted": np.array([1, 0, 0], bool)}}, "only train may"),
        ({"dev": {"more": np.zeros(3)}}, "the array 'more' of pool 'dev'"),
        ({"classes": ("a", "b")}, "expected 3 names for column 'label'.* got 2"),
    ],
)
def test_broken_examples_are_refused(changes, message):
    with pytest.raises(ValueError, match=r"check_data: .*" + message):
        small(**changes)


def with_labels(**changes):
    """Pools with two auxiliary tasks, and a hidden label in train; `changes` as above."""
    parts = {}
    for name, pool in small().pools.items():
        shown = np.array([True, name != "train", True])
        image, label, ids = (pool.arrays[key] for key in ("image", "label", "example_id"))
        parts[name] = make_examples(image[:, :, 0, 0], label % 2, ids, labelled=shown, key="features")
        parts[name] |= {"auxiliary": np.ones((3, 2), np.int32)} | changes.get(name, {})
    tasks = ("primary", "first", "second")
    return four_pools(parts, num_classes=2, classes=("no", "yes"), source="made by a test", tasks=tasks)


def test_features_several_labels_and_hidden_ones_are_examples():
    data = with_labels()
    train = data.pools["train"].arrays
    assert train["label"].tolist() == [0, 0, 0]
    assert train["true_label"].tolist() == [0, 1, 0]
    assert not train["corrupted"].any()
    joined = pools.with_dev(data).pools["train"].arrays
    assert joined["labelled"].tolist() == [True, False, True, True, True, True]


HIDDEN = {"labelled": np.zeros(3, bool), "label": np.zeros(3, np.int32)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dev": {"auxiliary": np.ones((3, 1), np.int32)}}, r"dev\['auxiliary'\] to be \[n, 2\], as it has names"),
        ({"dev": {"auxiliary": np.ones((3, 2), np.int8)}}, r"dev\['auxiliary'\] to be bool or int32 .* got int8"),
        ({"test": {"auxiliary": np.full((3, 2), 2, np.int32)}}, r"test\['auxiliary'\] is neither 0 nor 1 in 3 of 3"),
        ({"train": {"labelled": np.ones(3, np.int32)}}, r"train\['labelled'\] to be bool"),
        ({"train": {"label": np.ones(3, np.int32)}}, r"train\['label'\] is not 0 where masked in 1 of 3"),
        ({"train": {"labelled": np.zeros(3, bool)}}, "no train pool has an example with 'label'"),
        ({"validation": HIDDEN}, "validation lacks 'label' in 3 of 3"),
        ({"dev": {"features": np.full((3, 2), np.nan, np.float32)}}, r"dev\['features'\] has NaN .* in 3 of 3"),
    ],
)
def test_broken_labels_are_refused(changes, message):
    with pytest.raises(ValueError, match=r"check_data: .*" + message):
        with_labels(**changes)


def with_sub_labels(num_sub_classes=2, **changes):
    """Pools whose classes have two sub-classes; `changes` as above."""
    parts = {name: {"sub_label": np.array([0, 1, 1], np.int32)} | changes.get(name, {}) for name in PURPOSES}
    return small(num_sub_classes=num_sub_classes, **parts)


def test_sub_classes_lie_in_their_range():
    assert with_sub_labels().columns["sub_label"].size == 2
    with pytest.raises(ValueError, match=r"test\['sub_label'\] is outside \[0, 2\) in 1 of 3 .* example_id 10"):
        with_sub_labels(test={"sub_label": np.array([0, -1, 1], np.int32)})
    with pytest.raises(ValueError, match="size >= 1 for column 'sub_label'"):
        with_sub_labels(num_sub_classes=0)
