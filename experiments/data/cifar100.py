"""CIFAR-100: 32 x 32 colour images of 100 classes in 20 super-classes (Krizhevsky, 2009, Learning multiple layers of
features from tiny images), from a prepared TensorFlow Datasets directory or from an npz archive.

The super-class is the primary label. What a person would add as an auxiliary task is the class inside it, `sub_label`:
the five classes of a super-class are numbered in the order of their index among the 100, so that the pair (label,
sub_label) is the fine class. This is the data set of Liu, Davison and Johns (2019, Self-supervised generalisation with
meta auxiliary learning) with their human labels.

`experiments.data.cifar` describes the two forms. TFDS records have the fine class as "label" and the super-class as
"coarse_label"; the archive has the fine class in y_train and y_test, and besides `classes` the arrays `coarse_classes`
[20] and `fine_to_coarse` [100].
"""

import os

import numpy as np

from experiments.data import cifar
from experiments.data.examples import four_pools, make_examples
from experiments.data.pools import Data

NUM_CLASSES, NUM_SUB_CLASSES = 20, 5
NUM_FINE = NUM_CLASSES * NUM_SUB_CLASSES
NPZ_SHA256 = "d6b7926a452855b42475ce2c1c5a38658412ce1122966389a58421b6eccff578"

_DATA_SET = cifar.DataSet(
    name="cifar100",
    title="CIFAR-100",
    labels={"label": ("classes", NUM_FINE), "coarse_label": ("coarse_classes", NUM_CLASSES)},
    npz_name="cifar100_exact.npz",
    npz_bytes=52_785_249,
    npz_sha256=NPZ_SHA256,
    npz_keys=("fine_to_coarse",),
)


def load(
    seed: int,
    *,
    data_dir: str | os.PathLike | None = None,
    train_size: int | float | None = None,
    dev_size: int | float = 200,
    validation_size: int | float = 2_000,
    test_size: int | float | None = None,
) -> Data:
    """CIFAR-100 by super-class with the official test set; the rest cut in three.

    The cut is stratified by fine class, or by super-class if train, dev or validation has fewer examples than there
    are fine classes.

    Args:
      seed: non-negative integer that decides the cut; never the test set.
      data_dir: a TFDS root, data set or version directory; a directory with the npz archive; or the archive itself.
        None: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets.
      train_size: count, fraction of the official training split, or None for all that remains of it.
      dev_size, validation_size: counts or fractions of the official training split.
      test_size: None for the whole official test split; a count or fraction takes a stratified subset of it, the same
        one for every seed, for quick runs.

    Returns:
      `Data` with uint8 images [n, 32, 32, 3], super-classes as labels and `sub_label`.

    Raises:
      FileNotFoundError: nothing readable at `data_dir`; the message says how to get the data.
      ValueError: damaged or unsuitable files, or from `four_way_split`.
      ImportError: a TFDS directory, but no tensorflow_datasets.
    """
    source = cifar.read(data_dir, _DATA_SET)
    _check_range(source, "label")
    if source.further:
        source = _with_coarse(source)
    _check_range(source, "coarse_label")
    sub_class = _sub_classes(source)
    found = cifar.cut(
        source,
        {"label": NUM_FINE, "coarse_label": NUM_CLASSES},
        train_size=train_size,
        dev_size=dev_size,
        validation_size=validation_size,
        test_size=test_size,
        seed=seed,
    )
    parts = {
        name: make_examples(part.image, part.labels["coarse_label"], part.ids)
        | {"sub_label": sub_class[part.labels["label"]]}
        for name, part in found.items()
    }
    text = f"CIFAR-100 (Krizhevsky, 2009) from {source.text}; official test split, the rest split with seed {seed}"
    return four_pools(
        parts,
        num_classes=NUM_CLASSES,
        classes=source.classes["coarse_label"],
        source=text,
        num_sub_classes=NUM_SUB_CLASSES,
    )


def _check_range(source: cifar.Source, key: str) -> None:
    count = _DATA_SET.labels[key][1]
    for name in ("train", "test"):
        label = getattr(source, name).labels[key]
        if label.size and not (label.min() >= 0 and label.max() < count):
            raise ValueError(
                f"{_DATA_SET.where}: {key} of {name} in {source.path} must lie in [0, {count}), got {label.min()} to "
                f"{label.max()}."
            )


def _with_coarse(source: cifar.Source) -> cifar.Source:
    """The archive's splits with the labels that its table of super-classes gives."""
    table = source.further["fine_to_coarse"]
    if table.shape != (NUM_FINE,) or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(
            f"{_DATA_SET.where}: fine_to_coarse in {source.path} must be integers ({NUM_FINE},), the super-class of "
            f"every class, got {table.dtype} {table.shape}."
        )
    table = table.astype(np.int32)
    train, test = (
        part._replace(labels=part.labels | {"coarse_label": table[part.labels["label"]]})
        for part in (source.train, source.test)
    )
    return source._replace(train=train, test=test)


def _sub_classes(source: cifar.Source) -> np.ndarray:
    """The number, int32 [100], of every fine class inside its super-class, by the pairs of labels that occur."""
    labels = [np.concatenate([source.train.labels[key], source.test.labels[key]]) for key in _DATA_SET.labels]
    fine, coarse = np.unique(np.stack(labels), axis=1)
    members = np.bincount(coarse, minlength=NUM_CLASSES)
    if not np.array_equal(fine, np.arange(NUM_FINE)) or (members != NUM_SUB_CLASSES).any():
        raise ValueError(
            f"{_DATA_SET.where}: {source.path} has {np.unique(fine).size} classes, {fine.size} pairs of class and "
            f"super-class, and {members.min()} to {members.max()} classes in a super-class; expected {NUM_FINE} "
            f"classes, each in one super-class, and {NUM_SUB_CLASSES} in each: this is not {_DATA_SET.title}."
        )
    number = np.empty(NUM_FINE, np.int32)
    for k in range(NUM_CLASSES):
        number[coarse == k] = np.arange(NUM_SUB_CLASSES)
    return number
