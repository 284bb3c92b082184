"""The CIFAR-100 loader on small files in both published forms: two levels of labels, and what is no CIFAR-100."""

import shutil

import numpy as np
import pytest

from experiments.data import cifar100
from experiments.data.checking import check_data
from experiments.data.pools import PURPOSES, visible, with_dev
from tests.helpers import cifar_files

FINE = tuple(f"fine {k}" for k in range(100))
COARSE = tuple(f"coarse {k}" for k in range(20))
TABLE = np.random.default_rng(3).permutation(np.repeat(np.arange(20), 5))
NUM_TRAIN, NUM_TEST = 300, 100
SIZES = {"dev_size": 100, "validation_size": 100}


def official():
    """Random images and fine labels of the two official splits, in official order."""
    return cifar_files.random_official(NUM_TRAIN, NUM_TEST, 100)


def write_archive(path, **changes):
    tables = {"classes": np.array(FINE), "coarse_classes": np.array(COARSE), "fine_to_coarse": TABLE.astype(np.uint8)}
    return cifar_files.write_archive(path, official(), tables, changes)


def prepare(root, *, coarse_names=COARSE, coarse_of=lambda index, fine: TABLE[fine]):
    import tensorflow_datasets as tfds

    more = {
        "id": (tfds.features.Text(), lambda key, index, fine: key),
        "coarse_label": (
            tfds.features.ClassLabel(names=coarse_names),
            lambda key, index, fine: int(coarse_of(index, fine)),
        ),
    }
    return cifar_files.write_records(root, "Cifar100", official(), FINE, more)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("npz") / "cifar100_exact.npz")


def fine_of(part):
    """The fine classes, by their ids."""
    return np.concatenate([official()[name][1] for name in ("train", "test")])[part["example_id"]]


def test_both_forms_give_the_same_splits(archive, prepared):
    first = cifar100.load(0, data_dir=archive, **SIZES)
    second = cifar100.load(0, data_dir=prepared, **SIZES)
    check_data(second)
    image = np.concatenate([official()[name][0] for name in ("train", "test")])
    assert [first.pools[name].arrays["label"].size for name in PURPOSES] == [100, 100, 100, 100]
    for name in PURPOSES:
        part = first.pools[name].arrays
        np.testing.assert_array_equal(part["image"], image[part["example_id"]])
        assert ((part["example_id"] >= NUM_TRAIN) == (name == "test")).all()
        for key, value in part.items():
            np.testing.assert_array_equal(value, second.pools[name].arrays[key])
    assert first.columns["label"].names == second.columns["label"].names == COARSE
    assert [first.columns[key].size for key in ("label", "sub_label")] == [20, 5]
    assert "CIFAR-100 (Krizhevsky, 2009) from the archive cifar100_exact.npz" in first.source
    assert "cifar100/3.0.2" in second.source


def test_the_two_labels_are_the_fine_class(archive):
    """Five classes per super-class, numbered in the order of their index."""
    splits = cifar100.load(0, data_dir=archive, **SIZES)
    members = np.argsort(TABLE, kind="stable").reshape(20, 5)
    for name in PURPOSES:
        part = splits.pools[name].arrays
        np.testing.assert_array_equal(part["label"], TABLE[fine_of(part)])
        np.testing.assert_array_equal(members[part["label"], part["sub_label"]], fine_of(part))
        assert part["sub_label"].dtype == np.int32


def test_sub_labels_reach_training(archive):
    splits = cifar100.load(0, data_dir=archive, **SIZES)
    both = with_dev(splits).pools["train"].arrays
    assert set(visible(splits, "train")) == {"image", "label", "sub_label"}
    np.testing.assert_array_equal(both["sub_label"][:100], splits.pools["train"].arrays["sub_label"])


def test_parts_that_hold_every_fine_class_are_stratified_by_it(archive):
    splits = cifar100.load(0, data_dir=archive, **SIZES)
    for name in PURPOSES:
        np.testing.assert_array_equal(np.sort(fine_of(splits.pools[name].arrays)), np.arange(100))


@pytest.mark.parametrize("sizes", [{"dev_size": 20}, {"train_size": 40}, {"validation_size": 60, "train_size": 0.4}])
def test_smaller_parts_are_stratified_by_super_class(archive, sizes):
    splits = cifar100.load(0, data_dir=archive, **SIZES | sizes)
    for name in ("train", "dev", "validation"):
        assert np.ptp(np.bincount(splits.pools[name].arrays["label"], minlength=20)) == 0


