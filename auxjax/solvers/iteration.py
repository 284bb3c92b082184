"""The frame around an iterative solver: what stays the same whichever iteration runs inside.

    unit right-hand side -> iteration -> finite answer,      d(A^{-1} b) = A^{-1} (db - dA x)

The iteration sees a right-hand side of unit length, so that tolerances mean the same on every scale. An answer that is
not finite is replaced with the initial guess. The derivative is that of the linear system: one more solve, and not a
walk back through the steps; that in the guess, on which the solution does not depend, is 0.

Short iterations are written out on the CPU (`auxjax._internal.loops`). Straight-line code cannot stop early: all steps
are computed, those after the end are thrown away, and reports count them.

Not for: solvers that are not an iteration.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from auxjax._internal import checks, convolutions, loops, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax.solvers import base


def framed_solve(system: base.System, damping: float, iterate: Callable, *, symmetric: bool):
    """Runs an iteration on `(A + damping I) x = b`.

    Args:
      system: from `base.make_system`.
      damping: multiple of the identity added to A.
      iterate: `(operator, right, guess) -> (x, aux)`, with `operator` the damped product and `right` of unit length,
        or 0. It is called anew, with other right-hand sides and the transposed operator, for derivatives. `operator` is
        an `Operator` with its transpose where the system has one.
      symmetric: whether A is its own transpose.

    Returns:
      `(x, aux, fine)`: the solution, what the iteration said about it, and whether its own answer was finite.
    """

    def with_damping(product):
        return lambda x: tree_math.add_scaled(product(x), damping, x) if damping else product(x)

    damped = with_damping(system.matvec)
    adjoint = None if system.transpose is None else with_damping(system.transpose)
    start = jax.tree.map(jnp.zeros_like, system.b) if system.start is None else jax.lax.stop_gradient(system.start)

    def run(operator, right):
        # Derivatives solve systems with other right-hand sides, for which the guess is not a guess.
        guess = tree_math.scale(_equal(right, system.b).astype(system.norm.dtype), start)
        size = tree_math.norm(right)
        unit = positive_or_one(size)
        x, aux = iterate(operator, tree_math.scale(1.0 / unit, right), tree_math.scale(1.0 / unit, guess))
        x = tree_math.scale(unit, x)
        fine = tree_math.all_finite(x)
        return tree_math.select(fine, x, guess), (aux, fine)

    def forward(_, right):
        return run(base.Operator(damped, transpose=adjoint), right)

    def backward(operator, right):
        return run(operator if adjoint is None else base.Operator(adjoint, transpose=damped), right)

    transposed = {} if symmetric else {"transpose_solve": backward}
    x, (aux, fine) = jax.lax.custom_linear_solve(
        damped, system.b, solve=forward, symmetric=symmetric, has_aux=True, **transposed
    )
    return x, aux, fine


def _equal(x, y):
    return jnp.all(jnp.stack([jnp.all(a == b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)]))


def stop_at(rtol: float, dtype) -> float:
    """Residual of a unit right-hand side at which to stop: a little less than asked for, or rounding error."""
    return max(0.9 * rtol, float(jnp.finfo(dtype).eps))


def repeat(body: Callable, state, times: int, unroll: bool):
    """`body` until `state.done`, at most `times` times: `(state, number of times it was computed)`.

    `body` must leave a state that is done as it is.
    """
    if unroll:
        for _ in range(times):
            state = body(state)
        return state, jnp.asarray(times, jnp.int32)

    def going_on(carry):
        return (carry[0] < times) & ~carry[1].done

    step = convolutions.channels_last(body)
    trips, state = jax.lax.while_loop(
        going_on, lambda carry: (carry[0] + jnp.int32(1), step(carry[1])), (jnp.zeros((), jnp.int32), state)
    )
    return state, trips


def choose_unroll(where: str, unroll, steps: int) -> bool:
    """The option `unroll`, or for `None` whether the backend is a CPU and the steps are few."""
    if not (unroll is None or isinstance(unroll, bool)):
        raise TypeError(f"{where}(unroll={unroll!r}): expected True, False, or None to choose by the backend.")
    return bool(loops.write_out(steps, choice=unroll))


def check_preconditioner(where: str, preconditioner) -> None:
    """Raises TypeError unless `preconditioner` is a function or `None`."""
    if preconditioner is not None:
        checks.function(where, "a linear function, pytree like b -> the same", preconditioner=preconditioner)


def make_preconditioner(where: str, preconditioner, b, right, system: base.System) -> Callable:
    """The preconditioner in the solver's precision, in units in which it maps `right` to unit length.

    A factor of the preconditioner changes no iterate; without one, nothing overflows.

    Args:
      where: name of the solver, for messages.
      preconditioner: function of pytrees like `b`, or `None` for the identity.
      b: right-hand side as it came in, whose dtypes the preconditioner gets to see.
      right: right-hand side of unit length, as the system has vectors.
      system: the system.

    Raises:
      ValueError: the preconditioner returns another structure or other shapes than `b`.
    """
    if preconditioner is None:
        return lambda r: r
    answer = jax.eval_shape(preconditioner, b)
    checks.like(f"{where}(preconditioner=) returned a pytree that", answer, b, "b")

    def apply(r):
        tree = system.tree(r)
        return system.vector(tree_math.cast_like(preconditioner(tree_math.cast_like(tree, b)), tree))

    size = tree_math.norm(apply(right))
    unit = jnp.where((size > 0) & jnp.isfinite(size), size, jnp.ones_like(size))
    return lambda r: tree_math.scale(1.0 / unit, apply(r))
