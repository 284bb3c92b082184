"""The image form of the tasks of known worth, on small files in the layout of CIFAR-10."""

import numpy as np
import pytest

from experiments.data import cifar10, known_worth, pools
from experiments.data import known_worth_cifar10 as data
from tests.helpers.cifar_files import CIFAR10_TRAIN, write_cifar10_archive

SMALL = {"times": 1, "pool_size": 20, "test_size": 20}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_cifar10_archive(tmp_path_factory.mktemp("npz") / "cifar10_small.npz")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(data, "VALIDATION", 10)


def load(archive, seed=0, **changes):
    return data.load(seed, data_dir=archive, variant="dev_1", **{**SMALL, **changes})


def test_pools_are_cut_from_the_official_splits(archive):
    found = load(archive)
    counts = {name: pools.count(pool) for name, pool in found.pools.items()}
    assert counts == {"labelled": 50, "pool": 20, "dev": 10, "validation": 10, "test": 20}
    ids = {name: pool.arrays["example_id"] for name, pool in found.pools.items()}
    assert np.unique(np.concatenate(list(ids.values()))).size == 110
    assert all((at < CIFAR10_TRAIN).all() == (name != "test") for name, at in ids.items())
    assert "label" not in found.pools["pool"].arrays
    assert [name.rsplit("_", 1)[0] for name in found.tasks[1:]] == np.repeat(known_worth.GROUPS, 4).tolist()
    assert pools.checksum(found) == pools.checksum(load(archive))
    assert pools.checksum(found) != pools.checksum(load(archive, seed=1))


def test_images_are_means_over_squares(archive):
    whole, half = load(archive, side=32), load(archive, side=16)
    image = whole.pools["pool"].arrays["image"]
    assert -1 <= image.min() < image.max() <= 1
    means = [image[:, row::2, column::2] for row in range(2) for column in range(2)]
    np.testing.assert_allclose(half.pools["pool"].arrays["image"], np.mean(means, axis=0), atol=1e-6)
    with pytest.raises(ValueError, match="side=12: expected a divisor of 32"):
        load(archive, side=12)


def test_helpful_tasks_are_functions_of_the_class(archive):
    found = load(archive)
    source = cifar10.cifar.read(archive, cifar10.DATA_SET)
    arrays = found.pools["pool"].arrays
    label = source.train.labels["label"][arrays["example_id"]]
    for kind in np.unique(label):
        assert (np.ptp(arrays["binary"][label == kind][:, :4], axis=0) == 0).all()
