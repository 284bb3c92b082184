"""Minimum residuals: a Krylov solver for symmetric matrices with eigenvalues of both signs.

    x_k = argmin over x in x_0 + span{r_0, A r_0, ..., A^{k-1} r_0} of  ||b - A x||

Far from a minimum a Hessian is indefinite. Conjugate gradients then look for a saddle point and may divide by zero on
the way; here the residual falls with every step whatever the signs, and a singular matrix has a finite answer, the one
of smallest residual. The three-term recurrence of Lanczos makes A tridiagonal; its eigenvalues, which lie between those
of A, tell of negative curvature as a by-product.

Not for: matrices that are not symmetric (`gmres`), refused where that is known. A solution on an indefinite Hessian is
exact, and the hypergradient it gives is that of a stationary point that is not a minimum: `min_curvature` says so.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax._internal.scalars import computed_once
from auxjax.interface import Key, PyTree
from auxjax.solvers import base, iteration


class _State(NamedTuple):
    """Where the iteration stands: the Lanczos recurrence, the rotations, and the answer.

    Attributes:
      x: current solution.
      residual: b - A x, or `None` without a preconditioner, when `left` is its norm.
      older, newer: last two Lanczos vectors, not normalised.
      mapped: preconditioner times `newer`; `newer` itself without one.
      direction, direction_before: last two directions w, of which A w are orthonormal.
      scalars: see `_Scalars`.
      diagonal, off_diagonal: [max_steps], the tridiagonal matrix.
      quotient: smallest Rayleigh quotient of a preconditioned Lanczos vector.
      step: number of steps taken.
      done: whether there is nothing left to do.
    """

    x: Any
    residual: Any
    older: Any
    newer: Any
    mapped: Any
    direction: Any
    direction_before: Any
    scalars: "_Scalars"
    diagonal: jax.Array
    off_diagonal: jax.Array
    quotient: jax.Array
    step: jax.Array
    done: jax.Array


class _Scalars(NamedTuple):
    """Paige and Saunders's scalars: beta_k, beta_{k-1}, the last rotation, what it left above, phi, and ||A||."""

    beta: jax.Array
    beta_before: jax.Array
    cosine: jax.Array
    sine: jax.Array
    delta_bar: jax.Array
    epsilon: jax.Array
    left: jax.Array
    matrix_norm: jax.Array


def minres(
    *,
    max_steps: int = 20,
    rtol: float = 1e-3,
    damping: float = 0.0,
    preconditioner: base.Matvec | None = None,
    unroll: bool | None = None,
) -> base.Solver:
    """Solver by minimum residuals, for symmetric matrices of any signature.

    `x ~ (A + damping I)^{-1} b`, A symmetric

    Stops when the residual of the damped system is at most `rtol * ||b||` (or at rounding error, if `rtol` is smaller),
    when no further step can make it smaller (a singular matrix), or after `max_steps` steps. Without a preconditioner
    the residual never grows; with one its norm in the metric of the preconditioner never does.

    Args:
      max_steps: most steps taken.
      rtol: relative residual at which the iteration stops, and up to which `converged` is True. 0 for all steps.
      damping: multiple of the identity added to A.
      preconditioner: linear function, pytree like `b` -> the same, that approximates the inverse of the absolute value
        of `A + damping I`; symmetric positive definite.
      unroll: whether the steps are written out. `None` does so for up to 32 steps on the CPU, and loops elsewhere.
        Written-out steps are all computed, and counted.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `key` is not used. `min_curvature` is the smallest
      eigenvalue of A on the Krylov space; with a preconditioner, the smallest Rayleigh quotient of the vectors that
      span it. Negative numbers of the size of rounding error are given as 0. Differentiable (another solve).
      Cost: steps + 1 matrix-vector products, the last for the true residual; one more with `init`. Memory: 7 vectors,
      8 with a preconditioner.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range; an `Operator(symmetric=False)` (from the
        solve).

    Reference: Paige, Saunders, 1975, Solution of Sparse Indefinite Systems of Linear Equations, section 6.
    """
    checks.count("minres", 1, max_steps=max_steps)
    checks.number("minres", least=0, known=True, rtol=rtol, damping=damping)
    iteration.check_preconditioner("minres", preconditioner)
    written_out = iteration.choose_unroll("minres", unroll, max_steps)

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        base.require_symmetric("minres", matvec)
        system = base.as_vectors(base.make_system("minres", matvec, b, init, key))

        def iterate(operator, right, guess):
            apply = None
            if preconditioner is not None:
                apply = iteration.make_preconditioner("minres", preconditioner, b, right, system)
            tolerance = iteration.stop_at(rtol, system.norm.dtype)
            residual = right if init is None else tree_math.add_scaled(right, -1.0, operator(guess))
            state = _start(guess, residual, apply, max_steps, tolerance)
            state, trips = iteration.repeat(
                lambda s: _step(operator, apply, s, tolerance), state, max_steps, written_out
            )
            return state.x, (trips, _smallest_eigenvalue(state, damping) if apply is None else state.quotient - damping)

        x, (trips, curvature), fine = iteration.framed_solve(system, damping, iterate, symmetric=True)
        curvature = jnp.where(system.norm > 0, curvature, jnp.inf)
        info = base.report(system, x, damping, rtol, trips + jnp.int32(init is not None), curvature)
        return system.restore(x), info._replace(converged=info.converged & fine)

    return solve


