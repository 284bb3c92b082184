"""The loader of several labels per example: both published forms, what is hidden, and damaged or other files."""

import shutil

import numpy as np
import pytest

from experiments.data import yeast
from experiments.data.checking import check_data
from experiments.data.pools import PURPOSES
from tests.helpers.yeast_files import CLASSES, NUM_TRAIN, arff, official, write_arff

SIZES = {"dev_size": 20, "validation_size": 30, "labelled": 0.2}


def write_archive(path, **changes):
    """The same as an npz; returns its path."""
    arrays = {f"yeast_{kind}_{name}": part[kind == "y"] for name, part in official().items() for kind in "xy"}
    arrays |= changes
    np.savez_compressed(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_arff(tmp_path_factory.mktemp("arff") / "yeast")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("npz") / yeast.NPZ_NAME)


def test_every_example_is_the_official_one_that_its_id_names(folder):
    splits = yeast.load(0, data_dir=folder, **SIZES)
    check_data(splits)
    assert [splits.pools[name].arrays["label"].size for name in PURPOSES] == [70, 20, 30, 40]
    parts = official()
    features, labels = (np.concatenate([parts["train"][kind], parts["test"][kind]]) for kind in (0, 1))
    train = features[splits.pools["train"].arrays["example_id"]]
    deviation = train.std(axis=0)
    deviation[5] = 1.0
    for name in PURPOSES:
        part = splits.pools[name].arrays
        ids = part["example_id"]
        np.testing.assert_allclose(
            part["features"], (features[ids] - train.mean(axis=0)) / deviation, rtol=1e-5, atol=1e-6
        )
        np.testing.assert_array_equal(part["true_label"], labels[ids, 3])
        np.testing.assert_array_equal(part["auxiliary"], np.delete(labels[ids], 3, axis=1))
        assert part["features"].dtype == np.float32
        assert ((ids >= NUM_TRAIN) == (name == "test")).all()
    assert splits.tasks == ("Class4", *CLASSES[:3], *CLASSES[4:])
    assert splits.columns["label"].size == 2


