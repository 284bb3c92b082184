"""Generalised minimum residuals: a Krylov solver for matrices that are not symmetric.

    x_k = argmin over x in x_0 + M span{r_0, A M r_0, ..., (A M)^{k-1} r_0} of  ||b - A x||

with M the preconditioner, on the right, so that the residual is that of the system itself. The answer for update fields
that are not gradients, whose J^T is not symmetric. All vectors of the Krylov space are kept and made orthogonal twice;
A becomes a small Hessenberg matrix, whose least-squares problem is solved with its singular values, so that singular
matrices have a finite answer.

Why not the one that jaxopt forwards to. It does not return how many products it made. Written for batches, it solves
the small problem through normal equations, and in float32 gives NaN at condition numbers of 1e5. Written
incrementally, it adds the next basis vector, as large as the residual, to the solution when it stops early: at a
tolerance of 0.01 and 30 as the norm of A that leaves a residual of 0.1 (jax 0.10.2).

Not for: symmetric matrices (`cg`, `minres`), which need three vectors where this one needs all; parameters sharded over
devices, whose leaves it joins into one vector.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from auxjax._internal import checks, tree_math
from auxjax._internal.safe_math import positive_or_one
from auxjax._internal.scalars import computed_once
from auxjax.interface import Key, PyTree
from auxjax.solvers import base, iteration


class _Cycle(NamedTuple):
    """One cycle of `length` steps.

    Attributes:
      basis: [length + 1, n], orthonormal rows; rows not reached are 0.
      hessenberg: [length + 1, length]; columns not reached are 0.
      null: [length + 1], the vector that annihilates the columns so far, from the left, 1 in front.
      start: norm of the residual at the start.
      step: number of steps made.
      done: whether there is nothing left to do.
    """

    basis: jax.Array
    hessenberg: jax.Array
    null: jax.Array
    start: jax.Array
    step: jax.Array
    done: jax.Array


class _State(NamedTuple):
    """Between two cycles: the solution, the products made, the smallest Rayleigh quotient, and whether that is all."""

    x: Any
    products: jax.Array
    curvature: jax.Array
    done: jax.Array


def gmres(
    *,
    max_steps: int = 20,
    rtol: float = 1e-3,
    damping: float = 0.0,
    preconditioner: base.Matvec | None = None,
    restart: int = 20,
    unroll: bool | None = None,
) -> base.Solver:
    """Solver by generalised minimum residuals, for any square matrix.

    `x ~ (A + damping I)^{-1} b`

    Stops when the residual of the damped system is at most `rtol * ||b||` (or at rounding error, if `rtol` is smaller),
    or after `max_steps` steps. The residual never grows. When `restart` vectors have been collected, the next cycle
    starts afresh from the solution so far, more slowly; too small a `restart` may stagnate.

    Args:
      max_steps: most steps taken, over all cycles.
      rtol: relative residual at which the iteration stops, and up to which `converged` is True. 0 for all steps.
      damping: multiple of the identity added to A.
      preconditioner: linear function, pytree like `b` -> the same, that approximates the inverse of `A + damping I`.
      restart: steps of one cycle; at most as many as b has entries.
      unroll: whether the steps are written out. `None` does so for up to 32 steps on the CPU, and loops elsewhere.
        Written-out steps are all computed, and counted.

    Returns:
      `solve(matvec, b, *, init=None, key=None) -> (x, SolveInfo)`; `key` is not used. `min_curvature` is the smallest
      Rayleigh quotient of the solution and, without a preconditioner, of the basis vectors. Differentiable (another
      solve, with the transposed matrix); needs a `matvec` that `jax.linear_transpose` can transpose.
      Cost: steps + cycles matrix-vector products, the last for the true residual; one more with `init`. Memory: as many
      vectors as a cycle has steps, and 4 more. Time beside the products: 4 passes over these vectors per step.

    Raises:
      TypeError, ValueError: an option of the wrong type or out of range.

    Reference: Saad, Schultz, 1986, GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric Linear
    Systems, algorithm 4.
    """
    checks.count("gmres", 1, max_steps=max_steps, restart=restart)
    checks.number("gmres", least=0, known=True, rtol=rtol, damping=damping)
    iteration.check_preconditioner("gmres", preconditioner)
    written_out = iteration.choose_unroll("gmres", unroll, max_steps)

    def solve(matvec: base.Matvec, b: PyTree, *, init: PyTree = None, key: Key | None = None):
        system = base.as_vectors(base.make_system("gmres", matvec, b, init, key))
        size = sum(leaf.size for leaf in jax.tree.leaves(system.b))
        whole = min(restart, size, max_steps)
        cycles, rest = divmod(max_steps, whole)

        def iterate(operator, right, guess):
            apply = iteration.make_preconditioner("gmres", preconditioner, b, right, system)
            tolerance = iteration.stop_at(rtol, system.norm.dtype)

            def from_residual(state, residual, products, length=whole):
                cycle, trips, x = _cycle(operator, apply, state.x, residual, length, tolerance, written_out)
                seen = state.curvature if preconditioner is not None else _smallest_quotient(cycle)
                curvature = jnp.minimum(state.curvature, seen)
                return _State(x, state.products + products + trips, curvature, cycle.start <= tolerance)

            def again(state, length=whole):
                residual = tree_math.add_scaled(right, -1.0, operator(state.x))
                return from_residual(state, residual, jnp.int32(1), length)

            nothing, infinite = jnp.zeros((), jnp.int32), jnp.full_like(system.norm, jnp.inf)
            state = _State(guess, nothing, infinite, jnp.zeros((), bool))
            state = again(state) if init is not None else from_residual(state, right, nothing)
            if cycles > 1:
                state, _ = iteration.repeat(again, state, cycles - 1, written_out)
            if rest:
                state, _ = iteration.repeat(lambda s: again(s, rest), state, 1, written_out)
            return state.x, (state.products, state.curvature)

        x, (products, curvature), fine = iteration.framed_solve(system, damping, iterate, symmetric=False)
        curvature = jnp.where(system.norm > 0, curvature - damping, jnp.inf)
        info = base.report(system, x, damping, rtol, products, curvature)
        return system.restore(x), info._replace(converged=info.converged & fine)

    return solve


def _cycle(operator, apply, x, residual, length: int, tolerance, unroll: bool):
    """Up to `length` steps from `x`: the last state, the number of products, and the new `x`."""
    flat, unravel = ravel_pytree(residual)
    start = tree_math.norm(flat)
    unit = positive_or_one(start)
    dtype = flat.dtype
    cycle = _Cycle(
        basis=jnp.zeros((length + 1, flat.shape[0]), dtype).at[0].set(flat / unit),
        hessenberg=jnp.zeros((length + 1, length), dtype),
        null=jnp.zeros((length + 1,), dtype).at[0].set(1),
        start=start,
        step=jnp.zeros((), jnp.int32),
        done=~(start > tolerance),
    )

    def product(vector):
        return ravel_pytree(operator(apply(unravel(vector))))[0]

    cycle, trips = iteration.repeat(lambda c: _step(product, c, tolerance), cycle, length, unroll)
    first = jnp.zeros((length + 1,), dtype).at[0].set(start)
    # Columns not reached are 0 and get the coefficient 0, as does what is singular.
    coefficients = jnp.linalg.lstsq(cycle.hessenberg, first)[0]
    correction = apply(unravel(_multiply(coefficients, cycle.basis[:-1])))
    better = (cycle.step > 0) & tree_math.all_finite(correction)
    return cycle, trips, tree_math.select(better, tree_math.add_scaled(x, 1.0, correction), x)


def _step(product, cycle: _Cycle, tolerance) -> _Cycle:
    """One product, made orthogonal to the basis; a product that is not finite ends the cycle."""
    eps = float(jnp.finfo(cycle.start.dtype).eps)
    new = product(cycle.basis[cycle.step])
    size = tree_math.norm(new)
    column = jnp.zeros_like(cycle.null)
    for _ in range(2):  # once leaves a part of the size of rounding error over the new vector's length
        overlap = _multiply(cycle.basis, new)
        new = new - _multiply(overlap, cycle.basis)
        column = column + overlap
    size, height = computed_once(size, tree_math.norm(new))
    exhausted = ~(height > 10 * eps * size)
    divisor = jnp.where(exhausted, jnp.ones_like(height), height)
    # null . [column, height] = 0 gives the next entry, and ||null|| is the factor by which the residual has fallen.
    # Measured in units of the column, so that nothing overflows.
    unit = positive_or_one(size)
    null = cycle.null.at[cycle.step + 1].set(-_multiply(cycle.null, column / unit) / (divisor / unit))
    left = cycle.start / tree_math.norm(null)
    usable = jnp.isfinite(size) & ~cycle.done
    done = ~usable | exhausted | (left <= tolerance)
    step, done = computed_once((cycle.step + usable.astype(jnp.int32)).astype(size.dtype), done.astype(size.dtype))
    column = column.at[cycle.step + 1].set(jnp.where(exhausted, jnp.zeros_like(height), height))
    # The basis is large and gets no selection: a row of zeros where there is nothing to add.
    row = jnp.where(usable & ~exhausted, new / divisor, jnp.zeros_like(new))
    basis = cycle.basis.at[cycle.step + 1].set(row)
    return _Cycle(
        basis=basis,
        hessenberg=jnp.where(usable, cycle.hessenberg.at[:, cycle.step].set(column), cycle.hessenberg),
        null=jnp.where(usable, null, cycle.null),
        start=cycle.start,
        step=step.astype(jnp.int32),
        done=done > 0,
    )


def _smallest_quotient(cycle: _Cycle):
    """Smallest Rayleigh quotient of the basis vectors: the diagonal of the Hessenberg matrix."""
    diagonal = jnp.diagonal(cycle.hessenberg)
    used = jnp.arange(diagonal.shape[0], dtype=jnp.int32) < cycle.step
    return jnp.min(jnp.where(used, diagonal, jnp.inf))


def _multiply(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
