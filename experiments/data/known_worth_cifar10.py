"""CIFAR-10 with auxiliary tasks whose worth is known, as `experiments.data.known_worth` makes them of digits.

The images are at half their size by default, the mean of every 2 x 2 pixels, so that a small convolutional network
trains in a minute on a CPU. Test images are from the official test split, all others from the training split, whose
images alone make the tasks.
"""

import os

import numpy as np

from experiments.data import cifar, cifar10, known_worth
from experiments.data.cutting import four_way_split, stratified_subset
from experiments.data.pools import Data

VALIDATION = 1_000


def load(
    seed: int,
    *,
    data_dir: str | os.PathLike | None = None,
    variant: str = "plain",
    times: int = 2,
    pool_size: int = 16_000,
    test_size: int = 4_000,
    side: int = 16,
) -> Data:
    """The pools "labelled", "pool", "dev", "validation" and "test" of a variant.

    Args:
      seed: non-negative integer; decides the split, the tasks and all noise. The test images are the same for all.
      data_dir: as for `cifar10.load`.
      variant: one of `known_worth.VARIANTS`.
      times: how many images per class show it for each one of the variant on digits.
      pool_size: images that show the labels of the auxiliary tasks.
      test_size: test images, as many of each class.
      side: height and width, a divisor of 32.

    Returns:
      `Data`, with float32 images [n, side, side, 3] in [-1, 1].

    Raises:
      FileNotFoundError, ImportError: as `cifar10.load`.
      ValueError: an unknown variant, an impossible size.
    """
    chosen = known_worth.variant_of(variant)
    if 32 % side:
        raise ValueError(f"side={side}: expected a divisor of 32.")
    source = cifar.read(data_dir, cifar10.DATA_SET)
    label, count = source.train.labels["label"], source.train.labels["label"].size
    classes = cifar10.NUM_CLASSES
    dev_size, labelled_size = classes * times * chosen.dev, classes * times * chosen.labelled
    rows = four_way_split(
        label,
        num_classes=classes,
        train_size=labelled_size + pool_size,
        dev_size=dev_size,
        validation_size=VALIDATION,
        test_size=0,
        seed=seed,
    )
    labelled, pool = known_worth.labelled_and_pool(rows.train, label, labelled_size, seed)
    test = stratified_subset(source.test.labels["label"], test_size, num_classes=classes, seed=0)
    places = {"labelled": labelled, "pool": pool, "dev": rows.dev, "validation": rows.validation}
    places["test"] = count + np.arange(test.size)
    image = shrunk(np.concatenate([source.train.image, source.test.image[test]]), side)
    tasks = known_worth.make_tasks(chosen, image[:count], label, seed)
    label = np.concatenate([label, source.test.labels["label"][test]])
    text = f"CIFAR-10 (Krizhevsky, 2009) from {source.text}, {side} x {side}, variant {variant}, seed {seed}"
    return known_worth.assemble(chosen, image, label, places, tasks, seed, text)


def shrunk(images: np.ndarray, side: int) -> np.ndarray:
    """Bytes `[n, 32, 32, 3]` as means over squares, float32 `[n, side, side, 3]` in [-1, 1]."""
    square = 32 // side
    parts = images.reshape(len(images), side, square, side, square, 3)
    return parts.mean(axis=(2, 4), dtype=np.float32) / np.float32(127.5) - np.float32(1)
