"""Conjugate gradients for A x = b, A symmetric positive definite.

    x_k = argmin over x in x_0 + span{r_0, A r_0, ..., A^{k-1} r_0} of  <x, A x> / 2 - <b, x>

Not jaxopt's: its solution comes alone, without the curvature along the directions, which tells of an indefinite matrix;
it multiplies a start that is zero; and it loops, which convolutions on the CPU suffer from (10 products of a small
network: 913 ms, written out about 50).

Added to the textbook: a right-hand side of unit length, so that tolerances mean the same on every scale; a stop at
rounding error; a finite answer when the iteration breaks down; the true residual.

Not for: systems that are not symmetric positive definite (damping may make them so). An operator that is known not to
be symmetric is refused.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks, tree_math
from auxjax._internal.scalars import computed_once
from auxjax.interface import Key, PyTree
from auxjax.solvers import base, iteration


def cg(
    *,
    max_steps: int = 20,
    rtol: float = 1e-3,
    damping: float = 0.0,
    preconditioner: base.Matvec | None = None,
    unroll: bool | None = None,
) -> base.Solver:
    """Solver by (preconditioned) conjugate gradients.

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
      unroll: whether the steps are written out. `None` does so for up to 32 steps on the CPU, and loops elsewhere.
        Written-out steps are all computed, and counted: where a warm start or a preconditioner makes most of them
        needless, False is faster.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `key` is not used. `min_curvature` is the smallest
      Rayleigh quotient of the solution and of the search directions. Differentiable (another solve).
      Cost: steps + 1 matrix-vector products, the last for the true residual; one more with `init`. Memory: 4 vectors,
      one more with a preconditioner.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range; an `Operator(symmetric=False)` (from the
        solve).

    Reference: Hestenes, Stiefel, 1952, Methods of Conjugate Gradients for Solving Linear Systems.
    """
    checks.count("cg", 1, max_steps=max_steps)
    checks.number("cg", least=0, known=True, rtol=rtol, damping=damping)
    iteration.check_preconditioner("cg", preconditioner)
    written_out = iteration.choose_unroll("cg", unroll, max_steps)
    break_fusion = computed_once if written_out else lambda *scalars: scalars  # a loop's state is not a formula

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        base.require_symmetric("cg", matvec)
        system = base.as_vectors(base.make_system("cg", matvec, b, init, key))

        def iterate(operator, right, guess):
            tolerance = iteration.stop_at(rtol, system.norm.dtype)
            apply = None
            if preconditioner is not None:
                apply = iteration.make_preconditioner("cg", preconditioner, b, right, system)
            residual = right if init is None else tree_math.add_scaled(right, -1.0, operator(guess))
            first = _start(guess, residual, apply, tolerance)
            last, trips = iteration.repeat(
                lambda s: _step(operator, apply, s, tolerance, break_fusion), first, max_steps, written_out
            )
            return last.x, (trips + jnp.int32(init is not None), last.quotient - damping)

        x, (products, curvature), fine = iteration.framed_solve(system, damping, iterate, symmetric=True)
        curvature = jnp.where(system.norm > 0, curvature, jnp.inf)
        info = base.report(system, x, damping, rtol, products, curvature)
        return system.restore(x), info._replace(converged=info.converged & fine)

    return solve


class _State(NamedTuple):
    """Where the iteration stands.

    Attributes:
      x: current solution.
      residual: b - A x by recurrence.
      direction: next search direction.
      square: `<r, M r>`, r the residual and M the preconditioner.
      quotient: smallest Rayleigh quotient of a direction.
      done: whether there is nothing left to do.
    """

    x: Any
    residual: Any
    direction: Any
    square: jax.Array
    quotient: jax.Array
    done: jax.Array


def _start(x, residual, apply, tolerance) -> _State:
    direction = residual if apply is None else apply(residual)
    square = tree_math.vdot(residual, direction)
    size = tree_math.norm(residual)
    return _State(x, residual, direction, square, jnp.full_like(square, jnp.inf), size <= tolerance)


def _step(operator, apply, state: _State, tolerance, break_fusion) -> _State:
    """One step; where the iteration is done its length is zero, and the solution stays as it is.

    A direction without curvature, or with one that is not finite, ends the iteration. A negative curvature does not:
    the step then goes to the saddle point along this direction.
    """
    one = jnp.ones_like(state.square)
    product = operator(state.direction)
    curvature = tree_math.vdot(state.direction, product)
    length = state.square / jnp.where(curvature == 0, one, curvature)
    possible = (curvature != 0) & jnp.isfinite(length) & ~state.done
    quotient = curvature / tree_math.vdot(state.direction, state.direction)
    length, quotient, possible = break_fusion(
        jnp.where(possible, length, jnp.zeros_like(length)),
        jnp.where(possible, jnp.minimum(quotient, state.quotient), state.quotient),
        possible.astype(length.dtype),
    )
    residual = tree_math.add_scaled(state.residual, -length, product)
    mapped = residual if apply is None else apply(residual)
    square = tree_math.vdot(residual, mapped)
    size = square if apply is None else tree_math.vdot(residual, residual)
    ratio = square / jnp.where(state.square == 0, one, state.square)
    done = (possible == 0) | (jnp.sqrt(size) <= tolerance)
    ratio, square, done = break_fusion(ratio, square, done.astype(length.dtype))
    return _State(
        x=tree_math.add_scaled(state.x, length, state.direction),
        residual=residual,
        direction=tree_math.add_scaled(mapped, ratio, state.direction),
        square=square,
        quotient=quotient,
        done=done > 0,
    )
