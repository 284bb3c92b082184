"""Stratified splits and splits that keep groups whole: coverage, shares, determinism, refusals by their message."""

import numpy as np
import pytest

from experiments.data.cutting import SplitIndices, four_way_split, group_split, stratified_subset

GROUPS = np.random.default_rng(3).permutation(np.repeat(np.arange(20), np.arange(20) % 4 + 2))
GROUP_SIZES = {"train": 0.5, "dev": 0.2, "test": 0.2}


def test_groups_stay_whole_and_sizes_are_nearly_met():
    parts = group_split(GROUPS, GROUP_SIZES, seed=0)
    inside = [set(GROUPS[rows]) for rows in parts.values()]
    assert sum(len(groups) for groups in inside) == len(set.union(*inside))
    for name, rows in parts.items():
        assert np.unique(rows).size == rows.size == np.isin(GROUPS, GROUPS[rows]).sum()
        assert abs(rows.size - GROUP_SIZES[name] * GROUPS.size) <= 2.5


def test_the_seed_decides():
    one, same, other = (group_split(GROUPS, GROUP_SIZES, seed=seed) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in GROUP_SIZES)
    assert any(one[name].tolist() != other[name].tolist() for name in GROUP_SIZES)


def test_too_few_groups_and_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="expected at least 3 groups, one per part, got 2"):
        group_split(np.array([0, 0, 1, 1]), {"a": 1, "b": 1, "c": 1}, seed=0)
    with pytest.raises(ValueError, match="none is left for"):
        group_split(np.array([0] * 5 + [1] * 5), {"a": 9, "b": 1}, seed=0)
    with pytest.raises(ValueError, match="at most 4 examples"):
        group_split(np.array([0, 0, 1, 1]), {"a": 3, "b": 2}, seed=0)


SIZES = {"dev_size": 20, "validation_size": 30, "test_size": 40}


def labels_of(*counts):
    """Class k counts[k] times, interleaved by a fixed shuffle."""
    return np.random.default_rng(7).permutation(np.repeat(np.arange(len(counts)), counts))


def test_parts_are_disjoint_and_cover_everything():
    labels = labels_of(50, 50, 50)
    parts = four_way_split(labels, num_classes=3, seed=0, **SIZES)
    assert [getattr(parts, name).size for name in SplitIndices._fields] == [60, 20, 30, 40]
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
    for name in SplitIndices._fields:
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
