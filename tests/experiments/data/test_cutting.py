"""Splits that keep groups whole."""

import numpy as np
import pytest

from experiments.data.cutting import group_split

GROUPS = np.random.default_rng(3).permutation(np.repeat(np.arange(20), np.arange(20) % 4 + 2))
SIZES = {"train": 0.5, "dev": 0.2, "test": 0.2}


def test_groups_stay_whole_and_sizes_are_nearly_met():
    parts = group_split(GROUPS, SIZES, seed=0)
    inside = [set(GROUPS[rows]) for rows in parts.values()]
    assert sum(len(groups) for groups in inside) == len(set.union(*inside))
    for name, rows in parts.items():
        assert np.unique(rows).size == rows.size == np.isin(GROUPS, GROUPS[rows]).sum()
        assert abs(rows.size - SIZES[name] * GROUPS.size) <= 2.5


def test_the_seed_decides():
    one, same, other = (group_split(GROUPS, SIZES, seed=seed) for seed in (1, 1, 2))
    assert all((one[name] == same[name]).all() for name in SIZES)
    assert any(one[name].tolist() != other[name].tolist() for name in SIZES)


def test_too_few_groups_and_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="expected at least 3 groups, one per part, got 2"):
        group_split(np.array([0, 0, 1, 1]), {"a": 1, "b": 1, "c": 1}, seed=0)
    with pytest.raises(ValueError, match="none is left for"):
        group_split(np.array([0] * 5 + [1] * 5), {"a": 9, "b": 1}, seed=0)
    with pytest.raises(ValueError, match="at most 4 examples"):
        group_split(np.array([0, 0, 1, 1]), {"a": 3, "b": 2}, seed=0)
