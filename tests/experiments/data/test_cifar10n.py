"""People's labels for CIFAR-10: the right label at every image in both forms, only in train, and every refusal."""

import pickle

import jax
import numpy as np
import pytest

from experiments.data import cifar10, cifar10n
from experiments.data.checking import check_data
from experiments.data.pools import PURPOSES
from tests.helpers.cifar_files import CIFAR10_TRAIN as NUM_TRAIN
from tests.helpers.cifar_files import cifar10 as official
from tests.helpers.cifar_files import write_cifar10_archive as write_archive
from tests.helpers.cifar_files import write_cifar10_records as prepare
from tests.helpers.commands import call, read

SIZES = {"dev_size": 20, "validation_size": 30}


def people():
    """Labels as the official file has them, [120] each: three people, their majority, and a wrong one if there is."""
    rng = np.random.default_rng(1)
    clean = official()["train"][1].astype(np.int64)
    shift = rng.integers(1, 10, (3, NUM_TRAIN)) * (rng.random((3, NUM_TRAIN)) < 0.2)
    three = (clean + shift) % 10
    found = {f"random_label{k + 1}": three[k] for k in range(3)}
    found["aggre_label"] = np.where(three[1] == three[2], three[1], three[0])
    wrong = three != clean
    found["worse_label"] = np.where(wrong.any(axis=0), three[wrong.argmax(axis=0), np.arange(NUM_TRAIN)], clean)
    return {"clean_label": clean, **found}


def write_subset(folder, **changes):
    """The labels of the archive's rows, without the clean ones."""
    arrays = {key: label.astype(np.uint8) for key, label in people().items() if key != "clean_label"}
    arrays |= {"orig_train_index": np.random.default_rng(2).permutation(50_000)[:NUM_TRAIN].astype(np.int32)}
    np.savez(folder / cifar10n.SUBSET_NAME, **{k: v for k, v in (arrays | changes).items() if v is not None})


def write_official(folder, **changes):
    """One dict in an object array, pickled by NumPy."""
    content = {key: label for key, label in (people() | changes).items() if label is not None}
    np.save(folder / cifar10n.OFFICIAL_NAME, content, allow_pickle=True)
    return folder / cifar10n.OFFICIAL_NAME


@pytest.fixture
def archive(tmp_path):
    """A folder with images and labels."""
    write_subset(tmp_path)
    return write_archive(tmp_path / "cifar10_exact.npz")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS root; its labels are each test's own."""
    return prepare(tmp_path_factory.mktemp("tfds"))


@pytest.fixture
def root(prepared):
    """The same root, cleared of labels afterwards."""
    folder = prepared.parent.parent
    yield folder
    for name in ("CIFAR-10_human.npy", "CIFAR-10_human.npz"):
        for place in (folder, prepared):
            (place / name).unlink(missing_ok=True)


@pytest.mark.parametrize("kind", cifar10n.KINDS)
def test_every_image_has_its_label_and_both_forms_agree(archive, root, kind):
    import tensorflow_datasets as tfds

    write_official(root)
    first = cifar10n.load(0, data_dir=archive, kind=kind, **SIZES)
    second = cifar10n.load(0, data_dir=root, kind=kind, **SIZES)
    clean = cifar10.load(0, data_dir=archive, **SIZES)
    check_data(first)
    label = people()[cifar10n.KINDS[kind]][first.pools["train"].arrays["example_id"]]
    train = first.pools["train"].arrays
    np.testing.assert_array_equal(train["label"], label)
    np.testing.assert_array_equal(train["corrupted"], label != clean.pools["train"].arrays["label"])
    assert 0 < train["corrupted"].sum() < 60
    for name in PURPOSES:
        for key, value in first.pools[name].arrays.items():
            np.testing.assert_array_equal(value, second.pools[name].arrays[key])
            if name != "train" or key not in ("label", "corrupted"):
                np.testing.assert_array_equal(value, clean.pools[name].arrays[key])
    assert f"CIFAR-10N, {kind}" in first.source
    assert cifar10n.OFFICIAL_NAME in second.source
    # The records do not lie in the order of the ids, or this test would prove nothing.
    records = tfds.builder_from_directory(root / "cifar10" / "3.0.2").as_data_source(split="train")
    ids = [record["id"] for record in records]
    assert ids != sorted(ids)


