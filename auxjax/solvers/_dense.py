"""Exact solution of A x = b by a matrix that is written out.

    x = (A + damping I)^{-1} b,   A [n, n] over all leaves together, n the number of entries of b

The whole matrix, blocks between different leaves included: a matrix that keeps each leaf's own block only is no
inverse. Meant as the reference for other solvers and for problems of up to some thousands of variables.

Not for: large systems. Memory n^2, time n^3.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from auxjax._internal import checks, tree_math
from auxjax.interface import Key, PyTree
from auxjax.solvers import base


def dense(*, damping: float = 0.0, rtol: float = 1e-3) -> base.Solver:
    """Solver that forms the matrix and factorises it.

    `x = (A + damping I)^{-1} b` by LU. Where that fails (a singular matrix: an entry of `x` is not finite, or the
    residual is larger than sqrt(eps)) the least-squares solution of smallest norm takes its place.

    Args:
      damping: multiple of the identity added to A.
      rtol: relative residual up to which `converged` is True.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `init` and `key` are checked and not used.
      `min_curvature` is the smallest diagonal entry of A. Differentiable, also where A depends on other variables.
      Cost: n matrix-vector products, n^2 memory, n^3 operations.

    Raises:
      TypeError, ValueError: an option is not a finite number, or negative.
    """
    checks.number("dense", least=0, known=True, damping=damping, rtol=rtol)

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        system = base.make_system("dense", matvec, b, init, key)
        right, unravel = ravel_pytree(system.b)
        size, dtype = right.shape[0], right.dtype

        def column(direction):
            return ravel_pytree(system.matvec(unravel(direction)))[0]

        matrix = jax.vmap(column, out_axes=1)(jnp.eye(size, dtype=dtype))
        damped = matrix + jnp.asarray(damping, dtype) * jnp.eye(size, dtype=dtype)
        # The derivative is that of the linear system, not of the factorisation: no NaN from the branch not taken.
        x = jax.lax.custom_linear_solve(
            lambda y: _multiply(damped, y),
            right,
            solve=lambda _, y: _solve_or_fit(damped, y),
            transpose_solve=lambda _, y: _solve_or_fit(damped.T, y),
        )
        residual = tree_math.norm(right - _multiply(matrix, x))
        solved = base.relative(system, tree_math.norm(right - _multiply(damped, x)))
        seen = jnp.where(system.norm == 0, jnp.zeros((), dtype), jnp.min(jnp.diagonal(matrix)))
        info = base.make_info(base.relative(system, residual), size, solved <= rtol, seen)
        return system.restore(unravel(x)), info

    return solve


def _multiply(matrix, x):
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def _solve_or_fit(matrix, b):
    """LU solution, or the finite least-squares solution of smallest norm where LU fails."""
    root_eps = jnp.sqrt(jnp.finfo(b.dtype).eps).astype(b.dtype)
    x = jnp.linalg.solve(matrix, b)
    good = tree_math.all_finite(x) & (tree_math.norm(b - _multiply(matrix, x)) <= root_eps * tree_math.norm(b))
    return jax.lax.cond(good, lambda: x, lambda: _fit(matrix, b))


def _fit(matrix, b):
    """Least squares; zero where the matrix itself is not finite, so that what comes back is finite always."""
    usable = tree_math.all_finite((matrix, b))
    safe_matrix = jnp.where(usable, matrix, jnp.zeros_like(matrix))
    safe_b = jnp.where(usable, b, jnp.zeros_like(b))
    return jnp.linalg.lstsq(safe_matrix, safe_b)[0]
