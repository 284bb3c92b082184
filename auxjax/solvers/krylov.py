"""Krylov solvers of jaxopt, with a report: conjugate gradients.

    x_k = argmin over x in x_0 + span{r_0, A r_0, ..., A^{k-1} r_0} of  <x, A x> / 2 - <b, x>

The one file of the library that imports jaxopt, when a solver is made and not before. jaxopt runs the iteration; it
returns the solution alone. What is added here: a right-hand side of unit length, so that tolerances mean the same on
every scale; a stop at rounding error; a finite answer when the iteration breaks down; the true residual; the number of
iterations. Derivatives are those of the linear system (another solve), as jaxopt defines them.

jaxopt iterates in a `while_loop`. On the CPU convolutions inside loops are many times slower than outside: prefer
`neumann` for convolutional networks there.

Not for: systems that are not symmetric positive definite (damping may make them so).
"""

import warnings

import jax
import jax.numpy as jnp

from auxjax import tree_math
from auxjax.solvers import base


def jaxopt_linear_solve():
    """jaxopt's linear solvers; its notice that it is no longer maintained is the only warning held back."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)
        from jaxopt import linear_solve
    return linear_solve


def cg(*, max_steps: int = 20, rtol: float = 1e-3, damping: float = 0.0, preconditioner=None):
    """Solver by (preconditioned) conjugate gradients, through jaxopt.

    `x ~ (A + damping I)^{-1} b`, A symmetric and `A + damping I` positive definite

    Stops when the residual of the damped system is at most `rtol * ||b||` (or at rounding error, if `rtol` is smaller),
    or after `max_steps` steps. On an indefinite matrix conjugate gradients may find a saddle point or break down:
    a solution that is not finite is replaced with the initial guess, and `converged` is False.

    Args:
      max_steps: most steps taken.
      rtol: relative residual at which the iteration stops, and up to which `converged` is True. 0 for all steps.
      damping: multiple of the identity added to A.
      preconditioner: linear function, pytree like `b` -> the same, that approximates the inverse of `A + damping I`;
        symmetric positive definite.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `key` is not used. `min_curvature` is the Rayleigh
      quotient of the solution.
      Cost: steps + 2 matrix-vector products (one for the initial residual, one for the true residual at the end).

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range.

    Reference: Hestenes, Stiefel, 1952, Methods of Conjugate Gradients for Solving Linear Systems.
    """
    base.check_count("cg", "max_steps", max_steps, 1)
    base.check_non_negative("cg", rtol=rtol, damping=damping)
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(f"cg(preconditioner=) wants a function and got {type(preconditioner).__name__}.")
    solve_cg = jaxopt_linear_solve().solve_cg

    def solve(matvec, b, *, init=None, key=None):
        system = base.make_system("cg", matvec, b, init, key)

        def damped(x):
            product = system.matvec(x)
            return tree_math.add_scaled(product, damping, x) if damping else product

        start = jax.tree.map(jnp.zeros_like, system.b) if system.start is None else system.start

        def run(_, right):
            """jaxopt's iteration on a right-hand side of unit length: solution and number of steps."""
            # Derivatives solve systems with other right-hand sides, for which the guess is no guess.
            guess = tree_math.scale(_equal(right, system.b).astype(system.norm.dtype), start)
            size = tree_math.norm(right)
            unit = jnp.where(size > 0, size, jnp.ones_like(size))
            right = tree_math.scale(1.0 / unit, right)
            operator, tag = _count_steps(damped, max_steps, size)
            x, tags = solve_cg(
                operator,
                (right, tag),
                init=(tree_math.scale(1.0 / unit, guess), jnp.zeros_like(tag)),
                # A little less than asked for: the recurrence that jaxopt watches drifts from the true residual.
                tol=max(0.9 * rtol, float(jnp.finfo(size.dtype).eps)),
                maxiter=max_steps,
                M=None if preconditioner is None else _precondition(preconditioner, b, right),
            )
            x = tree_math.scale(unit, x)
            fine = tree_math.all_finite(x)
            return tree_math.select(fine, x, guess), (jnp.sum(tags != 0, dtype=jnp.int32), fine)

        # The derivative is that of the linear system, not of the iteration.
        x, (steps, fine) = jax.lax.custom_linear_solve(damped, system.b, solve=run, symmetric=True, has_aux=True)
        info = base.report(system, x, damping, rtol, steps + 1)
        return system.restore(x), info._replace(converged=info.converged & fine)

    return solve


def _equal(x, y):
    return jnp.all(jnp.stack([jnp.all(a == b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)]))


def _precondition(preconditioner, like, right):
    """The preconditioner on both blocks (see `_count_steps`), in units in which it is about the identity.

    A factor of the preconditioner changes no iterate; without one, the two blocks are of different sizes.
    """

    def apply(r):
        return tree_math.cast_like(preconditioner(tree_math.cast_like(r, like)), r)

    size = jnp.abs(base.rayleigh(right, apply(right)))
    unit = jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))
    return lambda pair: (tree_math.scale(1.0 / unit, apply(pair[0])), pair[1])


def _count_steps(matvec, max_steps: int, size):
    """Makes conjugate gradients count their steps, which jaxopt does not return.

    The system gets a second block of `max_steps` numbers, whose right-hand side is a tiny multiple of the first unit
    vector and whose "matrix" answers every search direction with a tiny number in the first place that is still zero.
    So each step makes one more place of the directions, and then of the solution, different from zero: their number
    is that of the steps. The numbers are so small that their squares vanish beside the other block in every inner
    product: the iterates are those without it.

    Args:
      matvec: product with the matrix proper.
      max_steps: most steps there can be.
      size: norm of the right-hand side; where it is 0 no step is made and nothing is to be counted.

    Returns:
      The matrix-vector product of both blocks and the second block's right-hand side.
    """
    tiny = jnp.sqrt(jnp.finfo(size.dtype).tiny).astype(size.dtype)
    tag = jnp.zeros((max_steps,), size.dtype).at[0].set(jnp.where(size > 0, tiny, jnp.zeros_like(tiny)))

    def operator(pair):
        direction, marks = pair
        product = matvec(direction)
        # In units of the matrix, so that the new number does not depend on the scale of the problem.
        square = tree_math.vdot(direction, direction)
        curvature = jnp.abs(tree_math.vdot(direction, product)) / jnp.where(square > 0, square, jnp.ones_like(square))
        used = marks != 0
        front = jnp.concatenate([jnp.zeros((1,), bool), used[:-1]]) & ~used
        answer = tiny * jnp.where(curvature > 0, curvature, jnp.ones_like(curvature))
        return product, jnp.where(front, answer, jnp.zeros_like(tiny))

    return operator, tag