def test_sizes_are_passed_on_and_the_labels_do_not_depend_on_the_seed(archive):
    found = {}
    for seed in (0, 1, 2):
        splits = cifar10n.load(seed, data_dir=archive, train_size=40, test_size=20, **SIZES)
        assert [splits.pools[name].arrays["label"].size for name in PURPOSES] == [40, 20, 30, 20]
        for place, label in zip(
            splits.pools["train"].arrays["example_id"], splits.pools["train"].arrays["label"], strict=True
        ):
            assert found.setdefault(place, label) == label


def test_the_places_the_labels_may_lie_in(root, prepared, monkeypatch):
    expected = cifar10n.load(0, data_dir=write_official(root).parent, **SIZES)
    (root / cifar10n.OFFICIAL_NAME).rename(prepared / cifar10n.OFFICIAL_NAME)
    monkeypatch.chdir(prepared)
    for place in (root, prepared, "."):
        splits = cifar10n.load(0, data_dir=place, **SIZES)
        np.testing.assert_array_equal(splits.pools["train"].arrays["label"], expected.pools["train"].arrays["label"])


def test_an_npz_of_the_official_arrays(root):
    np.savez(root / "CIFAR-10_human.npz", **people())
    splits = cifar10n.load(0, data_dir=root, kind="aggregate", **SIZES)
    np.testing.assert_array_equal(
        splits.pools["train"].arrays["label"], people()["aggre_label"][splits.pools["train"].arrays["example_id"]]
    )


def test_files_of_older_numpy_versions(root):
    """Their pickles name modules that NumPy 2 has moved, and protocol 3 writes these names as plain text."""
    array = np.array(people(), dtype=object)
    with (root / cifar10n.OFFICIAL_NAME).open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
        stream.write(pickle.dumps(array, protocol=3).replace(b"numpy._core.", b"numpy.core."))
    splits = cifar10n.load(0, data_dir=root, **SIZES)
    np.testing.assert_array_equal(
        splits.pools["train"].arrays["label"], people()["worse_label"][splits.pools["train"].arrays["example_id"]]
    )


