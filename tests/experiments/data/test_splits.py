"""The four-way split and its checks: coverage, stratification, determinism, and every refusal by its message."""

import numpy as np
import pytest

from experiments.data.cutting import four_way_split, stratified_subset
from experiments.data.splits import (
    NAMES,
    Splits,
    check_splits,
    input_of,
    make_examples,
    merge,
)

SIZES = {"dev_size": 20, "validation_size": 30, "test_size": 40}


def labels_of(*counts):
    """Class k counts[k] times, interleaved by a fixed shuffle."""
    return np.random.default_rng(7).permutation(np.repeat(np.arange(len(counts)), counts))


def small_splits(**changes):
    """Twelve valid float images in four splits of three; `changes` are {split: {key: array}}."""
    image = np.linspace(0.0, 1.0, 12 * 4, dtype=np.float32).reshape(12, 2, 2, 1)
    label = np.arange(12, dtype=np.int32) % 3
    parts = {
        name: make_examples(image[3 * k : 3 * k + 3].copy(), label[3 * k : 3 * k + 3], np.arange(3 * k, 3 * k + 3))
        for k, name in enumerate(NAMES)
    }
    for name, arrays in changes.items():
        parts[name] |= arrays
    return Splits(**parts, num_classes=3, classes=("a", "b", "c"), source="made by a test")


def test_parts_are_disjoint_and_cover_everything():
    labels = labels_of(50, 50, 50)
    parts = four_way_split(labels, num_classes=3, seed=0, **SIZES)
    assert [getattr(parts, name).size for name in NAMES] == [60, 20, 30, 40]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(150))


def test_train_size_limits_train_only():
    labels = labels_of(50, 50, 50)
    whole = four_way_split(labels, num_classes=3, seed=0, **SIZES)
    small = four_way_split(labels, num_classes=3, seed=0, train_size=10, **SIZES)
    assert small.train.size == 10
    for name in ("dev", "validation", "test"):
        np.testing.assert_array_equal(getattr(small, name), getattr(whole, name))


def test_equal_classes_stay_equal_and_unequal_ones_keep_their_shares():
    parts = four_way_split(labels_of(40, 40), num_classes=2, dev_size=10, validation_size=20, test_size=30, seed=1)
    for rows in parts:
        assert np.ptp(np.bincount(labels_of(40, 40)[rows])) == 0
    labels = labels_of(100, 60, 40)
    parts = four_way_split(labels, num_classes=3, dev_size=0.1, validation_size=0.2, test_size=0.3, seed=1)
    for rows, share in zip(parts, (0.4, 0.1, 0.2, 0.3), strict=True):
        np.testing.assert_array_equal(np.bincount(labels[rows]), np.round(np.array([100, 60, 40]) * share).astype(int))


def test_shares_that_do_not_divide_are_off_by_less_than_one_per_part_cut():
    labels = labels_of(37, 23, 11, 9)
    for seed in range(20):
        parts = four_way_split(labels, num_classes=4, dev_size=13, validation_size=17, test_size=19, seed=seed)
        for cut, name in enumerate(("test", "validation", "dev"), start=1):
            rows = getattr(parts, name)
            ideal = rows.size * np.array([37, 23, 11, 9]) / 80
            assert (np.abs(np.bincount(labels[rows], minlength=4) - ideal) < cut).all()


def test_ties_between_classes_are_broken_by_the_seed_and_not_by_class_order():
    labels = labels_of(*[10] * 5)
    sizes = {"dev_size": 7, "validation_size": 7, "test_size": 7}
    counts = sum(
        np.bincount(labels[four_way_split(labels, num_classes=5, seed=seed, **sizes).test]) for seed in range(200)
    )
    # Each class gets 1 + Bernoulli(2/5): mean 280, standard deviation 7.
    assert (np.abs(counts - 280) < 35).all()


def test_the_split_is_a_function_of_the_seed_and_its_order_is_mixed():
    labels = np.sort(labels_of(50, 50, 50))
    first = four_way_split(labels, num_classes=3, seed=0, **SIZES)
    again = four_way_split(labels, num_classes=3, seed=np.int64(0), **SIZES)
    other = four_way_split(labels, num_classes=3, seed=1, **SIZES)
    for name in NAMES:
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert set(getattr(first, name)) != set(getattr(other, name))
        assert (np.diff(labels[getattr(first, name)]) < 0).any()  # sorted by class in the source, not here


def test_a_part_smaller_than_the_number_of_classes_is_allowed():
    parts = four_way_split(labels_of(*[9] * 6), num_classes=6, dev_size=2, validation_size=0, test_size=0, seed=0)
    assert [rows.size for rows in parts] == [52, 2, 0, 0]


