"""The CIFAR-10 loader on small files in both published forms, and on damaged ones."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from experiments.data import cifar10
from experiments.data.checking import check_data
from experiments.data.pools import PURPOSES
from tests.helpers.cifar_files import CIFAR10_CLASSES as CLASSES
from tests.helpers.cifar_files import CIFAR10_TEST as NUM_TEST
from tests.helpers.cifar_files import CIFAR10_TRAIN as NUM_TRAIN
from tests.helpers.cifar_files import cifar10 as official
from tests.helpers.cifar_files import encode
from tests.helpers.cifar_files import write_cifar10_archive as write_archive
from tests.helpers.cifar_files import write_cifar10_records as prepare

SIZES = {"dev_size": 20, "validation_size": 30}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def copy(prepared, tmp_path):
    """A version directory to damage."""
    return shutil.copytree(prepared, tmp_path / "3.0.2")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("npz") / "cifar10_exact.npz")


def assert_official(splits):
    """Every example is the official one that its id names."""
    arrays = official()
    image = np.concatenate([arrays["train"][0], arrays["test"][0]])
    label = np.concatenate([arrays["train"][1], arrays["test"][1]])
    for name in PURPOSES:
        part = splits.pools[name].arrays
        np.testing.assert_array_equal(part["image"], image[part["example_id"]])
        np.testing.assert_array_equal(part["true_label"], label[part["example_id"]])
        assert ((part["example_id"] >= NUM_TRAIN) == (name == "test")).all()


def test_encode_and_decode_are_inverse():
    image = official()["train"][0]
    np.testing.assert_array_equal(cifar10.decode(encode(image)), image)


def test_both_forms_give_the_same_splits(archive, prepared):
    first = cifar10.load(0, data_dir=archive, noise=0.4, **SIZES)
    second = cifar10.load(0, data_dir=prepared, noise=0.4, **SIZES)
    assert_official(first)
    check_data(second)
    assert [first.pools[name].arrays["label"].size for name in PURPOSES] == [70, 20, 30, 40]
    assert np.count_nonzero(first.pools["train"].arrays["corrupted"]) == 28
    assert first.columns["label"].names == second.columns["label"].names == CLASSES
    assert first.pools["train"].arrays["image"].dtype == np.uint8
    for name in PURPOSES:
        for key, value in first.pools[name].arrays.items():
            np.testing.assert_array_equal(value, second.pools[name].arrays[key])
    assert "cifar10_exact.npz" in first.source
    assert "cifar10/3.0.2" in second.source


def test_the_places_data_dir_may_name(archive, prepared, monkeypatch):
    for place in (archive, archive.parent, prepared, prepared.parent, prepared.parent.parent, str(archive)):
        assert_official(cifar10.load(1, data_dir=place, **SIZES))
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared.parent.parent))
    assert_official(cifar10.load(1, **SIZES))


def test_the_newest_version_is_read(copy):
    shutil.copytree(copy, copy.parent / "3.0.10")
    shutil.rmtree(copy.parent / "3.0.2")
    shutil.copytree(copy.parent / "3.0.10", copy.parent / "3.0.9")
    shutil.copytree(copy.parent / "3.0.10", copy.parent / "incomplete.X_9.0.0")
    for version in ("3.0.9", "3.0.10"):
        path = copy.parent / version / "dataset_info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    assert "cifar10/3.0.10" in cifar10.load(0, data_dir=copy.parent, **SIZES).source


def test_records_without_ids_are_numbered_as_they_come(tmp_path):
    splits = cifar10.load(0, data_dir=prepare(tmp_path, with_ids=False), **SIZES)
    ids = np.concatenate([splits.pools[name].arrays["example_id"] for name in PURPOSES])
    np.testing.assert_array_equal(np.sort(ids), np.arange(NUM_TRAIN + NUM_TEST))


def test_the_test_set_does_not_depend_on_the_seed(archive):
    for size in (None, 20):
        first = cifar10.load(0, data_dir=archive, test_size=size, **SIZES)
        other = cifar10.load(1, data_dir=archive, test_size=size, **SIZES)
        np.testing.assert_array_equal(
            first.pools["test"].arrays["example_id"], other.pools["test"].arrays["example_id"]
        )
        assert set(first.pools["dev"].arrays["example_id"]) != set(other.pools["dev"].arrays["example_id"])
    np.testing.assert_array_equal(np.bincount(first.pools["test"].arrays["label"]), np.full(10, 2))


OFFLINE = """
import socket, sys, warnings
warnings.simplefilter("error")