class Trap:
    """Pickled, it is a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("key", ["worse_label", "another"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(root, tmp_path, key):
    write_official(root, **{key: Trap(tmp_path / "it ran")})
    with pytest.raises(ValueError, match=r"asks for _?io\.open.*if you trust it, convert it: .*np.savez"):
        cifar10n.load(0, data_dir=root, **SIZES)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("kept", [0, 5, 100, 1_000, 4_000])
def test_truncated_pickles(root, kept):
    path = write_official(root)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"CIFAR-10_human.npy \({kept} bytes\) cannot be read as a pickled dict"):
        cifar10n.load(0, data_dir=root, **SIZES)


def test_arrays_that_are_no_pickled_dict(root):
    np.save(root / cifar10n.OFFICIAL_NAME, people()["worse_label"])
    with pytest.raises(ValueError, match=r"it holds a int64 array of shape \(120,\), expected one pickled dict"):
        cifar10n.load(0, data_dir=root, **SIZES)
    np.save(root / cifar10n.OFFICIAL_NAME, np.array(7, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"cannot be read as a pickled dict of arrays \(TypeError"):
        cifar10n.load(0, data_dir=root, **SIZES)


@pytest.mark.parametrize("kind", ["worst", "aggre_label", "clean", "", None, 3, ["worse"]])
def test_unknown_kinds(kind):
    with pytest.raises(
        ValueError, match=r"cifar10n.load: kind must be one of aggregate, worse, random1, random2, random3, got"
    ):
        cifar10n.load(0, data_dir="nowhere", kind=kind)


def test_a_slip_of_the_pen_is_answered_with_the_name_meant():
    with pytest.raises(ValueError, match=r"got 'worst'. Did you mean 'worse'"):
        cifar10n.load(0, kind="worst")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"worse_label": None}, r"human.npy lacks \['worse_label'\]; it has \['aggre_label', 'clean_label'"),
        ({"worse_label": np.full(NUM_TRAIN, 10)}, r"worse_label in .*human.npy must lie in \[0, 10\), got 10 to 10"),
        ({"worse_label": np.zeros(NUM_TRAIN)}, r"must be integers \(120,\), got float64 \(120,\)"),
        ({"worse_label": np.zeros(119, int)}, r"must be integers \(120,\), got int64 \(119,\)"),
        ({key: label[:70] for key, label in people().items()}, r"has 70 labels, but there is a training image 119"),
        (
            {key: np.roll(label, 1) for key, label in people().items()},
            r"another order: clean_label differs from the images' labels in .*not CIFAR-10_human_ordered.npy",
        ),
    ],
)
def test_unsuitable_official_files(root, changes, message):
    write_official(root, **changes)
    with pytest.raises(ValueError, match=message):
        cifar10n.load(0, data_dir=root, **SIZES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"worse_label": None}, r"cifar10n_for_subset.npz lacks the arrays \['worse_label'\]"),
        ({"worse_label": np.zeros(119, np.uint8)}, "has 119 labels and .* 120 training images: they do not belong"),
        ({"worse_label": np.full(NUM_TRAIN, 10)}, r"worse_label in .* must lie in \[0, 10\)"),
        (
            {"worse_label": (people()["clean_label"] + 1) % 10},
            r"another order: 100.0% are wrong. Fetch the labels and the archive again",
        ),
    ],
)
def test_unsuitable_labels_of_the_archive(archive, changes, message):
    write_subset(archive.parent, **changes)
    with pytest.raises(ValueError, match=message):
        cifar10n.load(0, data_dir=archive, **SIZES)


def test_a_truncated_npz_names_the_published_digest(archive):
    path = archive.parent / cifar10n.SUBSET_NAME
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=f"500 bytes, expected 105205; .*expected {cifar10n.SUBSET_SHA256}"):
        cifar10n.load(0, data_dir=archive)


def test_missing_labels_say_where_they_are_from(archive, root):
    (archive.parent / cifar10n.SUBSET_NAME).unlink()
    write_official(archive.parent)
    with pytest.raises(FileNotFoundError, match=r"there is no .*subset.npz.*goes with the images of tensorflow-data"):
        cifar10n.load(0, data_dir=archive)
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10_human.npy .*nor CIFAR-10_human.npz.*UCSC-REAL/cifar-10"):
        cifar10n.load(0, data_dir=root)
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere"):
        cifar10n.load(0, data_dir="nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["equal", "jtds"])
def test_a_short_run_of_the_config(archive, tmp_path, method):
    changes = {"steps": 4, "inner_steps": 2, "log_every": 2, "batch_size": 8, "outer_batch_size": 8, "channels": 4}
    changes |= {"train_size": 0, "validation_size": 30, "dev_size": 20, "noise_kind": "random2"}
    arguments = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    out = tmp_path / "out"
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        command = ["run", "cifar10n", "--method", method, "--data-dir", archive, "--out", out, *arguments]
        assert call(*command) == 0
    result, log = read(out)
    assert [line["step"] for line in log] == [2, 4]
    assert ("corrupted_auroc" in result) == (method == "jtds")  # equal weights tell nothing
    with np.load(out / "weights.npz") as saved:
        wrong = people()["random_label2"] != people()["clean_label"]
        np.testing.assert_array_equal(saved["corrupted"], wrong[saved["example_id"]])
        assert saved["corrupted"].shape == (70,)
