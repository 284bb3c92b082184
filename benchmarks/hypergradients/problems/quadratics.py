"""The simulated quadratics of benchopt's bilevel benchmark, with its sizes and spectra, drawn by our own generator.

    mean over i of  (a_i z)^2 / 2 + (b_i x)^2 / 2 + (p_i x)(q_i z) + c_i z + d_i x        z params, x meta; both levels

n = 1024 terms, z and x of 100 entries. a_i, b_i ~ N(0, H) with eigenvalues of H log-spaced between mu = 0.1 and L = 1
(those of the second have one 0 among them); p_i = U D g_i and q_i = V g_i with the same g_i ~ N(0, I), so that the
cross term has the singular values D, log-spaced between mu = 0.1 and 0.1: all 0.1; c, d ~ N(0, 1). x ~ N(0, 1), z*(x)
by a linear solve. The outer loss depends on x itself: the hypergradient has a direct part. Float64.
"""

import numpy as np

from benchmarks.hypergradients.problems import exact
from benchmarks.hypergradients.problems.exchange import Problem

MU, LARGEST, CROSS = 0.1, 1.0, 0.1


def make(size: str, seed: int, data_dir=None, *, examples: int = 1024, inner: int = 100, outer: int = 100) -> Problem:
    """The problem at the minimum of its inner loss."""
    del data_dir
    rng = np.random.default_rng(seed)
    batches = [_draw(rng, examples, inner, outer) for _ in range(2)]
    x = rng.standard_normal(outer)
    train = batches[0]
    hessian = train["a"].T @ train["a"] / examples
    right = -np.mean(train["c"], axis=0) - train["q"].T @ (train["p"] @ x) / examples
    parts = {
        "params": {"z": np.linalg.solve(hessian, right)},
        "meta": {"x": x},
        "inner_batch": train,
        "outer_batch": batches[1],
    }
    return exact.finish("quadratics", "quadratics", size, "float64", parts, {})


def _draw(rng, examples: int, inner: int, outer: int) -> dict:
    """The vectors of one level, each [examples, size]."""

    def turn(size):
        return np.linalg.qr(rng.standard_normal((size, size)))[0]

    def correlated(size, eigenvalues):
        rotation = turn(size)
        return rng.standard_normal((examples, size)) @ (rotation * np.sqrt(eigenvalues)) @ rotation.T

    spectrum = np.geomspace(MU, LARGEST, outer - 1)
    rank = min(inner, outer)
    shared = rng.standard_normal((examples, rank))
    singular = np.geomspace(MU, CROSS, rank)
    return {
        "a": correlated(inner, np.geomspace(MU, LARGEST, inner)),
        "b": correlated(outer, np.concatenate([[0.0], spectrum])),
        "p": (shared * singular) @ turn(outer)[:rank],
        "q": shared @ turn(inner)[:rank],
        "c": rng.standard_normal((examples, inner)),
        "d": rng.standard_normal((examples, outer)),
    }
