"""Quadratic lower levels whose matrix is data: one compiled estimator serves for every matrix.

    inner = <w, A w> / 2 - mixed <meta, w>,      field = A w - mixed meta,      outer = <v, w>

so that J = A, the mixed derivative is the number -mixed, and the hypergradient is `mixed` u with A^T u = v.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from auxjax import BilevelProblem, implicit


def _inner(params, meta, batch):
    matrix, mixed = batch
    w = ravel_pytree(params)[0]
    return jnp.sum(w * (matrix @ w)) / 2 - mixed * jnp.sum(meta * w)


def _update_field(params, meta, batch):
    matrix, mixed = batch
    w, unravel = ravel_pytree(params)
    return unravel(matrix @ w - mixed * meta)


def _outer(params, meta, v):
    del meta
    return jnp.sum(v * ravel_pytree(params)[0])


LOSS = BilevelProblem(inner=_inner, outer=_outer)
FIELD = BilevelProblem(update_field=_update_field, outer=_outer)


def leaves(flat, first):
    """A vector as a pytree of two leaves, the first with `first` entries."""
    return {"first": flat[:first], "second": flat[first:].reshape(1, -1)}


def flat(tree) -> np.ndarray:
    """The inverse of `leaves`."""
    return np.asarray(ravel_pytree(tree)[0])


def compiled(estimator, problem=LOSS, *, first=4, key=None):
    """`(matrix, v, mixed=1, params=None, meta=None) -> (meta_grad, info)`, jitted, in the precision of `v`."""

    @jax.jit
    def call(matrix, v, mixed, params, meta):
        return estimator(problem, leaves(params, first), meta, (matrix, mixed), v, key=key)

    def run(matrix, v, mixed=1.0, params=None, meta=None):
        matrix, v = jnp.asarray(matrix), jnp.asarray(v)
        params, meta = (jnp.zeros_like(v) if x is None else jnp.asarray(x) for x in (params, meta))
        return call(matrix, v, jnp.asarray(mixed, v.dtype), params, meta)

    return run


def solve(solver, matrix, v, problem=LOSS, **options):
    """Hypergradient and info of `implicit(solver)`."""
    return compiled(implicit(solver), problem, **options)(matrix, v)


def with_spectrum(eigenvalues, seed=0) -> np.ndarray:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    size = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    matrix = basis @ np.diag(eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def residual(matrix, v, u, unit=None) -> float:
    """`||v - A^T u|| / unit`, with `||v||` as the unit unless another is given, in extended precision."""
    matrix, v, u = (np.asarray(x, np.longdouble) for x in (matrix, v, u))
    unit = np.sqrt(np.sum(v**2)) if unit is None else unit
    return float(np.sqrt(np.sum((v - matrix.T @ u) ** 2)) / unit)