def test_stratified_subset():
    labels = labels_of(30, 20, 10)
    rows = stratified_subset(labels, 12, num_classes=3, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[rows]), [6, 4, 2])
    assert np.unique(rows).size == 12
    with pytest.raises(ValueError, match=r"size=61 exceeds the 60 examples"):
        stratified_subset(labels, 61, num_classes=3, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dev_size": 0}, "dev is empty: dev_size=0 of 150 examples.*pass dev_size >= 1, or use train as dev"),
        ({"dev_size": 0.001}, "dev is empty: dev_size=0.001"),
        ({"test_size": 130}, "sizes exceed the data: train 0, dev 20, validation 30, test 130 make 180 of 150"),
        ({"train_size": 61}, "sizes exceed the data: train 61, .* make 151 of 150"),
        ({"test_size": 100}, "train is empty"),
        ({"train_size": 0}, "train is empty"),
        ({"dev_size": -1}, "dev_size must be a count .* got -1"),
        ({"dev_size": 1.5}, "dev_size must be a count .* got 1.5"),
        ({"dev_size": float("nan")}, "dev_size must be a count .* got nan"),
        ({"dev_size": True}, "dev_size must be a count .* got True"),
        ({"validation_size": "10"}, "validation_size must be a count .* got '10'"),
        ({"num_classes": 4}, r"no example of class \[3\]"),
        ({"num_classes": 2}, r"labels must lie in \[0, 2\), got 0 to 2"),
        ({"seed": None}, "seed must be a non-negative integer, got None"),
        ({"seed": -1}, "seed must be a non-negative integer, got -1"),
        ({"seed": 0.5}, "seed must be a non-negative integer, got 0.5"),
    ],
)
def test_impossible_splits_are_refused(changes, message):
    with pytest.raises(ValueError, match=r"four_way_split: .*" + message):
        four_way_split(labels_of(50, 50, 50), **({"num_classes": 3, "seed": 0} | SIZES | changes))


def test_a_class_with_too_few_examples_is_refused():
    with pytest.raises(ValueError, match=r"class 1 has too few examples: 2 of the 102 .* none of 20"):
        four_way_split(labels_of(100, 2), num_classes=2, dev_size=20, validation_size=20, test_size=20, seed=0)


def test_labels_that_are_no_classes_are_refused():
    with pytest.raises(ValueError, match=r"labels must be integers \[n\], got float64"):
        four_way_split(np.zeros(9), num_classes=1, dev_size=1, validation_size=1, test_size=1, seed=0)


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


def test_merge_stacks_train_and_dev():
    splits = small_splits()
    both = merge(splits.train, splits.dev)
    for key, value in both.items():
        np.testing.assert_array_equal(value, np.concatenate([splits.train[key], splits.dev[key]]))
    with pytest.raises(ValueError, match=r"merge: train has the keys"):
        merge(splits.train, {"image": splits.dev["image"]})
    with pytest.raises(ValueError, match=r"merge: 'image' is float32"):
        merge(splits.train, splits.dev | {"image": np.zeros((3, 2, 2, 3), np.float32)})


def test_valid_splits_pass_with_corrupted_training_labels():
    check_splits(small_splits())
    label = np.array([1, 1, 2], np.int32)
    check_splits(small_splits(train={"label": label, "corrupted": np.array([True, False, False])}))


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
        ({"dev": poisoned(np.nan)}, "dev has NaN or infinite pixels in 1 of 3 examples, the first with example_id 4"),
        ({"test": poisoned(np.inf, -np.inf)}, "test has NaN or infinite pixels in 2 of 3 .* example_id 10"),
        (
            {"test": {"label": np.array([0, 3, 2], np.int32)}},
            r"test\['label'\] is outside \[0, 3\) in 1 of 3 examples, the first with example_id 10",
        ),
        ({"train": {"true_label": np.array([0, 1, -1], np.int32)}}, r"train\['true_label'\] is outside \[0, 3\)"),
        (
            {"dev": {"image": np.zeros((3, 2, 3, 1), np.float32)}},
            r"\(2, 2, 1\) in train and float32 \(2, 3, 1\) in dev",
        ),
        ({"dev": {"image": np.zeros((3, 2, 2, 1), np.uint8)}}, "float32 .* in train and uint8 .* in dev"),
        ({"dev": {"image": np.zeros((3, 2, 2, 1))}}, "must be uint8 or float32 .* got float64"),
        ({"dev": {"image": np.zeros((3, 2, 2), np.uint8)}}, r"must be uint8 or float32 .* got uint8 \(3, 2, 2\)"),
        ({"dev": {"label": np.array([0, 1], np.int32)}}, r"dev\['label'\] must be int32 \(3,\), .* got int32 \(2,\)"),
        ({"dev": {"label": np.array([0, 1, 2])}}, r"dev\['label'\] must be int32 \(3,\), .* got int64"),
        ({"train": {"corrupted": np.array([True, False, False])}}, "is not label != true_label in 1 of 3"),
        (
            {"dev": {"label": np.array([1, 1, 2], np.int32), "corrupted": np.array([True, False, False])}},
            "dev has corrupted labels in 1 of 3 .* example_id 3; only train may have them",
        ),
    ],
)
def test_broken_splits_are_refused(changes, message):
    with pytest.raises(ValueError, match=r"check_splits: .*" + message):
        check_splits(small_splits(**changes))


