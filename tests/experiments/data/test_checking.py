"""The checks of data: what is accepted, and every refusal by its message."""

import re

import numpy as np
import pytest

from experiments.data.checking import check_data
from experiments.data.pools import PURPOSES, Column, Data, Pool

COLUMNS = {
    "views": Column("input", "real"),
    "fields": Column("input", "integer", size=50),
    "label": Column("target", "class", size=3, names=("a", "b", "c")),
    "true_label": Column("truth", "class", size=3, of="label"),
    "corrupted": Column("truth", "binary", of="true_label"),
    "score": Column("target", "real"),
    "attributes": Column("target", "binary", names=("hat", "beard")),
    "seen": Column("mask", "binary", of="attributes"),
    "scene": Column("group", "integer"),
    "example_id": Column("id", "integer"),
}


def arrays(start):
    label = np.arange(3, dtype=np.int32)
    return {
        "views": np.ones((3, 2, 2, 4, 4, 3), np.float32),
        "fields": np.full((3, 5), 49, np.int32),
        "label": label,
        "true_label": label.copy(),
        "corrupted": np.zeros(3, bool),
        "score": np.array([1.5, -2.0, 0.0], np.float32),
        "attributes": np.array([[1, 0], [0, 1], [1, 0]], np.int32),
        "seen": np.array([[1, 1], [1, 1], [1, 0]], bool),
        "scene": np.full(3, start // 3, np.int32),
        "example_id": np.arange(start, start + 3, dtype=np.int32),
    }


def small(**changes):
    """Valid data of every role and kind; `changes` are {pool: {column: array}}."""
    named = {name: Pool(name, arrays(3 * k) | changes.get(name, {})) for k, name in enumerate(PURPOSES)}
    return Data(named, dict(COLUMNS), "label", "made here")


def test_rank_six_inputs_real_targets_integer_fields_and_missing_attributes_are_accepted():
    check_data(small())


def test_unlabelled_pools_and_several_tests_are_accepted():
    data = small()
    unlabelled = Pool("train", {"views": arrays(0)["views"], "example_id": np.arange(20, 23, dtype=np.int32)})
    second = Pool("test", arrays(30))
    check_data(data._replace(pools=data.pools | {"unlabelled": unlabelled, "sketch": second}))


def broken(key, row, value):
    found = arrays(3)[key].copy()
    found[row] = value
    return found


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        (
            "views",
            broken("views", (1, 0, 1, 2, 3, 0), np.nan),
            "dev['views'] has NaN or infinite values in 1 of 3 examples, the first with example_id 4",
        ),
        ("score", broken("score", 2, np.inf), "dev['score'] has NaN"),
        ("fields", broken("fields", (0, 1), 50), "dev['fields'] is outside [0, 50)"),
        ("label", broken("label", 0, 3), "dev['label'] is outside [0, 3)"),
        ("label", broken("label", 0, 2), "dev has corrupted 'label' in 1 of 3 examples"),
        ("attributes", broken("attributes", (0, 1), 2), "is neither 0 nor 1"),
        (
            "attributes",
            broken("attributes", (2, 1), 1),
            "is not 0 where masked in 1 of 3 examples, the first with example_id 5",
        ),
        ("example_id", np.array([3, 3, 4], np.int32), "dev holds 1 repeated example_id"),
        ("example_id", np.array([2, 3, 4], np.int32), "train and dev share 1 examples, the first with example_id 2"),
        ("scene", np.array([1, 1, 0], np.int32), "train and dev share 1 groups, the first with scene 0"),
        ("score", np.zeros(3), "expected dev['score'] to be float32 [n, ...], got float64"),
        ("score", np.zeros(4, np.float32), "expected arrays of one length in pool 'dev'"),
        ("views", np.ones((3, 2), np.float32), "'views' is float32 (2, 2, 4, 4, 3) in train and float32 (2,) in dev"),
        ("seen", np.ones((3, 3), bool), "to have the shape (3, 2) of 'attributes'"),
        ("attributes", np.zeros((3, 4), np.int32), "to be [n, 2], as it has names"),
        ("scores", np.zeros(3, np.float32), "got 'scores'; did you mean 'score'?"),
    ],
)
def test_a_broken_array_is_refused_by_name(key, array, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_data(small(dev={key: array}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": Column("targt", "real")}, "got 'targt'; did you mean 'target'?"),
        ({"score": Column("target", "reel")}, "got 'reel'; did you mean 'real'?"),
        ({"seen": Column("mask", "binary", of="attribute")}, "did you mean 'attributes'?"),
        ({"label": Column("target", "class", names=("a",))}, "expected size >= 1 for column 'label'"),
        ({"label": Column("target", "class", size=3, names=("a",))}, "expected 3 names for column 'label'"),
    ],
)
def test_a_mistyped_column_is_refused(change, message):
    data = small()
    with pytest.raises(ValueError, match=re.escape(message)):
        check_data(data._replace(columns=data.columns | change))


def test_a_mistyped_purpose_and_a_missing_one_are_refused():
    data = small()
    wrong = data.pools["test"]._replace(purpose="tests")
    with pytest.raises(ValueError, match="got 'tests'; did you mean 'test'"):
        check_data(data._replace(pools=data.pools | {"test": wrong}))
    with pytest.raises(ValueError, match="at least one pool for dev"):
        check_data(data._replace(pools={name: pool for name, pool in data.pools.items() if name != "dev"}))


def test_only_train_may_have_corrupted_labels():
    flags = np.array([True, False, False])
    label = np.array([1, 1, 2], np.int32)
    check_data(small(train={"label": label, "corrupted": flags}))
    with pytest.raises(ValueError, match=re.escape("train['corrupted'] is not label != true_label in 1 of 3")):
        check_data(small(train={"label": label}))
    with pytest.raises(ValueError, match="test has corrupted 'label' in 1 of 3 examples, the first with example_id 9"):
        check_data(small(test={"label": label, "corrupted": flags}))
