"""Cleaning of training data by one weight per example, with a network of one hidden layer.

    inner(params, s) = mean_i sigmoid(s_i) CE_i + 0.005 ||params||^2,    outer(params) = mean CE on clean data

x ~ N(0, 1), labels = argmax of a random linear teacher, 40 % of the training labels drawn anew among the 10 classes,
s ~ N(0, 1), tanh network d-hidden-10, 1000 examples for each loss; params by L-BFGS to a gradient norm of 2e-7.

    small   d = 20,  hidden 10,   320 params,      float64
    large   d = 784, hidden 128,  101,770 params,  float32, step of hand-set Neumann series and unrolling 4.6
"""

import numpy as np

from benchmarks.hypergradients.problems import exact
from benchmarks.hypergradients.problems.exchange import Problem

SHAPES = {"small": (20, 10, "float64"), "large": (784, 128, "float32")}
EXAMPLES, CLASSES, CORRUPTED, DECAY, GRADIENT_NORM = 1000, 10, 0.4, 0.005, 2e-7


def make(size: str, seed: int, data_dir=None) -> Problem:
    """The problem at the minimum of its inner loss."""
    del data_dir
    features, hidden, precision = SHAPES[size]
    facts = {"step": 4.6} if size == "large" else {}
    return exact.finish(
        f"hypercleaning-{size}",
        "hypercleaning",
        size,
        precision,
        draw(features, hidden, EXAMPLES, seed),
        {"decay": DECAY},
        solve=GRADIENT_NORM,
        facts=facts,
    )


def draw(features: int, hidden: int, examples: int, seed: int) -> dict:
    """Data, weights and initial params (standard deviation 1 / sqrt(fan in), biases 0)."""
    rng = np.random.default_rng(seed)
    teacher = rng.standard_normal((features, CLASSES))

    def batch():
        # Rounded first, so that the float32 problem has the labels of its own data.
        x = rng.standard_normal((examples, features)).astype(np.float32).astype(np.float64)
        return {"x": x, "y": np.argmax(x @ teacher, axis=1).astype(np.int32)}

    train, valid = batch(), batch()
    wrong = rng.permutation(examples)[: round(CORRUPTED * examples)]
    train["y"][wrong] = rng.integers(0, CLASSES, wrong.size)
    params = {
        "w1": rng.standard_normal((features, hidden)) / np.sqrt(features),
        "b1": np.zeros(hidden),
        "w2": rng.standard_normal((hidden, CLASSES)) / np.sqrt(hidden),
        "b2": np.zeros(CLASSES),
    }
    meta = {"logits": rng.standard_normal(examples)}
    return {"params": params, "meta": meta, "inner_batch": train, "outer_batch": valid}
