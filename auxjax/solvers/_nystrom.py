"""Randomised Nystrom approximation: A x = b by the inverse of a low-rank sketch of A.

    A ~ (A S) (S^T A S)^+ (A S)^T = U diag(lambda) U^T,      S [n, rank] random and orthonormal
    (U diag(lambda) U^T + damping I)^{-1} b = U (lambda + damping)^{-1} U^T b + (b - U U^T b) / damping

All products are independent of one another and made at once, by `vmap`. The approximation is never larger than A: what
the sketch has not seen counts as zero curvature, so that the answer is too large there by up to (curvature / damping).
As a preconditioner (`nystrom_preconditioner`) the same sketch is exact in the end, and mostly the better use of it.

Formed with a small shift, a symmetric square root of the core and a singular value decomposition, it is positive by
construction and loses no digits to the inversion of the core.

Not for: indefinite matrices, whose negative part the approximation leaves out (`min_curvature` tells); matrices that
are not symmetric, refused where that is known; parameters sharded over devices, whose leaves it joins into one vector.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax.interface import Key, PyTree
from auxjax.solvers import base


class NystromSketch(NamedTuple):
    """The approximation `U diag(eigenvalues) U^T`.

    Attributes:
      basis: U, [n, rank], orthonormal columns, n over all leaves together.
      eigenvalues: [rank], not negative, in descending order.
      min_curvature: smallest Rayleigh quotient of A on the sketched space.
    """

    basis: jax.Array
    eigenvalues: jax.Array
    min_curvature: jax.Array


def nystrom(rank: int, *, damping: float, rtol: float = 1e-3) -> base.Solver:
    """Solver by a randomised Nystrom approximation.

    `x = (U diag(lambda) U^T + damping I)^{-1} b`

    With `rank` = n this is the exact solution of the damped system. `converged` is about the damped system, as for
    every solver: with a small rank it is mostly False although nothing went wrong.

    Args:
      rank: number of random directions; at most n of them are used.
      damping: multiple of the identity added to A, positive: what the approximation takes for the curvature outside
        of its range. Wants to be about as large as the first eigenvalue left out.
      rtol: relative residual up to which `converged` is True.

    Returns:
      `solve(matvec, b, *, init=None, key) -> (x, SolveInfo)`; `key` is required and draws the sketch, `init` is checked
      and not used. `min_curvature` is the smallest Rayleigh quotient on the sketched space, or that of the solution.
      The derivative is that of the linear system, solved with the same approximation; the sketch is held fixed.
      Cost: rank + 1 matrix-vector products, `rank` of them at once in memory; 2 rank + 2 vectors; time n rank^2.

    Raises:
      TypeError: `rank` is not an integer; by `solve`: no `key`, or an old-style one.
      ValueError: an option out of range; by `solve`: an `Operator(symmetric=False)`.

    Reference: Hataya, Yamada, 2023, Nystrom Method for Accurate and Scalable Implicit Differentiation, AISTATS,
    equation 6; Frangella, Tropp, Udell, 2023, Randomized Nystrom Preconditioning, algorithm 2.1 for the computation.
    """
    checks.count("nystrom", 1, rank=rank)
    checks.number("nystrom", least=0, known=True, damping=damping, rtol=rtol)
    if damping == 0:
        raise ValueError(
            "nystrom(damping=0): expected a positive number. A low-rank matrix has no inverse without one; "
            "about as large as the curvature that may be ignored is a good start."
        )

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        base.require_symmetric("nystrom", matvec)
        key = _require_key("nystrom solve", key)
        system = base.make_system("nystrom", matvec, b, init, key)
        sketch = sketch_matrix(system.matvec, system.b, rank, key)
        unravel = ravel_pytree(system.b)[1]

        def approximate(_, right):
            flat = ravel_pytree(right)[0]
            return unravel(apply_inverse(sketch, flat, damping, damping))

        def damped(x):
            return tree_math.add_scaled(system.matvec(x), damping, x)

        # The derivative of the linear system, not of the factorisation.
        x = jax.lax.custom_linear_solve(damped, system.b, solve=approximate, symmetric=True)
        x = tree_math.select(tree_math.all_finite(x), x, jax.tree.map(jnp.zeros_like, x))
        seen = jnp.where(system.norm > 0, sketch.min_curvature, jnp.inf)
        return system.restore(x), base.report(system, x, damping, rtol, sketch.eigenvalues.shape[0], seen)

    return solve


def _require_key(where: str, key: Key | None) -> Key:
    if key is None:
        raise TypeError(
            f"{where}(key=) is missing: its directions are random. Pass key=jax.random.key(seed); "
            "an estimator such as implicit(nystrom(...)) hands its own key= on to the solver."
        )
    checks.key(where, key)
    return key


def sketch_matrix(matvec: base.Matvec, like: PyTree, rank: int, key: Key) -> NystromSketch:
    """Randomised Nystrom approximation of a symmetric positive semidefinite matrix.

    Args:
      matvec: `x -> A x` of pytrees like `like`, all leaves of one dtype.
      like: pytree of floating arrays of one dtype, at least float32.
      rank: number of directions; at most n are used.
      key: typed PRNG key.

    Returns:
      A `NystromSketch` of constants. Where a product is not finite it is that of the zero matrix.
      Cost: `min(rank, n)` matrix-vector products, by `vmap`.

    Reference: Frangella, Tropp, Udell, 2023, Randomized Nystrom Preconditioning, algorithm 2.1, with an eigenvalue
    decomposition for its Cholesky factorisation, which an indefinite A would stop.
    """
    flat, unravel = ravel_pytree(like)
    size, dtype = flat.shape[0], flat.dtype
    columns = min(rank, size)
    directions = jnp.linalg.qr(jax.random.normal(key, (size, columns), dtype))[0]

    def product(direction):
        return ravel_pytree(matvec(unravel(direction)))[0]

    products = jax.lax.stop_gradient(jax.vmap(product, in_axes=1, out_axes=1)(directions))
    products = jnp.where(tree_math.all_finite(products), products, jnp.zeros_like(products))
    norm = tree_math.norm(products)
    unit = positive_or_one(norm)
    products = products / unit

    core = _multiply(directions.T, products)
    core = (core + core.T) / 2
    shift = float(jnp.finfo(dtype).eps) * size**0.5
    values, vectors = jnp.linalg.eigh(core)
    # The rest is that of A + shift I: positive where A is, however small its eigenvalues.
    usable = values + shift > shift / 2
    root = jnp.sqrt(jnp.where(usable, values + shift, jnp.ones_like(values)))
    weights = vectors * jnp.where(usable, 1.0 / root, jnp.zeros_like(root))[None, :]
    half = _multiply(products + shift * directions, weights)
    orthonormal, triangle = jnp.linalg.qr(half)
    rotation, singular, _ = jnp.linalg.svd(triangle, full_matrices=False)
    eigenvalues = singular**2 - shift
    eigenvalues = jnp.where(eigenvalues > shift, eigenvalues, jnp.zeros_like(singular))
    lowest = values[0]
    lowest = jnp.where((lowest < 0) & (lowest >= -shift), jnp.zeros_like(lowest), lowest)
    return NystromSketch(_multiply(orthonormal, rotation), unit * eigenvalues, unit * lowest)


def apply_inverse(sketch: NystromSketch, flat, damping, outside) -> jax.Array:
    """`U (lambda + damping)^{-1} U^T flat + (I - U U^T) flat / outside`. Cost: 6 n rank operations."""
    inside = _multiply(sketch.basis.T, flat)
    rest = flat - _multiply(sketch.basis, inside)
    # Once more: divided by a small number, what is left of the inside would be large.
    rest = rest - _multiply(sketch.basis, _multiply(sketch.basis.T, rest))
    damping = jnp.asarray(damping, flat.dtype)
    return _multiply(sketch.basis, inside / (sketch.eigenvalues + damping)) + rest / jnp.asarray(outside, flat.dtype)


def _multiply(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