def test_features_are_standardised_by_train_alone(folder):
    splits = yeast.load(0, data_dir=folder, **SIZES)
    varied = np.delete(splits.pools["train"].arrays["features"], 5, axis=1)
    np.testing.assert_allclose(varied.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(varied.std(axis=0), 1.0, rtol=1e-4)
    np.testing.assert_allclose(splits.pools["train"].arrays["features"][:, 5], 0.0, atol=1e-6)
    assert np.abs(splits.pools["test"].arrays["features"].mean(axis=0)).max() > 0.1


def test_most_primary_labels_of_train_are_hidden_and_nothing_else(folder):
    splits = yeast.load(0, data_dir=folder, **SIZES)
    train = splits.pools["train"].arrays
    assert train["labelled"].sum() == round(0.2 * 70)
    seen = train["label"][train["labelled"]]
    assert abs(seen.mean() - train["true_label"].mean()) < 1 / 14  # both kinds keep their shares
    assert not train["label"][~train["labelled"]].any()
    assert train["true_label"][~train["labelled"]].any()
    assert not train["corrupted"].any()
    for name in PURPOSES[1:]:
        part = splits.pools[name].arrays
        assert part["labelled"].all()
        np.testing.assert_array_equal(part["label"], part["true_label"])
    assert yeast.load(0, data_dir=folder, **SIZES | {"labelled": 1.0}).pools["train"].arrays["labelled"].all()


def test_both_forms_and_all_places_give_the_same_splits(folder, archive):
    first = yeast.load(3, data_dir=folder, **SIZES)
    places = folder.parent, str(folder), folder / "yeast-test.arff", archive, archive.parent
    for place in places:
        other = yeast.load(3, data_dir=place, **SIZES)
        assert other.tasks == first.tasks
        for name in PURPOSES:
            for key, value in first.pools[name].arrays.items():
                np.testing.assert_array_equal(value, other.pools[name].arrays[key], err_msg=key)
    assert "yeast-train.arff" in first.source
    assert yeast.NPZ_NAME in other.source


def test_the_seed_decides_all_but_the_test_set(archive):
    first, again, other = (yeast.load(seed, data_dir=archive, **SIZES) for seed in (0, 0, 1))
    for name in PURPOSES:
        for key, value in first.pools[name].arrays.items():
            np.testing.assert_array_equal(value, again.pools[name].arrays[key])
    np.testing.assert_array_equal(first.pools["test"].arrays["example_id"], other.pools["test"].arrays["example_id"])
    assert set(first.pools["dev"].arrays["example_id"]) != set(other.pools["dev"].arrays["example_id"])
    shown = [
        set(splits.pools["train"].arrays["example_id"][splits.pools["train"].arrays["labelled"]])
        for splits in (first, other)
    ]
    assert shown[0] != shown[1]


def test_the_share_that_is_labelled_moves_no_split(archive):
    first, other = (yeast.load(0, data_dir=archive, **SIZES | {"labelled": share}) for share in (0.1, 0.5))
    for name in PURPOSES:
        np.testing.assert_array_equal(first.pools[name].arrays["example_id"], other.pools[name].arrays["example_id"])


def test_the_primary_label_by_name_and_by_number(archive):
    named, numbered = (yeast.load(0, data_dir=archive, primary=name, **SIZES) for name in ("Class2", "2"))
    assert named.tasks == numbered.tasks == ("Class2", "Class1", *CLASSES[2:])
    np.testing.assert_array_equal(named.pools["test"].arrays["label"], official()["test"][1][:, 1])
    for unknown in ("Klass4", "0", "15"):
        with pytest.raises(ValueError, match=r"is not a label\..* Labels: Class1, .*Class14, or 1 to 14"):
            yeast.load(0, data_dir=archive, primary=unknown, **SIZES)
    with pytest.raises(ValueError, match=r"Did you mean Class4"):
        yeast.load(0, data_dir=archive, primary="Klass4", **SIZES)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_impossible_shares(archive, share):
    with pytest.raises(ValueError, match=r"labelled must be a share in \(0, 1\]"):
        yeast.load(0, data_dir=archive, **SIZES | {"labelled": share})


def test_too_few_labels_or_a_label_that_all_examples_have(archive, tmp_path):
    with pytest.raises(ValueError, match=r"what is labelled of train has . examples with Class4 of 1; both"):
        yeast.load(0, data_dir=archive, **SIZES | {"labelled": 0.02})
    with pytest.raises(ValueError, match=r"validation has 0 examples with Class4 of 0; both"):
        yeast.load(0, data_dir=archive, **SIZES | {"validation_size": 0})
    for part in ("train", "test"):
        labels = official()[part][1].copy()
        labels[:, 3] = 1
        path = write_archive(tmp_path / f"{part}.npz", **{f"yeast_y_{part}": labels})
        with pytest.raises(ValueError, match=f"the official {part}.* part has .* with Class4"):
            yeast.load(0, data_dir=path, **SIZES)


def test_missing_files_say_how_to_get_them(copy, archive, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data_dir was given \(--data-dir\)\. Get the data"):
        yeast.load(0, data_dir=None)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere.*yeast-train.arff and yeast-test.arff"):
        yeast.load(0, data_dir=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "letter.txt").write_text("Dear")
    with pytest.raises(FileNotFoundError, match=r"has neither .* it has \['letter.txt'\]"):
        yeast.load(0, data_dir=tmp_path / "empty")
    shutil.copy(archive, copy)
    with pytest.raises(ValueError, match=r"holds both .*; pass one of the two"):
        yeast.load(0, data_dir=copy)
    (copy / archive.name).unlink()
    (copy / "yeast-test.arff").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*yeast-test.arff; both official parts are needed"):
        yeast.load(0, data_dir=copy)


def test_a_truncated_file_is_one_error(copy):
    """Cut anywhere: in the header, between, in a line. Cut behind a line it is a smaller file of the same kind."""
    path = copy / "yeast-train.arff"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    start = whole.index("@data")
    cuts = [0, 10, start // 2, start, start + 6, start + 40, len(whole) - 20, len(whole) - 2]
    cuts += [len("".join(lines[:-3])) + 700]
    for cut in cuts:
        path.write_text(whole[:cut])
        with pytest.raises(ValueError, match=r"truncated or corrupt, or no ARFF file|yeast has 103 numeric ones"):
            yeast.load(0, data_dir=copy, **SIZES)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\x01", b"<html>404</html>", b"@relation x\n@attribute a string\n@data\n"]
)
def test_what_is_no_arff_file(copy, content):
    (copy / "yeast-test.arff").write_bytes(content)
    with pytest.raises(ValueError, match=r"yeast-test.arff .*truncated or corrupt, or no ARFF file"):
        yeast.load(0, data_dir=copy)


def test_other_arff_files(copy):
    path = copy / "yeast-test.arff"
    features, labels = official()["test"]
    path.write_text(arff(features[:, :50], labels))
    with pytest.raises(ValueError, match=r"has 40 examples, 50 numeric and 14 nominal attributes; yeast has 103"):
        yeast.load(0, data_dir=copy)
    path.write_text(arff(features, labels, names=[f"Kind{number}" for number in range(14)]))
    with pytest.raises(ValueError, match=r"has the labels \('Class1', .* in one file"):
        yeast.load(0, data_dir=copy)
    whole = arff(features, labels)
    path.write_text(whole.replace("{0,1}", "{0,1,2}").replace(",1\n", ",2\n"))
    with pytest.raises(ValueError, match=r"a label is neither 0 nor 1"):
        yeast.load(0, data_dir=copy)
    head, _, body = whole.partition("@data\n")
    path.write_text(head + "@data\n" + "?" + body[body.index(",") :])
    with pytest.raises(ValueError, match=r"test\['features'\] has NaN or infinite values in 1 of 40 examples"):
        yeast.load(0, data_dir=copy, **SIZES)
    path.write_text(head + "@data\n{0 0.5, 103 1}\n{2 0.5}\n")
    with pytest.raises(ValueError, match=r"yeast-test.arff is a sparse ARFF file"):
        yeast.load(0, data_dir=copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"yeast_y_test": None}, r"lacks the arrays \['yeast_y_test'\]"),
        (
            {"yeast_x_test": np.zeros((40, 102), np.float32)},
            r"features must be floating \[n, 103\], got float32 \(40, 102\)",
        ),
        ({"yeast_x_test": np.zeros((40, 103), np.int32)}, r"features must be floating .* got int32"),
        ({"yeast_y_test": np.zeros((39, 14), np.uint8)}, r"labels must be integers \(40, 14\), got uint8 \(39, 14\)"),
        ({"yeast_y_test": np.full((40, 14), 2, np.uint8)}, r"a label is neither 0 nor 1"),
    ],
)
def test_unsuitable_archives(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        yeast.load(0, data_dir=write_archive(tmp_path / "x.npz", **changes), **SIZES)


def test_a_truncated_archive_names_the_published_digest(archive, tmp_path):
    path = tmp_path / yeast.NPZ_NAME
    path.write_bytes(archive.read_bytes()[:9000])
    with pytest.raises(ValueError, match=f"9000 bytes, expected 3454800; .*expected {yeast.NPZ_SHA256}; fetch"):
        yeast.load(0, data_dir=path)
