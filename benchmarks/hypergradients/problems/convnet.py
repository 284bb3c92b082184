"""A small convolutional network far from its minimum, where the Hessian is indefinite.

    inner(params, s) = mean_i sigmoid(s_i) CE_i + 1e-4 ||params||^2,    outer(params) = mean CE on other images

8 x 8 digits of scikit-learn, 300 for each loss; 3 x 3 convolutions 1-4-6-8 with tanh, strides 1, 2, 2, mean over the
image, linear layer: params at a random start (standard deviation 1 / sqrt(fan in)) moved by 10 gradient steps of 0.5;
s ~ N(0, 1). The reference is the dense solve with the indefinite Hessian: what the implicit function theorem gives at
this point, though the point is neither a minimum nor a stationary point. Float64, so that nothing is blamed on
rounding.
"""

import numpy as np

from benchmarks.hypergradients.problems import exact
from benchmarks.hypergradients.problems.exchange import Problem
from benchmarks.hypergradients.problems.logistic import digits

EXAMPLES, CHANNELS, CLASSES, DECAY, STEPS, STEP = 300, (4, 6, 8), 10, 1e-4, 10, 0.5


def make(size: str, seed: int, data_dir=None) -> Problem:
    """The problem at its point far from a minimum."""
    del data_dir
    images, labels = digits()
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    batches = [
        {"x": images[part, :, :, None], "y": labels[part]}
        for part in (order[:EXAMPLES], order[EXAMPLES : 2 * EXAMPLES])
    ]
    params, before = {}, 1
    for layer, channels in enumerate(CHANNELS, start=1):
        params[f"k{layer}"] = rng.standard_normal((3, 3, before, channels)) / np.sqrt(9 * before)
        params[f"b{layer}"] = np.zeros(channels)
        before = channels
    params["w"] = rng.standard_normal((before, CLASSES)) / np.sqrt(before)
    params["b"] = np.zeros(CLASSES)
    meta = {"logits": rng.standard_normal(EXAMPLES)}
    constants = {"decay": DECAY}
    level = exact.Level("convnet", constants, params, *batches)
    flat = level.ravel(params)
    for _ in range(STEPS):
        flat = flat - STEP * level.value_and_gradient(flat, meta)[1]
    parts = {"params": level.unravel(flat), "meta": meta, "inner_batch": batches[0], "outer_batch": batches[1]}
    return exact.finish("convnet", "convnet", size, "float64", parts, constants)
