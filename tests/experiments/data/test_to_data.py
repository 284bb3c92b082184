"""The splits of a loader as pools with columns: the same arrays, shapes and view of training."""

from experiments.contract import visible as visible_split
from experiments.data import check_data, digits, merge, pools, to_data


def test_digits_with_noise_become_valid_data():
    splits = digits.load(0, noise=0.3)
    data = to_data(splits)
    check_data(data)
    assert set(pools.visible(data, "train")) == set(visible_split(splits.train))
    found = pools.shapes(data)
    assert (found.inputs, found.num_classes, found.num_train) == ((8, 8, 1), 10, len(splits.train["label"]))
    merged, expected = pools.with_dev(data).pools["train"].arrays, merge(splits.train, splits.dev)
    assert all((merged[key] == array).all() for key, array in expected.items())
