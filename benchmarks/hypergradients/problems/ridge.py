"""Ridge regression with one regulariser per feature; the lower level and the hypergradient have closed forms.

    inner(w, s) = ||X w - y||^2 / (2 n) + sum_j exp(s_j) w_j^2 / 2,    outer(w) = ||X' w - y'||^2 / (2 n)
    w*(s) = (X^T X / n + diag(exp(s)))^{-1} X^T y / n
    d outer / d s = -exp(s) * w* * u,    (X^T X / n + diag(exp(s))) u = X'^T (X' w* - y') / n

n = 200 examples for each loss, 50 features of scales between 0.1 and 1, s ~ -3 + N(0, 1), noise 0.5. Float64.
"""

import numpy as np

from benchmarks.hypergradients.problems import exact
from benchmarks.hypergradients.problems.exchange import Problem


def make(size: str, seed: int, data_dir=None, *, examples: int = 200, features: int = 50) -> Problem:
    """The problem, its params and reference from the closed forms."""
    del data_dir
    rng = np.random.default_rng(seed)
    scales = np.logspace(-1, 0, features)
    teacher = rng.standard_normal(features)

    def draw():
        x = rng.standard_normal((examples, features)) * scales
        return {"x": x, "y": x @ teacher + 0.5 * rng.standard_normal(examples)}

    train, valid = draw(), draw()
    log_decay = rng.standard_normal(features) - 3
    matrix = train["x"].T @ train["x"] / examples + np.diag(np.exp(log_decay))
    params = np.linalg.solve(matrix, train["x"].T @ train["y"] / examples)
    u = np.linalg.solve(matrix, valid["x"].T @ (valid["x"] @ params - valid["y"]) / examples)
    parts = {
        "params": {"w": params},
        "meta": {"log_decay": log_decay},
        "inner_batch": train,
        "outer_batch": valid,
    }
    problem = exact.finish("ridge", "ridge", size, "float64", parts, {})
    return problem._replace(reference={"log_decay": -np.exp(log_decay) * params * u})