def _metric_norm(r, mapped):
    """`sqrt(<r, M r>)` without under- or overflow; NaN when M is not positive."""
    size = tree_math.norm(r)
    unit = positive_or_one(size)
    return size * jnp.sqrt(tree_math.vdot(tree_math.scale(1.0 / unit, r), tree_math.scale(1.0 / unit, mapped)))


def _start(x, residual, apply, max_steps, tolerance) -> _State:
    """The state before the first step."""
    mapped = residual if apply is None else apply(residual)
    size = tree_math.norm(residual)
    beta = size if apply is None else _metric_norm(residual, mapped)
    zero, zeros = jnp.zeros_like(size), jax.tree.map(jnp.zeros_like, x)
    return _State(
        x=x,
        residual=None if apply is None else residual,
        older=zeros,
        newer=residual,
        mapped=mapped,
        direction=zeros,
        direction_before=zeros,
        scalars=_Scalars(beta, zero, zero - 1, zero, zero, zero, beta, zero),
        diagonal=jnp.zeros((max_steps,), size.dtype),
        off_diagonal=jnp.zeros((max_steps,), size.dtype),
        quotient=jnp.full_like(size, jnp.inf),
        step=jnp.zeros((), jnp.int32),
        done=(size <= tolerance) | ~(jnp.isfinite(beta) & (beta > 0)),
    )


def _step(operator, apply, state: _State, tolerance) -> _State:
    """One Lanczos step, one rotation, one step of the solution; a step that cannot be taken ends the iteration.

    What is done stays done, and its answer as it is.
    """
    old = state.scalars
    eps = float(jnp.finfo(old.beta.dtype).eps)
    beta = positive_or_one(old.beta)
    before = positive_or_one(old.beta_before)

    # Lanczos. The previous vector is 0 in the first step.
    vector = tree_math.scale(1.0 / beta, state.mapped)
    product = operator(vector)
    product = tree_math.add_scaled(product, -beta / before, state.older)
    alpha = tree_math.vdot(vector, product)
    newest = tree_math.add_scaled(product, -alpha / beta, state.newer)
    mapped = newest if apply is None else apply(newest)
    beta_next = tree_math.norm(newest) if apply is None else _metric_norm(newest, mapped)

    scalars, possible, length, weights = _rotate(old, alpha, beta_next, state.step > 0)
    direction = tree_math.combine(weights, [vector, state.direction_before, state.direction])
    residual, size = None, scalars.left
    if apply is not None:
        back = scalars.left * scalars.cosine / positive_or_one(beta_next)
        residual = tree_math.combine([scalars.sine**2, -back], [state.residual, newest])
        size = tree_math.norm(residual)
    quotient = alpha if apply is None else alpha / tree_math.norm(vector) ** 2
    # What is seen of A counts whether or not the step can be taken.
    active = ~state.done & jnp.isfinite(alpha)
    here = active & (jnp.arange(state.diagonal.shape[0], dtype=jnp.int32) == state.step)
    # Only the answer is guarded: the rest may become anything once the iteration is done.
    x = tree_math.add_scaled(state.x, length, direction)
    done = state.done | ~possible | (size <= tolerance) | (beta_next <= 10 * eps * scalars.matrix_norm)
    done, step, quotient = computed_once(
        done.astype(size.dtype),
        (state.step + active.astype(jnp.int32)).astype(size.dtype),
        jnp.where(active, jnp.minimum(state.quotient, quotient), state.quotient),
    )
    return _State(
        x=tree_math.select(possible & ~state.done, x, state.x),
        residual=residual,
        older=state.newer,
        newer=newest,
        mapped=mapped,
        direction=direction,
        direction_before=state.direction,
        scalars=scalars,
        diagonal=jnp.where(here, alpha, state.diagonal),
        off_diagonal=jnp.where(here, old.beta, state.off_diagonal),
        quotient=quotient,
        step=step.astype(jnp.int32),
        done=done > 0,
    )


