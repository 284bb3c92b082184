"""Bilevel problems whose solutions and hypergradients are known in closed form, worked out with NumPy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from auxjax.hypergrad import BilevelProblem


class Solved(NamedTuple):
    """A problem, the point where its lower level is solved, and what is true there (flat NumPy arrays)."""

    problem: BilevelProblem
    params: Any
    meta: Any
    inner_batch: Any
    outer_batch: Any
    jacobian: np.ndarray  # J = d field / d params
    outer_gradient: np.ndarray  # v
    solution: np.ndarray  # u = J^{-T} v
    hypergradient: np.ndarray
    solve_inner: Callable[[np.ndarray], np.ndarray]  # flat meta -> flat params
    outer_value: Callable[[np.ndarray, np.ndarray], float]  # (flat params, flat meta) -> scalar


def split(flat, dtype=jnp.float64):
    """Six numbers as a pytree of two leaves of different rank."""
    flat = jnp.asarray(flat, dtype)
    return {"kernel": flat[:4].reshape(2, 2), "bias": flat[4:]}


def flatten(tree):
    """The inverse of `split`."""
    return jnp.concatenate([tree["kernel"].reshape(-1), tree["bias"]])


def flat_array(tree) -> np.ndarray:
    """All leaves behind one another, as float64; for a tree of `split` in its own order."""
    if isinstance(tree, dict) and set(tree) == {"kernel", "bias"}:
        return np.asarray(flatten(tree), np.float64)
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def ridge(seed=0, *, scalar=False, scale=1.0, dtype=jnp.float64, explicit=0.0) -> Solved:
    """Ridge regression; meta are log-regularisers, one per feature or one for all.

    inner = scale * (||X w - y||^2 / 2n + sum_j exp(meta_j) w_j^2 / 2)
    outer = scale * ||X_v w - y_v||^2 / 2n + explicit * sum(meta^2) / 2
    """
    rng = np.random.default_rng(seed)
    n, d = 20, 6
    X, Xv = rng.normal(size=(2, n, d)) * np.linspace(0.6, 1.6, d)
    truth = rng.normal(size=d)
    y, yv = X @ truth + rng.normal(size=n), Xv @ truth + rng.normal(size=n)
    meta = np.asarray(-0.7) if scalar else rng.normal(size=d) - 1.0

    def gradient_and_hessian(log_reg):
        regulariser = np.exp(log_reg) * np.ones(d)
        return scale * X.T @ y / n, scale * (X.T @ X / n + np.diag(regulariser))

    def solve_inner(log_reg):
        right, hessian = gradient_and_hessian(log_reg)
        return np.linalg.solve(hessian, right)

    w, hessian = solve_inner(meta), gradient_and_hessian(meta)[1]
    v = scale * Xv.T @ (Xv @ w - yv) / n
    u = np.linalg.solve(hessian, v)
    per_feature = -u * scale * np.exp(meta) * w
    hypergradient = (per_feature.sum() if scalar else per_feature) + explicit * meta

    def inner(params, log_reg, batch):
        inputs, targets = batch
        w = flatten(params)
        fit = jnp.mean((inputs @ w - targets) ** 2) / 2
        return scale * (fit + jnp.sum(jnp.exp(log_reg) * w**2) / 2)

    def outer(params, log_reg, batch):
        inputs, targets = batch
        return scale * jnp.mean((inputs @ flatten(params) - targets) ** 2) / 2 + explicit * jnp.sum(log_reg**2) / 2

    def outer_value(w, log_reg):
        return scale * np.mean((Xv @ w - yv) ** 2) / 2 + explicit * np.sum(log_reg**2) / 2

    batches = [(jnp.asarray(a, dtype), jnp.asarray(b, dtype)) for a, b in ((X, y), (Xv, yv))]
    return Solved(
        BilevelProblem(inner=inner, outer=outer),
        split(w, dtype),
        jnp.asarray(meta, dtype),
        *batches,
        hessian,
        v,
        u,
        np.atleast_1d(hypergradient),
        solve_inner,
        outer_value,
    )


def module_scaled_field(seed=0) -> Solved:
    """An update that is not a gradient: every variable scales an auxiliary gradient by its own factor.

    field = H_0 w - c_0 + meta * (H_1 w - c_1),   J = H_0 + diag(meta) H_1,   outer = ||w - target||^2 / 2
    """
    rng = np.random.default_rng(seed)
    d = 6

    def positive():
        factor = rng.normal(size=(d, d))
        return factor @ factor.T / d + 0.3 * np.eye(d)

    H0, H1, c0, c1, target = positive(), positive(), rng.normal(size=d), rng.normal(size=d), rng.normal(size=d)
    meta = rng.uniform(0.2, 3.0, size=d)

    def solve_inner(factors):
        return np.linalg.solve(H0 + np.diag(factors) @ H1, c0 + factors * c1)

    w, jacobian = solve_inner(meta), H0 + np.diag(meta) @ H1
    v = w - target
    u = np.linalg.solve(jacobian.T, v)
    hypergradient = -u * (H1 @ w - c1)

    def update_field(params, factors, batch):
        del batch
        w = flatten(params)
        return split(jnp.asarray(H0) @ w - jnp.asarray(c0) + factors * (jnp.asarray(H1) @ w - jnp.asarray(c1)))

    def outer(params, factors, batch):
        del factors, batch
        return jnp.sum((flatten(params) - jnp.asarray(target)) ** 2) / 2

    return Solved(
        BilevelProblem(update_field=update_field, outer=outer),
        split(w),
        jnp.asarray(meta),
        None,
        None,
        jacobian,
        v,
        u,
        hypergradient,
        solve_inner,
        lambda w, _: np.sum((w - target) ** 2) / 2,
    )


def weighted_least_squares(seed=0, *, scheduler=False) -> Solved:
    """Least squares with one weight per example, meta directly, or the output of a scheduler of fixed features.

    inner = mean_i s_i (x_i w - y_i)^2 / 2 + 0.1 ||w||^2 / 2
    s = sigmoid(meta)   or   s_i = sigmoid(features_i . meta)
    """
    rng = np.random.default_rng(seed)
    n, d = 15, 6
    X, Xv = rng.normal(size=(2, n, d))
    truth = rng.normal(size=d)
    y, yv = X @ truth + rng.normal(size=n), Xv @ truth
    features = rng.normal(size=(n, 3)) if scheduler else np.eye(n)
    meta = rng.normal(size=features.shape[1])

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def hessian(phi):
        return X.T @ (sigmoid(features @ phi)[:, None] * X) / n + 0.1 * np.eye(d)

    def solve_inner(phi):
        return np.linalg.solve(hessian(phi), X.T @ (sigmoid(features @ phi) * y) / n)

    w = solve_inner(meta)
    v = Xv.T @ (Xv @ w - yv) / n
    u = np.linalg.solve(hessian(meta), v)
    s = sigmoid(features @ meta)
    # d inner / d s_i is the loss of example i over n; its derivative along u is (x_i w - y_i) x_i u / n.
    per_example = -(X @ w - y) * (X @ u) / n
    hypergradient = features.T @ (per_example * s * (1 - s))

    def inner(params, phi, batch):
        inputs, targets, given = batch
        w = flatten(params)
        weights = jax.nn.sigmoid(jax.lax.stop_gradient(given) @ phi)
        return jnp.mean(weights * (inputs @ w - targets) ** 2) / 2 + 0.05 * jnp.sum(w**2)

    def outer(params, phi, batch):
        del phi
        inputs, targets = batch
        return jnp.mean((inputs @ flatten(params) - targets) ** 2) / 2

    return Solved(
        BilevelProblem(inner=inner, outer=outer),
        split(w),
        jnp.asarray(meta),
        (jnp.asarray(X), jnp.asarray(y), jnp.asarray(features)),
        (jnp.asarray(Xv), jnp.asarray(yv)),
        hessian(meta),
        v,
        u,
        hypergradient,
        solve_inner,
        lambda w, _: np.mean((Xv @ w - yv) ** 2) / 2,
    )


def estimate(estimator, solved: Solved, **options):
    """Calls an estimator on a solved problem."""
    return estimator(solved.problem, solved.params, solved.meta, solved.inner_batch, solved.outer_batch, **options)


def true_residual(solved: Solved, solution) -> float:
    """`||v - J^T u|| / ||v||`, from the dense Jacobian."""
    left = solved.outer_gradient - solved.jacobian.T @ flat_array(solution)
    return np.linalg.norm(left) / np.linalg.norm(solved.outer_gradient)


def finite_difference_of_solved(solved: Solved, step=1e-5) -> np.ndarray:
    """Central differences of meta -> outer(params*(meta), meta), the inner problem solved anew at every point."""
    meta = np.atleast_1d(np.asarray(solved.meta, np.float64))
    scalar = np.ndim(solved.meta) == 0

    def value(point):
        point = point[0] if scalar else point
        return solved.outer_value(solved.solve_inner(point), point)

    return np.asarray([(value(meta + e) - value(meta - e)) / (2 * step) for e in step * np.eye(len(meta))])
