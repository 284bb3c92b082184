"""Multinomial logistic regression with one regulariser per feature, on the digits of scikit-learn.

    inner(W, s) = mean CE(X W) + sum_jc exp(s_j) W_jc^2 / (2 p c),    outer(W) = mean CE(X' W)

the form in which Grazzi, Franceschi, Pontil, Salzo, 2020 (On the Iteration Complexity of Hypergradient Computation,
ICML) study it on 20 newsgroups. 8 x 8 images of handwritten digits, scaled to [0, 1]: p = 64, c = 10, 640 params; the
first 900 of a random order for the inner loss, the other 897 for the outer one; s ~ N(0, 1); solved to a gradient norm
of 1e-9. Float32.
"""

import numpy as np

from benchmarks.hypergradients.problems import exact
from benchmarks.hypergradients.problems.exchange import LeftOut, Problem


def make(size: str, seed: int, data_dir=None) -> Problem:
    """The problem at the minimum of its inner loss."""
    del data_dir
    images, labels = digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    x = images.reshape(len(images), -1)
    batches = [{"x": x[part], "y": labels[part]} for part in (order[:900], order[900:])]
    parts = {
        "params": {"w": np.zeros((x.shape[1], 10))},
        "meta": {"log_decay": rng.standard_normal(x.shape[1])},
        "inner_batch": batches[0],
        "outer_batch": batches[1],
    }
    return exact.finish("logistic", "logistic", size, "float32", parts, {}, solve=1e-9)


def digits():
    """The digits that come with scikit-learn: images [1797, 8, 8] in [0, 1], labels [1797].

    Raises:
      LeftOut: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise LeftOut("needs scikit-learn, for its digits: pip install 'auxjax[experiments]'") from error
    data = load_digits()
    return data.images.astype(np.float64) / 16, data.target.astype(np.int32)
