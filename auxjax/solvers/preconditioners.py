"""Preconditioners for the Krylov solvers: linear functions r -> P r with P about the inverse of A + damping I.

    P = diag(d)^{-1}                                                               diagonal
    P = diag(sqrt(second_moment) + eps)^{-1}                                       that of Adam
    P = U (lambda + damping)^{-1} U^T + (I - U U^T) / (lambda_rank + damping)      Nystrom

A good one makes the eigenvalues of P A few or close to one another, and cuts the number of products by the square root
of what it does to the condition number. All of them are symmetric positive definite, as `cg` and `minres` need; a
factor of P changes nothing.

Each is a function that is a pytree (a NamedTuple that can be called), which jit, scan and checkpoints take as they take
arrays, so that one sketch serves for many solves.

Not for: matrices that are not symmetric, on which these are guesses; to sketch one that is known not to be is
refused.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax.interface import Key, PyTree
from auxjax.solvers import base
from auxjax.solvers._nystrom import NystromSketch, apply_inverse, sketch_matrix


class DiagonalPreconditioner(NamedTuple):
    """`r -> r / d`.

    Attributes:
      diagonal: d, a pytree like the right-hand sides, positive.
    """

    diagonal: Any

    def __call__(self, r):
        checks.like("diagonal_preconditioner: the right-hand side", r, self.diagonal, "the diagonal")
        return jax.tree.map(lambda a, d: (a.astype(d.dtype) / d).astype(a.dtype), r, self.diagonal)


class NystromPreconditioner(NamedTuple):
    """`r -> U (lambda + damping)^{-1} U^T r + (r - U U^T r) / outside`.

    Attributes:
      sketch: U and lambda + damping.
      outside: scalar, what stands for the eigenvalues outside of the sketch.
    """

    sketch: NystromSketch
    outside: jax.Array

    def __call__(self, r):
        flat, unravel = ravel_pytree(tree_math.cast_like(r, jax.tree.map(lambda a: a.astype(self.outside.dtype), r)))
        return tree_math.cast_like(unravel(apply_inverse(self.sketch, flat, 0.0, self.outside)), r)


def diagonal_preconditioner(diagonal: PyTree) -> DiagonalPreconditioner:
    """Preconditioner of Jacobi: division by a diagonal.

    `P r = r / d`

    Args:
      diagonal: pytree like the right-hand sides, d > 0: the diagonal of A + damping I, or an estimate. Where it is not
        positive its absolute value is taken, at least eps times the largest entry: P stays positive definite.

    Returns:
      `r -> P r`, a pytree. Cost: no product.

    Raises:
      TypeError: a leaf is not real floating.
      ValueError: there are no leaves.
    """
    diagonal = checks.floating("diagonal_preconditioner(diagonal=)", diagonal)
    high = jax.tree.map(jnp.abs, tree_math.upcast(diagonal))
    largest = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in jax.tree.leaves(high)]))
    unit = positive_or_one(largest)
    floor = jnp.finfo(unit.dtype).eps.astype(unit.dtype) * unit
    return DiagonalPreconditioner(jax.tree.map(lambda leaf: jnp.maximum(leaf, floor), high))


def adam_preconditioner(second_moment: PyTree, eps: float = 1e-8) -> DiagonalPreconditioner:
    """Preconditioner that Adam uses.

    `P r = r / (sqrt(second_moment) + eps)`

    Costs nothing where Adam trains the inner problem. The bias correction of the second moment is a factor and changes
    nothing here (unless `eps` matters).

    Args:
      second_moment: pytree like `params`, running mean of the squared gradients (`nu` in optax's Adam state), >= 0.
      eps: as in Adam.

    Returns:
      `r -> P r`, a pytree. Cost: no product.

    Raises:
      TypeError: a leaf is not real floating.
      ValueError: `eps` is negative or not finite; there are no leaves.

    Reference: Kingma, Ba, 2015, Adam: A Method for Stochastic Optimization, algorithm 1.
    """
    checks.number("adam_preconditioner", least=0, known=True, eps=eps)
    second_moment = checks.floating("adam_preconditioner(second_moment=)", second_moment)
    high = tree_math.upcast(second_moment)
    return diagonal_preconditioner(
        jax.tree.map(lambda nu: jnp.sqrt(jnp.maximum(nu, 0)) + jnp.asarray(eps, nu.dtype), high)
    )


def nystrom_preconditioner(
    matvec: base.Matvec, like: PyTree, rank: int, *, damping: float, key: Key
) -> NystromPreconditioner:
    """Preconditioner from a randomised Nystrom approximation of A.

    `P = U (lambda + damping)^{-1} U^T + (I - U U^T) / (lambda_rank + damping)`

    Removes the `rank` largest eigenvalues: the condition number that is left is about
    `(lambda_rank + damping) / (lambda_n + damping)`.

    Args:
      matvec: `x -> A x`, without damping, of pytrees like `like`; A symmetric positive semidefinite.
      like: pytree of floating arrays, a right-hand side or `params`.
      rank: number of random directions; at most n are used.
      damping: that of the solver; 0 is allowed.
      key: typed PRNG key that draws the directions.

    Returns:
      `r -> P r`, a pytree. Cost: `min(rank, n)` products at once, by `vmap`; afterwards none, and 6 n rank operations
      per application. Held fixed under differentiation.

    Raises:
      TypeError: `matvec` is not a function, `like` has leaves that are not real floating, `key` is an old-style key.
      ValueError: an option out of range; `matvec(like)` is not like `like`; an `Operator(symmetric=False)`.

    Reference: Frangella, Tropp, Udell, 2023, Randomized Nystrom Preconditioning, equation 5.3.
    """
    checks.count("nystrom_preconditioner", 1, rank=rank)
    checks.number("nystrom_preconditioner", least=0, known=True, damping=damping)
    base.require_symmetric("nystrom_preconditioner", matvec)
    checks.key("nystrom_preconditioner", key)
    system = base.make_system("nystrom_preconditioner", matvec, like, None, key)
    sketch = sketch_matrix(system.matvec, system.b, rank, key)
    smallest, largest = sketch.eigenvalues[-1], sketch.eigenvalues[0]
    # Rounding error of the largest eigenvalue, below which the sketch knows nothing. 1 for the zero matrix.
    floor = float(jnp.finfo(largest.dtype).eps) * largest
    floor = jnp.where(floor + damping > 0, floor, jnp.ones_like(floor))
    sketch = sketch._replace(eigenvalues=jnp.maximum(sketch.eigenvalues, floor) + damping)
    return NystromPreconditioner(sketch, jnp.maximum(smallest, floor) + damping)


def nystrom_preparation(rank: int, *, damping: float) -> base.Preparation:
    """`nystrom_preconditioner` as `prepare` of `amortise`: a sketch that serves for many outer steps.

    Args:
      rank: as in `nystrom_preconditioner`.
      damping: that of the solver.

    Returns:
      `prepare(matvec, b, previous, key) -> preconditioner`; `previous` is not used, `key` is required.

    Raises:
      TypeError, ValueError: an option out of range (when it runs), a missing key, a matrix known not to be symmetric.
    """

    def prepare(matvec: base.Matvec, b: PyTree, previous: PyTree, key: Key):
        del previous
        return nystrom_preconditioner(matvec, b, rank, damping=damping, key=key)

    return prepare
