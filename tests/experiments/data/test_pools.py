"""Pools: the checksum, what training sees, merging and shapes all follow the columns."""

import numpy as np
import pytest

from experiments.data import pools
from experiments.data.pools import Column, Data, Pool
from tests.helpers.lazy_arrays import Lazy

COLUMNS = {
    "views": Column("input", "real"),
    "score": Column("target", "real"),
    "example_id": Column("id", "integer"),
}


def decoded(start, stop):
    return Lazy(np.arange(start, stop, dtype=np.float32)[:, None] * np.ones(3, np.float32))


def pool(purpose, start, count=3):
    rows = np.arange(start, start + count)
    views = np.ones((count, 2, 2, 4, 4, 3), np.float32) * rows.reshape(-1, 1, 1, 1, 1, 1).astype(np.float32)
    return Pool(purpose, {"views": views, "score": rows.astype(np.float32) / 7, "example_id": rows.astype(np.int32)})


def small():
    named = {name: pool(name, 3 * k) for k, name in enumerate(pools.PURPOSES)}
    return Data(named, COLUMNS, "score", "made here")


def test_checksum_follows_every_array_name_and_dtype():
    data = small()
    before = pools.checksum(data)
    arrays = data.pools["train"].arrays
    seen = {before}
    for change in (
        {"domain": np.zeros(3, np.int32)},
        {"domain": np.ones(3, np.int32)},
        {"area": np.ones(3, np.int32)},
        {"score": arrays["score"].astype(np.float64)},
    ):
        train = data.pools["train"]._replace(arrays=arrays | change)
        seen.add(pools.checksum(data._replace(pools=data.pools | {"train": train})))
    assert len(seen) == 5
    assert pools.checksum(data._replace(pools=dict(reversed(data.pools.items())))) == before


def test_training_does_not_see_ids():
    assert set(pools.visible(small(), "train")) == {"views", "score"}


def test_shapes_are_hashable_and_keep_the_rank():
    found = pools.shapes(small())
    assert hash(found) == hash(pools.shapes(small()))
    assert (found.inputs, found.num_train, found.num_classes) == ((2, 2, 4, 4, 3), 3, 0)


def test_dev_only_takes_the_place_of_the_train_pool_it_joins():
    data = small()
    found = pools.dev_only(data)
    assert list(found.pools) == list(data.pools)
    for key, array in found.pools[pools.joined(data, "dev")].arrays.items():
        np.testing.assert_array_equal(array, data.pools["dev"].arrays[key])


def test_with_dev_appends_dev_to_the_train_pool_it_joins():
    merged = pools.with_dev(small())
    assert merged.pools["train"].arrays["example_id"].tolist() == [0, 1, 2, 3, 4, 5]
    assert merged.pools["dev"].arrays["example_id"].tolist() == [3, 4, 5]
    two = small()
    two = two._replace(pools=two.pools | {"more": pool("train", 20)})
    with pytest.raises(ValueError, match="joins of 'dev'"):
        pools.with_dev(two)


def test_lazy_arrays_have_the_checksum_of_their_numbers_and_are_merged_unread():
    data = small()
    lazy = {
        name: p._replace(arrays=p.arrays | {"views": decoded(3 * k, 3 * k + 3)})
        for k, (name, p) in enumerate(data.pools.items())
    }
    read = {name: p._replace(arrays=p.arrays | {"views": p.arrays["views"].rows}) for name, p in lazy.items()}
    one, other = data._replace(pools=lazy), data._replace(pools=read)
    assert pools.checksum(one) == pools.checksum(other)
    views = pools.with_dev(one).pools["train"].arrays["views"]
    np.testing.assert_array_equal(views[[4, 0]][:, 0], [4.0, 0.0])
    assert pools.checksum(pools.with_dev(one)) == pools.checksum(pools.with_dev(other))