def _rotate(old: _Scalars, alpha, beta_next, later):
    """The rotation that takes beta_next out of the new column of the tridiagonal matrix.

    Returns:
      The new scalars, whether the step is possible, its length, and the weights of the new vector and of the two last
      directions in the new direction.
    """
    one = jnp.ones_like(alpha)
    eps = float(jnp.finfo(alpha.dtype).eps)
    delta = old.cosine * old.delta_bar + old.sine * alpha
    gamma_bar = old.sine * old.delta_bar - old.cosine * alpha
    largest = jnp.maximum(jnp.abs(gamma_bar), beta_next)
    unit = positive_or_one(largest)
    gamma = unit * jnp.sqrt((gamma_bar / unit) ** 2 + (beta_next / unit) ** 2)
    off = jnp.where(later, old.beta, jnp.zeros_like(alpha))
    matrix_norm = jnp.maximum(old.matrix_norm, jnp.maximum(jnp.abs(alpha), jnp.maximum(off, beta_next)))
    delta, gamma_bar, gamma, matrix_norm = computed_once(delta, gamma_bar, gamma, matrix_norm)
    # ||A r|| = gamma ||r||: where that vanishes the residual is as small as it gets. Later digits are noise.
    possible = (gamma > eps**0.75 * matrix_norm) & jnp.isfinite(gamma) & jnp.isfinite(matrix_norm)
    divisor = jnp.where(possible, gamma, one)
    cosine, sine = gamma_bar / divisor, beta_next / divisor
    *scalars, flag, length, first, second, third = computed_once(
        beta_next,
        old.beta,
        cosine,
        sine,
        -old.cosine * beta_next,
        old.sine * beta_next,
        sine * old.left,
        matrix_norm,
        possible.astype(alpha.dtype),
        cosine * old.left,
        1.0 / divisor,
        -old.epsilon / divisor,
        -delta / divisor,
    )
    return _Scalars(*scalars), flag > 0, length, [first, second, third]


def _smallest_eigenvalue(state: _State, damping: float):
    """Smallest eigenvalue of the tridiagonal matrix, less the damping: a Rayleigh quotient of A.

    A negative number of the size of rounding error is not a sign of negative curvature and becomes 0; infinite when no
    step was made.
    """
    steps = state.diagonal.shape[0]
    used = jnp.arange(steps, dtype=jnp.int32) < state.step
    # Unused rows repeat the first diagonal entry, which is no smaller than the smallest eigenvalue.
    diagonal = jnp.where(used, state.diagonal, state.diagonal[0])
    # The first entry is the norm of the right-hand side and belongs to no row.
    off_diagonal = jnp.where(used, state.off_diagonal, jnp.zeros_like(diagonal))[1:]
    size = jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.max(jnp.abs(off_diagonal), initial=0))
    unit = positive_or_one(size)
    smallest = jax.scipy.linalg.eigh_tridiagonal(
        diagonal / unit, off_diagonal / unit, eigvals_only=True, select="i", select_range=(0, 0)
    )
    smallest = unit * smallest[0] - damping
    noise = steps * float(jnp.finfo(unit.dtype).eps) * unit
    smallest = jnp.where((smallest < 0) & (smallest >= -noise), jnp.zeros_like(smallest), smallest)
    return jnp.where(state.step > 0, smallest, jnp.full_like(size, jnp.inf))