def refuse(*args, **kwargs):
    raise AssertionError("network access")

socket.getaddrinfo = socket.socket.connect = refuse
from experiments.data import cifar10
assert not {"tensorflow_datasets", "sklearn", "jax"} & set(sys.modules)
splits = cifar10.load(0, data_dir=sys.argv[1], dev_size=20, validation_size=30)
assert splits.pools["train"].arrays["image"].shape == (70, 32, 32, 3)
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
print("done")
"""


def test_reading_needs_neither_tensorflow_nor_the_network(prepared):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", OFFLINE, str(prepared)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_missing_place_says_how_to_get_the_data(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no .*nowhere.*file_format='array_record'.*cifar10_exact.npz"
    ):
        cifar10.load(0, data_dir=tmp_path / "nowhere")
    (tmp_path / "mnist").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither a prepared cifar10 .* it has \['mnist'\]"):
        cifar10.load(0, data_dir=tmp_path)


def test_two_forms_in_one_place_are_refused(copy, archive):
    shutil.copy(archive, copy.parent)
    with pytest.raises(ValueError, match=r"holds both"):
        cifar10.load(0, data_dir=copy.parent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None, "other": np.zeros(1)}, r"lacks the arrays \['y_test'\]; it has .*'other'"),
        ({"classes": np.array(CLASSES[:9])}, "has 9 classes, expected 10"),
        ({"r_test": np.zeros((40, 3, 16, 16), np.uint8)}, r"r_test .* got uint8 \(40, 3, 16, 16\)"),
        ({"r_train": np.zeros((120, 3, 32, 32), np.int16)}, "r_train .* got int16"),
        ({"y_test": np.zeros(39, np.uint8)}, r"y_test .* must be integers \(40,\), one per image, got uint8 \(39,\)"),
        ({"y_train": np.full(120, 11, np.uint8)}, r"labels must lie in \[0, 10\), got 11 to 11"),
        ({"y_test": np.full(40, 11, np.uint8)}, r"test\['label'\] is outside \[0, 10\)"),
    ],
)
def test_unsuitable_archives(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        cifar10.load(0, data_dir=write_archive(tmp_path / "x.npz", **changes), **SIZES)


def test_a_truncated_archive_names_the_published_digest(archive, tmp_path):
    path = tmp_path / "cifar10_exact.npz"
    path.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(ValueError, match=f"50000 bytes, expected 52307332; .*expected {cifar10.NPZ_SHA256}; fetch"):
        cifar10.load(0, data_dir=path)


def records_of(directory):
    return next(directory.glob("*train.array_record*"))


@pytest.mark.parametrize("kept", [0, 1_000, 100_000])
def test_truncated_records(copy, kept):
    os.truncate(records_of(copy), kept)
    with pytest.raises(ValueError, match=r"3.0.2 .*truncated or corrupt .*prepare it again"):
        cifar10.load(0, data_dir=copy)


def test_damaged_records_and_descriptions(copy):
    intact = records_of(copy).read_bytes()
    records_of(copy).write_bytes(intact[:150_000] + bytes(50) + intact[150_050:])
    with pytest.raises(ValueError, match=r"truncated or corrupt .*hash mismatch"):
        cifar10.load(0, data_dir=copy)
    records_of(copy).unlink()
    with pytest.raises(ValueError, match=r"truncated or corrupt .*No such file"):
        cifar10.load(0, data_dir=copy)
    (copy / "dataset_info.json").write_text('{"fileFormat": "arr')
    with pytest.raises(ValueError, match=r"truncated or corrupt .*ParseError"):
        cifar10.load(0, data_dir=copy)


def test_another_file_format_is_refused(copy):
    path = copy / "dataset_info.json"
    path.write_text(path.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match=r"prepared as tfrecord.*once more as array_record"):
        cifar10.load(0, data_dir=copy)


def test_another_data_set_is_refused(copy, tmp_path):
    with pytest.raises(ValueError, match=r"has 12 classes, expected 10"):
        cifar10.load(0, data_dir=prepare(tmp_path / "other", names=(*CLASSES, "bus", "van")))
    path = copy / "dataset_info.json"
    path.write_text(path.read_text().replace('"name": "test"', '"name": "extra"'))
    with pytest.raises(ValueError, match=r"not CIFAR-10: .* 'label'\] and splits \['extra', 'train'\]"):
        cifar10.load(0, data_dir=copy)