def with_labels(**changes):
    """Splits with two auxiliary tasks, and a hidden label in train; `changes` as above."""
    splits = small_splits()
    parts = {}
    for name in NAMES:
        part = getattr(splits, name)
        shown = np.array([True, name != "train", True])
        parts[name] = make_examples(
            part["image"][:, :, 0, 0], part["label"] % 2, part["example_id"], labelled=shown, key="features"
        )
        parts[name] |= {"auxiliary": np.ones((3, 2), np.int32)} | changes.get(name, {})
    return Splits(
        **parts, num_classes=2, classes=("no", "yes"), source="made by a test", tasks=("primary", "first", "second")
    )


def test_features_several_labels_and_hidden_ones_are_a_split():
    splits = with_labels()
    check_splits(splits)
    assert input_of(splits.train) is splits.train["features"]
    assert splits.train["label"].tolist() == [0, 0, 0]
    assert splits.train["true_label"].tolist() == [0, 1, 0]
    assert not splits.train["corrupted"].any()
    assert merge(splits.train, splits.dev)["labelled"].tolist() == [True, False, True, True, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dev": {"auxiliary": np.ones((3, 1), np.int32)}},
            r"dev\['auxiliary'\] must be int32 \(3, 2\), one entry per",
        ),
        ({"dev": {"auxiliary": np.ones((3, 2), np.int8)}}, r"dev\['auxiliary'\] must be int32 .* got int8"),
        ({"test": {"auxiliary": np.full((3, 2), 2, np.int32)}}, r"test\['auxiliary'\] is neither 0 nor 1 in 3 of 3"),
        ({"train": {"labelled": np.ones(3, np.int32)}}, r"train\['labelled'\] must be bool \(3,\)"),
        ({"train": {"label": np.ones(3, np.int32)}}, r"train\['label'\] is not 0 where labelled is False in 1 of 3"),
        ({"train": {"labelled": np.zeros(3, bool)}}, "train has no labelled example"),
        (
            {"validation": {"labelled": np.zeros(3, bool), "label": np.zeros(3, np.int32)}},
            "has unlabelled examples in 3",
        ),
        ({"dev": {"features": np.zeros((3, 2, 1), np.float32)}}, r"must be uint8 or float32 \[n, d\], got float32"),
        ({"dev": {"features": np.full((3, 2), np.nan, np.float32)}}, "dev has NaN or infinite features in 3 of 3"),
        ({"dev": {"more": np.zeros(3)}}, r"train has the arrays \[.*\] and dev has \[.*'more'"),
        ({"dev": {"image": np.zeros((3, 1, 1, 1), np.uint8)}}, r"dev lacks \['image or features'\]"),
    ],
)
def test_broken_labels_are_refused(changes, message):
    with pytest.raises(ValueError, match=r"check_splits: .*" + message):
        check_splits(with_labels(**changes))


def with_sub_labels(**changes):
    """Splits whose classes have two sub-classes; `changes` as above."""
    parts = {name: {"sub_label": np.array([0, 1, 1], np.int32)} | changes.get(name, {}) for name in NAMES}
    return small_splits(**parts)._replace(num_sub_classes=2)


def test_sub_classes_are_a_split():
    splits = with_sub_labels()
    check_splits(splits)
    assert merge(splits.train, splits.dev)["sub_label"].tolist() == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dev": {"sub_label": np.zeros(3)}}, r"dev\['sub_label'\] must be int32 \(3,\), .* got float64 \(3,\)"),
        ({"dev": {"sub_label": np.zeros((3, 1), np.int32)}}, r"dev\['sub_label'\] must be int32 \(3,\), .* \(3, 1\)"),
        (
            {"test": {"sub_label": np.array([0, -1, 1], np.int32)}},
            r"test\['sub_label'\] is outside \[0, 2\) in 1 of 3 examples, the first with example_id 10",
        ),
        (
            {"train": {"sub_label": np.array([0, 1, 2], np.int32)}},
            r"train\['sub_label'\] is outside \[0, 2\) in 1 of 3 .*; num_sub_classes or the labels are wrong",
        ),
    ],
)
def test_broken_sub_labels_are_refused(changes, message):
    with pytest.raises(ValueError, match=r"check_splits: .*" + message):
        check_splits(with_sub_labels(**changes))


def test_sub_labels_and_their_number_go_together():
    with pytest.raises(ValueError, match=r"train\['sub_label'\] is outside \[0, 0\) in 3 of 3"):
        check_splits(with_sub_labels()._replace(num_sub_classes=0))
    with pytest.raises(ValueError, match=r"train\['sub_label'\] must be int32 \(3,\), .* got none"):
        check_splits(small_splits()._replace(num_sub_classes=2))


def test_empty_and_incomplete_splits_are_refused():
    splits = small_splits()
    empty = {key: value[:0] for key, value in splits.validation.items()}
    with pytest.raises(ValueError, match=r"validation is empty"):
        check_splits(splits._replace(validation=empty))
    with pytest.raises(ValueError, match=r"dev lacks \['label'\]"):
        check_splits(splits._replace(dev={key: value for key, value in splits.dev.items() if key != "label"}))
    with pytest.raises(ValueError, match=r"num_classes is 3, but 2 class names came"):
        check_splits(splits._replace(classes=("a", "b")))
