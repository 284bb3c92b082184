"""CIFAR-10: 32 x 32 colour images in 10 classes (Krizhevsky, 2009, Learning multiple layers of features from tiny
images), from a prepared TensorFlow Datasets directory or from an npz archive; `experiments.data.cifar` describes both.

The official test split is the test set; train, dev and validation are cut from the official training split.
"""

import os
import pathlib

from experiments.data import cifar
from experiments.data.cifar import decode as decode
from experiments.data.examples import four_pools, make_examples
from experiments.data.noise import symmetric_noise
from experiments.data.pools import Data

NUM_CLASSES = 10
NPZ_SHA256 = "37970d1bf9dbb9740b3a3cdd3b6e0f05cb1cd2070728a0edf9d1f3ecefcbba45"

DATA_SET = cifar.DataSet(
    name="cifar10",
    title="CIFAR-10",
    labels={"label": ("classes", NUM_CLASSES)},
    npz_name="cifar10_exact.npz",
    npz_bytes=52_307_332,
    npz_sha256=NPZ_SHA256,
)


def load(
    seed: int,
    *,
    data_dir: str | os.PathLike | None = None,
    noise: float = 0.0,
    noise_kind: str = "flip",
    train_size: int | float | None = None,
    dev_size: int | float = 200,
    validation_size: int | float = 2_000,
    test_size: int | float | None = None,
) -> Data:
    """CIFAR-10 with the official test set; the rest cut in three by class, training labels corrupted if asked.

    Args:
      seed: non-negative integer that decides the cut and, in a stream of its own, the noise; never the test set.
      data_dir: a TFDS root, data set or version directory; a directory with the npz archive; or the archive itself.
        None: the environment variable TFDS_DATA_DIR, else ~/tensorflow_datasets.
      noise: rate of `symmetric_noise` on the labels of train.
      noise_kind: "flip" (share of wrong labels, exact) or "redraw".
      train_size: count, fraction of the official training split, or None for all that remains of it.
      dev_size, validation_size: counts or fractions of the official training split.
      test_size: None for the whole official test split; a count or fraction takes a class-stratified subset of it, the
        same one for every seed, for quick runs.

    Returns:
      `Data` with uint8 images [n, 32, 32, 3].

    Raises:
      FileNotFoundError: nothing readable at `data_dir`; the message says how to get the data.
      ValueError: damaged or unsuitable files, or from `four_way_split` and `symmetric_noise`.
      ImportError: a TFDS directory, but no tensorflow_datasets.
    """
    source = cifar.read(data_dir, DATA_SET)
    found = cifar.cut(
        source,
        {"label": NUM_CLASSES},
        train_size=train_size,
        dev_size=dev_size,
        validation_size=validation_size,
        test_size=test_size,
        seed=seed,
    )
    parts = {name: make_examples(part.image, part.labels["label"], part.ids) for name, part in found.items()}
    noisy = symmetric_noise(parts["train"]["true_label"], noise, NUM_CLASSES, seed, kind=noise_kind)
    parts["train"] |= noisy._asdict()
    text = f"CIFAR-10 (Krizhevsky, 2009) from {source.text}; official test split, the rest split with seed {seed}"
    return four_pools(parts, num_classes=NUM_CLASSES, classes=source.classes["label"], source=text)


def find(data_dir: str | os.PathLike | None) -> tuple[str, pathlib.Path]:
    """What lies at `data_dir` (see `load`): ("npz", archive) or ("tfds", version directory)."""
    return cifar.find(data_dir, DATA_SET)
