"""The digits loader against scikit-learn's own array."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.data import digits
from experiments.data.checking import check_data
from experiments.data.pools import PURPOSES


def test_every_example_is_the_row_of_the_source_that_its_id_names():
    source = load_digits()
    splits = digits.load(0)
    check_data(splits)
    assert [splits.pools[name].arrays["label"].size for name in PURPOSES] == [897, 200, 200, 500]
    for name in PURPOSES:
        part = splits.pools[name].arrays
        np.testing.assert_array_equal(part["image"][..., 0] * np.float32(16), source.images[part["example_id"]])
        np.testing.assert_array_equal(part["true_label"], source.target[part["example_id"]])
        assert part["image"].dtype == np.float32
        assert part["image"].shape[1:] == (8, 8, 1)
    label = splits.columns["label"]
    assert label.names == tuple("0123456789")
    assert label.size == 10


def test_only_training_labels_are_corrupted_and_at_the_rate_asked():
    splits = digits.load(0, noise=0.4)
    assert np.count_nonzero(splits.pools["train"].arrays["corrupted"]) == round(0.4 * 897)
    assert not any(splits.pools[name].arrays["corrupted"].any() for name in PURPOSES[1:])
    assert not digits.load(0, noise=0.0).pools["train"].arrays["corrupted"].any()
    redrawn = digits.load(0, noise=0.4, noise_kind="redraw").pools["train"].arrays["corrupted"]
    assert abs(redrawn.mean() - 0.36) < 5 * np.sqrt(0.36 * 0.64 / 897)


def test_the_seed_decides_all_and_the_noise_does_not_move_the_split():
    first, again, other = digits.load(3), digits.load(3), digits.load(4)
    clean = digits.load(3, noise=0.0)
    for name in PURPOSES:
        for key, value in first.pools[name].arrays.items():
            np.testing.assert_array_equal(value, again.pools[name].arrays[key])
        np.testing.assert_array_equal(first.pools[name].arrays["example_id"], clean.pools[name].arrays["example_id"])
        assert set(first.pools[name].arrays["example_id"]) != set(other.pools[name].arrays["example_id"])


def test_sizes_are_passed_on():
    splits = digits.load(0, train_size=50, dev_size=10, validation_size=0.1, test_size=20)
    assert [splits.pools[name].arrays["label"].size for name in PURPOSES] == [50, 10, 180, 20]
    with pytest.raises(ValueError, match=r"sizes exceed the data"):
        digits.load(0, test_size=1_500)
    with pytest.raises(ValueError, match=r"rate must be a share"):
        digits.load(0, noise=40)