def test_the_test_set_does_not_depend_on_the_seed(archive):
    for size in (None, 40):
        first = cifar100.load(0, data_dir=archive, test_size=size, **SIZES)
        other = cifar100.load(1, data_dir=archive, test_size=size, **SIZES)
        np.testing.assert_array_equal(
            first.pools["test"].arrays["example_id"], other.pools["test"].arrays["example_id"]
        )
        assert set(first.pools["dev"].arrays["example_id"]) != set(other.pools["dev"].arrays["example_id"])
    np.testing.assert_array_equal(np.bincount(first.pools["test"].arrays["label"]), np.full(20, 2))


def test_cifar_10_in_the_same_place_is_not_mistaken_for_it(archive, prepared, tmp_path, monkeypatch):
    cifar_files.write_cifar10_records(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither a prepared cifar100 .* nor cifar100_exact.npz; .*'cifar10'"):
        cifar100.load(0, data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"not CIFAR-100: .* expected image \(32, 32, 3\), label, coarse_label, and"):
        cifar100.load(0, data_dir=tmp_path / "cifar10")
    shutil.copytree(prepared, tmp_path / "cifar100" / prepared.name)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert "cifar100/3.0.2" in cifar100.load(0, **SIZES).source
    archives = tmp_path / "archives"
    archives.mkdir()
    cifar_files.write_cifar10_archive(archives / "cifar10_exact.npz")
    shutil.copy(archive, archives)
    assert cifar100.load(0, data_dir=archives, **SIZES).columns["label"].names == COARSE


def test_a_missing_place_says_how_to_get_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere.*builder\('cifar100'.*cifar100_exact.npz"):
        cifar100.load(0, data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_to_coarse": None}, r"lacks the arrays \['fine_to_coarse'\]"),
        ({"classes": np.array(FINE[:10])}, "has 10 classes, expected 100: this is not CIFAR-100"),
        ({"coarse_classes": np.array(COARSE[:19])}, "has 19 coarse_classes, expected 20: this is not CIFAR-100"),
        ({"fine_to_coarse": TABLE[:99]}, r"fine_to_coarse in .* must be integers \(100,\), .* got int64 \(99,\)"),
        ({"fine_to_coarse": TABLE / 1.0}, r"must be integers \(100,\), .* got float64 \(100,\)"),
        ({"fine_to_coarse": TABLE + 1}, r"coarse_label of train in .* must lie in \[0, 20\), got 1 to 20"),
        ({"fine_to_coarse": np.arange(100) % 19}, "100 classes, 100 pairs of .* and 0 to 6 classes in a super-class; "),
        ({"y_train": np.full(300, 100, np.uint8)}, r"label of train in .* must lie in \[0, 100\), got 100 to 100"),
        ({"y_test": np.full(100, -1, np.int8)}, r"label of test in .* must lie in \[0, 100\), got -1 to -1"),
        ({"y_train": np.zeros(300, np.uint8), "y_test": np.ones(100, np.uint8)}, "has 2 classes, 2 pairs"),
        (
            {
                **dict.fromkeys(("r_train", "r_test"), np.zeros((0, 3, 32, 32), np.uint8)),
                **dict.fromkeys(("y_train", "y_test"), np.zeros(0, np.uint8)),
            },
            "has 0 classes, 0 pairs",
        ),
    ],
)
def test_unsuitable_archives(tmp_path, changes, message):
    with pytest.raises(ValueError, match=r"cifar100.load: .*" + message):
        cifar100.load(0, data_dir=write_archive(tmp_path / "x.npz", **changes), **SIZES)


def test_records_whose_labels_are_no_hierarchy_are_refused(tmp_path):
    path = prepare(tmp_path / "first", coarse_of=lambda index, fine: TABLE[fine] if index else (TABLE[fine] + 1) % 20)
    with pytest.raises(ValueError, match=r"3.0.2 has 100 classes, 10[12] pairs of .* this is not CIFAR-100"):
        cifar100.load(0, data_dir=path, **SIZES)
    path = prepare(tmp_path / "second", coarse_names=(*COARSE, "another"))
    with pytest.raises(ValueError, match=r"has 21 coarse_classes, expected 20"):
        cifar100.load(0, data_dir=path, **SIZES)


def test_a_truncated_archive_names_the_published_digest(archive, tmp_path):
    path = tmp_path / "cifar100_exact.npz"
    path.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=f"50000 bytes, expected 52785249; .*expected {cifar100.NPZ_SHA256}; fetch"):
        cifar100.load(0, data_dir=path)
