"""Truncated solvers on a dense Hessian in float64 NumPy: what a library must give for a fixed number of products.

    neumann     step * sum_{k <= K} (I - step H)^k b
    cg          K steps of conjugate gradients from zero
    bicgstab    is compared after convergence only

Written for `check` alone; nothing here is timed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class System(NamedTuple):
    """H u = b with hypergradient `direct - mixed @ u`: H [n, n], b [n], mixed [m, n], direct [m], all float64."""

    hessian: np.ndarray
    right: np.ndarray
    mixed: np.ndarray
    direct: np.ndarray


def system(problem) -> System:
    """The dense linear system of a small problem."""
    with jax.enable_x64(True):
        problem = problem.cast("float64")
        flat, unravel = ravel_pytree({key: jnp.asarray(leaf) for key, leaf in problem.params.items()})
        meta, unravel_meta = ravel_pytree({key: jnp.asarray(leaf) for key, leaf in problem.meta.items()})

        def inner(flat, meta):
            return problem.inner(unravel(flat), unravel_meta(meta), problem.inner_batch)

        def outer(flat, meta):
            return problem.outer(unravel(flat), unravel_meta(meta), problem.outer_batch)

        hessian = jax.jit(jax.jacfwd(jax.grad(inner)))(flat, meta)
        mixed = jax.jit(jax.jacrev(jax.grad(inner), argnums=1))(flat, meta)
        right, direct = jax.jit(jax.grad(outer, argnums=(0, 1)))(flat, meta)
        return System(*(np.asarray(array) for array in (hessian, right, mixed.T, direct)))


def hypergradient(system: System, solution: np.ndarray) -> np.ndarray:
    """The hypergradient that belongs to a solution u, as one vector in the order of sorted names."""
    return system.direct - system.mixed @ solution


def neumann(system: System, terms: int, step: float) -> np.ndarray:
    """Neumann series with `terms` products, hence `terms` + 1 summands."""
    total = summand = system.right
    for _ in range(terms):
        summand = summand - step * system.hessian @ summand
        total = total + summand
    return step * total


def cg(system: System, steps: int) -> np.ndarray:
    """Conjugate gradients, with every residual made orthogonal to all before: no rounding to speak of."""
    solution, residual, direction = np.zeros_like(system.right), system.right, system.right
    basis = []
    for _ in range(steps):
        product = system.hessian @ direction
        length = residual @ residual
        alpha = length / (direction @ product)
        solution = solution + alpha * direction
        basis.append(residual / np.sqrt(length))
        residual = residual - alpha * product
        for vector in basis:
            residual = residual - (vector @ residual) * vector
        direction = residual + (residual @ residual / length) * direction
    return solution
