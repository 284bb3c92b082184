"""Handwritten digits: 1,797 grey images of 8 x 8 pixels in 10 classes, bundled with scikit-learn.

The smallest real data set with label noise: nothing to download, a run takes seconds. The images are the test part
of Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998, UCI Machine Learning Repository). It has no
official split, so all four splits, test included, depend on the seed: report means over seeds, and compare methods
at equal seeds only.
"""

import numpy as np

from experiments.data.cutting import four_way_split
from experiments.data.examples import four_pools, make_examples
from experiments.data.noise import symmetric_noise
from experiments.data.pools import Data

NUM_CLASSES = 10


def load(
    seed: int,
    *,
    noise: float = 0.4,
    noise_kind: str = "flip",
    train_size: int | float | None = None,
    dev_size: int | float = 200,
    validation_size: int | float = 200,
    test_size: int | float = 500,
) -> Data:
    """The digits, cut in four by class, with corrupted training labels.

    Args:
      seed: non-negative integer that decides the split and, in a stream of its own, the noise.
      noise: rate of `symmetric_noise` on the labels of train.
      noise_kind: "flip" (share of wrong labels, exact) or "redraw".
      train_size: count, fraction of the 1,797, or None for all that remains: 897 by default.
      dev_size, validation_size, test_size: counts or fractions.

    Returns:
      `Data` with float32 images [n, 8, 8, 1] in [0, 1]; `example_id` is the row in scikit-learn's array.

    Raises:
      ValueError: from `four_way_split` or `symmetric_noise`.
    """
    from sklearn.datasets import load_digits  # here, because it takes a second that other data sets need not pay

    data = load_digits()
    image = (data.images / 16.0).astype(np.float32)[..., None]
    label = data.target.astype(np.int32)
    indices = four_way_split(
        label,
        num_classes=NUM_CLASSES,
        train_size=train_size,
        dev_size=dev_size,
        validation_size=validation_size,
        test_size=test_size,
        seed=seed,
    )
    parts = {name: make_examples(image[rows], label[rows], rows) for name, rows in indices._asdict().items()}
    noisy = symmetric_noise(parts["train"]["true_label"], noise, NUM_CLASSES, seed, kind=noise_kind)
    parts["train"] |= noisy._asdict()
    return four_pools(
        parts,
        num_classes=NUM_CLASSES,
        classes=tuple(str(name) for name in data.target_names),
        source=f"scikit-learn's load_digits ({label.size} images of 8 x 8 pixels), split with seed {seed}",
    )
